"""What every tokenizer is and does: the protocol, and the parts of it that do not depend on the kind."""

import json
from collections.abc import Callable, Iterable
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from etils import epath

from sedd_jax.errors import InputError

END_OF_TEXT = "<|endoftext|>"
DESCRIPTION_FILE = "tokenizer.json"

# What tokenizers lose when they do lose something: case, accents, runs of spaces, lines, rare characters, look-alikes.
_PROBE = '  Déjà  VU,\n\n\tMr. O\'Neil said: "1,234.5 ½ ﬁ"…\r\n漢字 👩‍👩‍👧 \u2581 e\u0301\x00 '


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer. Ids run from 0 to `vocab_size` - 1, `eot` among them."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot(self) -> int | None:
        """The id that ends a document; None for an alphabet of text without documents, laid end to end as it is.

        `encode` never yields it, even for text that spells it out.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides which ids a text gets: equal digests mean interchangeable tokenizers."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether every text that is encoded comes back exactly. What is lost costs no bits: see `lossy_warning`."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n], with no end of text. Raises InputError if `text` is not valid Unicode, or has no ids."""
        ...

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        """Text of ids [n]: `eot` as <|endoftext|>, bytes that are not UTF-8 as U+FFFD. InputError for other ids."""
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Writes what `load` reads. Call it from one process only."""
        ...


def lossy_warning(tokenizer: Tokenizer) -> str | None:
    """What to tell about figures per byte under this tokenizer, if anything."""
    if tokenizer.lossless:
        return None
    return (
        "the tokenizer does not give every text back (it may lower-case, strip accents or join spaces); what it loses "
        "costs nothing, so bits per byte are lower than of a model of the text itself and do not compare"
    )


def gives_back(encode: Callable[[str], np.ndarray], decode: Callable[[np.ndarray], str]) -> bool:
    """Whether a text of all that tokenizers like to lose comes back exactly."""
    return decode(encode(_PROBE)) == _PROBE


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text with half a surrogate pair at character {error.start}: give valid UTF-8") from error


def decode_documents(
    tokenizer: Tokenizer, tokens: Iterable[SupportsIndex] | np.ndarray, decode_document: Callable[[np.ndarray], str]
) -> str:
    """`Tokenizer.decode` from a function for ids [n] that are all in the vocabulary and not `eot`."""
    ids = np.asarray(tokens, dtype=np.int64)
    unknown = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if unknown.size:
        raise InputError(f"token {unknown[0]} has no text: give ids from 0 to {tokenizer.vocab_size - 1}")
    ends = np.flatnonzero(ids == tokenizer.eot) if tokenizer.eot is not None else np.empty(0, np.int64)
    bounds = zip([0, *(ends + 1)], [*ends, len(ids)], strict=True)
    return END_OF_TEXT.join(decode_document(ids[start:end]) for start, end in bounds)


def read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the tokenizer file {path}: {error.strerror or error}; check the path") from error


def save(directory: epath.PathLike, kind: str, tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    """Writes the files, each in one move. The description comes last: where it stands, the others are whole."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = json.dumps({"kind": kind, "fingerprint": tokenizer.fingerprint}) + "\n"
    for name, content in {**files, DESCRIPTION_FILE: description.encode()}.items():
        temporary = directory / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(directory / name)
