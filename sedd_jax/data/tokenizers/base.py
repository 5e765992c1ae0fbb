"""The base class of tokenizers."""

import abc
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
from etils import epath

from sedd_jax.errors import InputError, explained, utf8
from sedd_jax.files import write_atomically

END_OF_TEXT = "<|endoftext|>"
DESCRIPTION_FILE = "tokenizer.json"

_BLOCK = 1 << 16  # characters of a block of a long text, or a few more
# What tokenizers may lose: case, accents, runs of spaces, lines, rare characters, look-alikes.
_PROBE = '  Déjà  VU,\n\n\tMr. O\'Neil said: "1,234.5 ½ ﬁ"…\r\n漢字 👩‍👩‍👧 \u2581 e\u0301\x00 '
# Characters of all sizes, most of them in no vocabulary, whose UTF-8 has every byte that there is in UTF-8.
_RANGES = ((0, 0x800, 1), (0x800, 0xD800, 0x400), (0xE000, 0x10000, 0x400), (0x10000, 0x110000, 0x8000))
_PROBES = (_PROBE, "word", "".join(chr(code) for span in _RANGES for code in range(*span)))


class Tokenizer(abc.ABC):
    """Text to ids and back. Ids run from 0 to `vocab_size` - 1. A subclass is constructed from the contents of FILES.
    KIND: its name in a config. FILES: names of the files that `save` writes, none for a fixed alphabet.
    contents: of FILES, or of the first ones, if the others have nothing to add.
    eot: the id that ends a document, or None. `encode` never returns it, even for text that spells it.
    lossless: whether every encoded text is decoded exactly. A loss costs no bits: see `lossy_warning`.
    padding: ids from `vocab_size` on that a model has besides; `decode` shows their numbers."""

    KIND: str
    FILES: tuple[str, ...] = ()
    contents: tuple[bytes, ...] = ()
    vocab_size: int
    eot: int | None
    lossless: bool = True
    padding: int = 0
    # A compiled pattern: text may be encoded in blocks that end where it ends. None if that would change the ids.
    _boundary: Any = None

    @classmethod
    def find(cls, path: epath.Path | None) -> tuple[epath.Path, ...]:
        """Paths of FILES, in their order, for the path in a config."""
        if path is None:
            raise InputError(f"tokenizer path=None: the kind {cls.KIND!r} needs the path of a file")
        return (path,)

    @classmethod
    def read(cls, paths: Iterable[epath.Path]) -> "Tokenizer":
        """Raises InputError, which names the file, if one is missing or damaged."""
        paths, contents = tuple(paths), []
        for path in paths:
            if os.path.exists(path) and not os.path.isfile(path):  # to epath, a pipe is a file
                raise InputError(f"the tokenizer file {path} is a directory, a pipe or a device: give a file")
            with explained(f"cannot read the tokenizer file {path}", "check the path", OSError):
                contents.append(path.read_bytes())
        with explained(", ".join(map(str, paths)), "", InputError):
            return cls(*contents)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that determines the ids of a text: equal digests mean interchangeable tokenizers."""
        about = f"{self.KIND}, end of text {self.eot}\n" if self.FILES else self.KIND
        return hashlib.sha256(b"".join([about.encode(), *self.contents])).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n], without an end of text. Raises InputError for invalid Unicode or text without ids."""
        utf8(text)
        blocks = self._blocks(text) if len(text) > _BLOCK and self._boundary else [text]
        ids = (self._encode_next(block) if number else self._encode(block) for number, block in enumerate(blocks))
        return np.concatenate([np.empty(0, np.int32), *(np.array(part, np.int32) for part in ids)])

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        """Text of ids [n]: `eot` as <|endoftext|>, `padding` as <|id|>, bytes that are not UTF-8 as U+FFFD."""
        ids = np.asarray(tokens, dtype=np.int64)
        unknown = ids[(ids < 0) | (ids >= self.vocab_size + self.padding)]
        if unknown.size:
            raise InputError(f"token {unknown[0]} has no text: give ids from 0 to {self.vocab_size - 1}")
        eot = -1 if self.eot is None else self.eot
        ends = np.flatnonzero((ids == eot) | (ids >= self.vocab_size))
        texts = [self._decode(part) for part in np.split(ids, np.stack([ends, ends + 1], -1).ravel())[::2]]
        marks = [END_OF_TEXT if ids[end] == eot else f"<|{ids[end]}|>" for end in ends]
        return "".join(part for pair in zip(texts, [*marks, ""], strict=True) for part in pair)

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...] | None:
        """The bytes of every id, none for `eot`; None for a tokenizer whose text is not that of its ids in a row."""
        pieces = tuple(b"" if i == self.eot else self._piece(i) for i in range(self.vocab_size))
        sound = all(b"".join(pieces[i] for i in self.encode(text)) == utf8(text) for text in _PROBES)
        return pieces if sound else None

    def save(self, directory: epath.PathLike) -> None:
        """Writes the files that `tokenizers.load` reads, each in one move. Call it from one process only."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in zip(self.FILES, self.contents, strict=False):
            write_atomically(directory / name, content)
        description = json.dumps({"kind": self.KIND, "fingerprint": self.fingerprint}) + "\n"
        write_atomically(directory / DESCRIPTION_FILE, description)  # last: where it is, the others are complete

    def portable(self) -> dict[str, bytes]:
        """Files for programs without this package: those of its library, and the bytes of every id as characters of
        Latin-1. Where the text of an id depends on others, it is that behind an a."""
        first, known = self.encode("a")[:1].tolist(), dict(enumerate(self.pieces or ()))
        behind = lambda i: self.decode([*first, i])[len(self.decode(first)) :].encode()  # noqa: E731
        pieces = [known.get(i) or behind(i) for i in range(self.vocab_size + self.padding)]
        files = dict(zip(self.FILES, self.contents, strict=False))
        return files | {"pieces.json": json.dumps([piece.decode("latin-1") for piece in pieces]).encode()}

    def gives_back(self, *texts: str) -> bool:
        """Whether these texts, and those of everything that tokenizers may lose, are decoded exactly."""
        return all(self._decode(self.encode(text)) == text for text in (*_PROBES, *texts))

    @abc.abstractmethod
    def _encode(self, text: str) -> Sequence[int] | np.ndarray:
        """Ids of one block of valid text."""

    def _encode_next(self, text: str) -> Sequence[int] | np.ndarray:
        """Ids of one block that is not the first of its text."""
        return self._encode(text)

    @abc.abstractmethod
    def _piece(self, i: int) -> bytes:
        """The bytes of an id; see `pieces`, which checks them."""

    @abc.abstractmethod
    def _decode(self, ids: np.ndarray) -> str:
        """Text of ids [n] that are in the vocabulary and not `eot`."""

    def _blocks(self, text: str) -> Iterator[str]:
        """Text in parts: the libraries need much memory per character of one call, and slow down."""
        start = 0
        while start < len(text):
            found = self._boundary.search(text, start + _BLOCK)
            stop = found.end() if found else len(text)
            yield text[start:stop]
            start = stop


def lossy_warning(tokenizer: Tokenizer) -> str | None:
    """A warning about figures per byte under a lossy tokenizer."""
    what = "the tokenizer does not give every text back (it may lower-case, strip accents or join spaces)"
    costs = "what it loses costs no bits, so bits per byte do not compare with those of a lossless tokenizer"
    return None if tokenizer.lossless else f"{what}; {costs}"


def piece_bytes(name: str) -> bytes:
    """What a piece in SentencePiece's spelling stands for: U+2581 for a space, <0x0A> for a byte."""
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode(errors="replace")
