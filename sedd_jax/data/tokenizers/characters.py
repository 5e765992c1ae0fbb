"""Alphabets: every byte, or the 27 characters of text8. They need no files."""

import hashlib
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
from etils import epath

from sedd_jax.data.tokenizers import base
from sedd_jax.errors import InputError

_TEXT8 = b" abcdefghijklmnopqrstuvwxyz"
_TEXT8_IDS = np.full(256, -1, np.int8)
_TEXT8_IDS[np.frombuffer(_TEXT8, np.uint8)] = np.arange(27)


class Bytes:
    """Ids 0 to 255 are the UTF-8 bytes, 256 ends a document."""

    vocab_size = 257
    eot = 256
    lossless = True

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(base.utf8(text), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        return base.decode_documents(
            self, tokens, lambda ids: ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        )

    def save(self, directory: epath.PathLike) -> None:
        base.save(directory, "bytes", self, {})


class Text8:
    """Ids 0 to 26 are the space and a to z; other text is refused.

    There is no end of text, because text8 is one run of characters: each token is one character and one byte, so bits
    per token, per byte and per character are one figure, over the 27 characters that other papers give.
    """

    vocab_size = 27
    eot = None
    lossless = True

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"text8").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        ids = _TEXT8_IDS[np.frombuffer(base.utf8(text), np.uint8)]
        if (ids < 0).any():
            # All before the first other character is ASCII, so its byte has the number of its character.
            place = int(np.argmax(ids < 0))
            raise InputError(
                f"{text[place]!r} at character {place} of a text: the tokenizer 'text8' knows a to z and the space only"
            )
        return ids.astype(np.int32)

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        return base.decode_documents(
            self, tokens, lambda ids: np.frombuffer(_TEXT8, np.uint8)[ids].tobytes().decode("ascii")
        )

    def save(self, directory: epath.PathLike) -> None:
        base.save(directory, "text8", self, {})
