"""Alphabets: every byte, or the 27 characters of text8. They need no files."""

import numpy as np

from sedd_jax.data.tokenizers.base import Tokenizer
from sedd_jax.errors import InputError, utf8

_TEXT8 = b" abcdefghijklmnopqrstuvwxyz"
_TEXT8_IDS = np.full(256, -1, np.int8)
_TEXT8_IDS[np.frombuffer(_TEXT8, np.uint8)] = np.arange(27)


class Bytes(Tokenizer):
    """Ids 0 to 255 are the UTF-8 bytes, 256 ends a document."""

    KIND = "bytes"
    vocab_size = 257
    eot = 256

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8)

    def _piece(self, i: int) -> bytes:
        return bytes([i])

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class Text8(Tokenizer):
    """Ids 0 to 26 are the space and a to z; there is no end of text, since text8 is one run of characters. Each is a
    byte and a token."""

    KIND = "text8"
    vocab_size = 27
    eot = None

    def _encode(self, text: str) -> np.ndarray:
        ids = _TEXT8_IDS[np.frombuffer(utf8(text), np.uint8)]
        if (ids < 0).any():
            # Everything before it is ASCII, so its byte has the index of its character.
            place = int(np.argmax(ids < 0))
            raise InputError(f"{text[place]!r} at character {place} of a text: 'text8' knows a to z and the space only")
        return ids

    @property
    def pieces(self) -> tuple[bytes, ...]:
        return tuple(map(self._piece, range(27)))  # unlike others, it cannot encode what would test them

    def _piece(self, i: int) -> bytes:
        return _TEXT8[i : i + 1]

    def _decode(self, ids: np.ndarray) -> str:
        return np.frombuffer(_TEXT8, np.uint8)[ids].tobytes().decode("ascii")
