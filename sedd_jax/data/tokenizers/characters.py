"""Alphabets: every byte, or the 27 characters of text8. They need no files."""

import re

import numpy as np

from sedd_jax.data.tokenizers.base import Tokenizer
from sedd_jax.errors import InputError, utf8


class Bytes(Tokenizer):
    """Ids 0 to 255 are the UTF-8 bytes, 256 ends a document."""

    KIND = "bytes"
    vocab_size = 257
    eot = 256
    _alphabet = bytes(range(256))

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8)

    def _piece(self, i: int) -> bytes:
        return self._alphabet[i : i + 1]

    def _decode(self, ids: np.ndarray) -> str:
        return np.frombuffer(self._alphabet, np.uint8)[ids].tobytes().decode("utf-8", errors="replace")


class Text8(Bytes):
    """Ids 0 to 26 are the space and a to z, a byte each. There is no end of text: text8 is one run of characters."""

    KIND = "text8"
    vocab_size = 27
    eot = None
    _alphabet = b" abcdefghijklmnopqrstuvwxyz"
    pieces = tuple(bytes([letter]) for letter in _alphabet)  # unlike others, it cannot encode what would test them

    def _encode(self, text: str) -> np.ndarray:
        if no := re.search("[^a-z ]", text):
            raise InputError(f"{no[0]!r} at character {no.start()} of a text: 'text8' knows a to z and the space only")
        return super()._encode(text) % 32  # the space is 32, a is 97
