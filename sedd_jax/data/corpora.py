"""Corpora as documents: where they are read from, and how they are divided for training and validation."""

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

from sedd_jax.data import files, libraries
from sedd_jax.errors import InputError, explained

SPLITS = ("train", "valid")
EMBEDDED = "embedded"
TEXT8 = "text8:"
_TEXT8_SIZE = 100_000_000
_TEXT8_SPLITS = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, _TEXT8_SIZE)}

# A part of a source, which any process can read on its own.
Part = Callable[[], Iterator[str]]


def read(
    source: str = EMBEDDED, *, valid_fraction: float = 0.1, text_field: str = "text", separator: str | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The `documents` of a corpus for training and for validation; neither part is empty.

    valid_fraction: the share of the characters for validation, taken from the end. The document at the cut is divided,
        so the share holds for one large file and for many documents.
    Raises InputError as `documents` does, or if the text cannot be divided so.
    """
    texts = documents(source, text_field=text_field, separator=separator)
    pieces = list(divide([lambda: iter(texts)], cut_of(sum(map(len, texts)), valid_fraction)))
    train, valid = (tuple(text for place, text in pieces if place[0] == split) for split in SPLITS)
    return train, valid


def documents(source: str, *, text_field: str = "text", separator: str | None = None) -> tuple[str, ...]:
    """Reads all documents of a source but the empty ones.

    source: "embedded", the path or glob of local files, `tfds:NAME@SPLIT`, `hf:PATH@SPLIT` or `text8:PATH@SPLIT`; see
        docs/data.md.
    text_field: the field of a record that holds its text; null is no text. If empty, files of JSON are text.
    separator: divides the text of other files, wherever it stands. A line end on either side of it is part of it.
    Raises InputError, which names the file, the line or byte in it, and the remedy.
    """
    every = parts(source, text_field=text_field, separator=separator)
    found = tuple(text for part in every for text in part() if text)
    if not found:
        raise InputError(f"data source {source!r} holds no text: give files that are not empty")
    return found


def parts(source: str, *, text_field: str = "text", separator: str | None = None, size: int = 1 << 26) -> list[Part]:
    """A source of `documents` in parts of about `size` bytes, each of which yields one document at a time. The division
    depends only on the source and `size`; a file is never divided. Documents may be empty. Raises InputError as
    `documents` does, sometimes only when a part is read."""
    if source == EMBEDDED:
        return [_embedded]
    if source.startswith(TEXT8):
        return [lambda: iter([read_text8(source)])]
    if source.startswith((libraries.TFDS, libraries.HUGGING_FACE)):
        return libraries.parts(source, text_field=text_field, size=size)
    if separator == "":
        raise InputError("separator='': give what stands between documents, such as '<|endoftext|>', or leave it out")
    return files.parts(source, text_field=text_field, separator=separator, size=size)


def cut_of(size: int, valid_fraction: float) -> int:
    """How many of `size` characters are for training. Raises InputError if either part would be empty."""
    if not 0 < valid_fraction < 1:
        raise InputError(f"valid_fraction={valid_fraction}: give a fraction between 0 and 1, or a valid_source")
    cut = size - round(size * valid_fraction)
    if not 0 < cut < size:
        raise InputError(f"valid_fraction={valid_fraction} of {size} characters leaves a part empty: give more text")
    return cut


def divide(parts: Iterable[Part], cut: int) -> Iterator[tuple[tuple[str, int], str]]:
    """((split, number of the part), text) of each document that is not empty. The first `cut` characters are for
    training."""
    start = 0
    for number, part in enumerate(parts):
        for text in part():
            inside = max(cut - start, 0)
            start += len(text)
            for split, piece in zip(SPLITS, (text[:inside], text[inside:]), strict=True):
                if piece:
                    yield (split, number), piece


def _embedded() -> Iterator[str]:
    from pydoc_data.topics import topics  # here, since half a megabyte is slow to import

    yield from topics.values()


def read_text8(source: str) -> str:
    """The characters of `text8:PATH@SPLIT`, PATH being the file of mattmahoney.net/dc/text8.zip: by custom 90 million
    to train, 5 to validate and 5 to test. Raises InputError for another or incomplete file, or another split."""
    name, _, split = source.removeprefix(TEXT8).rpartition("@")
    if not name or split not in _TEXT8_SPLITS:
        raise InputError(f"data source {source!r}: give {TEXT8}PATH@SPLIT, SPLIT one of {', '.join(_TEXT8_SPLITS)}")
    path = pathlib.Path(os.path.expanduser(name))
    remedy = "unpack mattmahoney.net/dc/text8.zip there"
    with explained(f"cannot read {path}", remedy, OSError):
        if (size := path.stat().st_size) != _TEXT8_SIZE:
            raise InputError(f"{path} has {size} bytes, and text8 has {_TEXT8_SIZE}: {remedy}")
        with explained(f"{path} is not text8", remedy, UnicodeDecodeError):
            return path.read_bytes().decode("ascii")[slice(*_TEXT8_SPLITS[split])]
