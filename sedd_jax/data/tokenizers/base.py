"""The base class of tokenizers, and what all kinds share."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import SupportsIndex

import numpy as np
from etils import epath

from sedd_jax.errors import InputError
from sedd_jax.files import write_atomically

END_OF_TEXT = "<|endoftext|>"
DESCRIPTION_FILE = "tokenizer.json"

# What tokenizers may lose: case, accents, runs of spaces, lines, rare characters, look-alikes.
_PROBE = '  Déjà  VU,\n\n\tMr. O\'Neil said: "1,234.5 ½ ﬁ"…\r\n漢字 👩‍👩‍👧 \u2581 e\u0301\x00 '


class Tokenizer:
    """Text to ids and back. Ids run from 0 to `vocab_size` - 1.

    KIND: its name in a config. FILES: names of the files that `save` writes.
    eot: the id that ends a document; None for an alphabet of text without documents. `encode` never returns it, even
        for text that spells it out.
    fingerprint: hex digest of everything that determines the ids of a text: tokenizers of one digest are
        interchangeable.
    lossless: whether every encoded text is decoded exactly. A loss costs no bits: see `lossy_warning`.
    """

    KIND: str
    FILES: tuple[str, ...] = ()
    vocab_size: int
    eot: int | None
    fingerprint: str
    lossless: bool = True

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n], without an end of text. Raises InputError for invalid Unicode or text without ids."""
        raise NotImplementedError

    def contents(self) -> tuple[bytes, ...]:
        """The contents of FILES."""
        return ()

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        """Text of ids [n]: `eot` as <|endoftext|>, bytes that are not UTF-8 as U+FFFD. InputError for other ids."""
        ids = np.asarray(tokens, dtype=np.int64)
        unknown = ids[(ids < 0) | (ids >= self.vocab_size)]
        if unknown.size:
            raise InputError(f"token {unknown[0]} has no text: give ids from 0 to {self.vocab_size - 1}")
        ends = np.flatnonzero(ids == self.eot) if self.eot is not None else np.empty(0, np.int64)
        bounds = zip([0, *(ends + 1)], [*ends, len(ids)], strict=True)
        return END_OF_TEXT.join(self._decode(ids[start:end]) for start, end in bounds)

    def save(self, directory: epath.PathLike) -> None:
        """Writes the files that `tokenizers.load` reads, each in one move. Call it from one process only."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in zip(self.FILES, self.contents(), strict=True):
            write_atomically(directory / name, content)
        # The description is last: where it exists, the others are complete.
        description = json.dumps({"kind": self.KIND, "fingerprint": self.fingerprint}) + "\n"
        write_atomically(directory / DESCRIPTION_FILE, description)

    def _decode(self, ids: np.ndarray) -> str:
        """Text of ids [n] that are in the vocabulary and not `eot`."""
        raise NotImplementedError


def lossy_warning(tokenizer: Tokenizer) -> str | None:
    """A warning about figures per byte under a lossy tokenizer."""
    if tokenizer.lossless:
        return None
    return (
        "the tokenizer does not give every text back (it may lower-case, strip accents or join spaces); what it loses "
        "costs no bits, so bits per byte do not compare with those of a lossless tokenizer"
    )


def gives_back(encode: Callable[[str], np.ndarray], decode: Callable[[np.ndarray], str]) -> bool:
    """Whether a text of everything that tokenizers may lose is decoded exactly."""
    return decode(encode(_PROBE)) == _PROBE


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text with half a surrogate pair at character {error.start}: give valid UTF-8") from error


def read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the tokenizer file {path}: {error.strerror or error}; check the path") from error


@contextlib.contextmanager
def naming(path: epath.Path) -> Iterator[None]:
    """Puts the path before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
