"""Corpora as documents: where they are read from, and how they are divided for training and validation."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sedd_jax.data import files
from sedd_jax.errors import InputError, explained

SPLITS = ("train", "valid")
EMBEDDED, TFDS, HUGGING_FACE = "embedded", "tfds:", "hf:"
TEXT8 = "text8:"
_TEXT8_SIZE = 100_000_000
_TEXT8_SPLITS = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, _TEXT8_SIZE)}

Part = Callable[[], Iterator[str]]  # a part of a source, which any process can read on its own


def read(
    source: str = EMBEDDED, *, valid_fraction: float = 0.1, text_field: str = "text", separator: str | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The `documents` of a corpus for training and for validation; neither part is empty. valid_fraction: the share of
    the characters for validation, taken from the end. The document at the cut is divided, so the share holds for one
    large file and for many documents. Raises InputError as `documents` does, or if the text cannot be divided so."""
    texts = documents(source, text_field=text_field, separator=separator)
    pieces = list(divide([lambda: iter(texts)], cut_of(sum(map(len, texts)), valid_fraction)))
    return tuple(tuple(text for place, text in pieces if place[0] == split) for split in SPLITS)


def documents(source: str, *, text_field: str = "text", separator: str | None = None) -> tuple[str, ...]:
    """Reads all documents of a source but the empty ones. source: "embedded", the path or glob of local files,
    `tfds:NAME@SPLIT`, `hf:PATH@SPLIT` or `text8:PATH@SPLIT`; see docs/data.md. text_field: the field of a record that
    holds its text; null is no text. If empty, files of JSON are text. separator: divides the text of other files,
    wherever it stands, with a line end on either side. Raises InputError, which names the file and line or byte."""
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
        from pydoc_data.topics import topics  # here, since half a megabyte is slow to import

        return [lambda: iter(topics.values())]
    if source.startswith(TEXT8):
        return [lambda: iter([read_text8(source)])]
    if source.startswith((TFDS, HUGGING_FACE)):
        # Both libraries read by random access, so that processes can read different ranges, and without TensorFlow.
        examples, num_bytes = _open(source, text_field)
        step = max(1, round(size * len(examples) / max(num_bytes, 1)))
        starts = range(0, len(examples), step)
        return [functools.partial(_range, source, text_field, start, start + step) for start in starts]
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
    """((split, number of the part), text) of each document but empty ones; the first `cut` characters are to train."""
    start = 0
    for number, part in enumerate(parts):
        for text in part():
            inside = max(cut - start, 0)
            start += len(text)
            for split, piece in zip(SPLITS, (text[:inside], text[inside:]), strict=True):
                if piece:
                    yield (split, number), piece


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


def _range(source: str, text_field: str, start: int, stop: int) -> Iterator[str]:
    examples, _ = _open(source, text_field)
    for index in range(start, min(stop, len(examples))):
        where = f"{source}, example {index}"
        text = examples[index][text_field]
        text = files.decode(text, where=where) if isinstance(text, bytes) else text
        yield files.check_text(text, text_field, where=where)


@functools.lru_cache(maxsize=4)
def _open(source: str, text_field: str) -> tuple[Any, int]:
    """The examples, a sequence of mappings from fields to values, and about how many bytes they take."""
    kind, _, name = source.partition(":")
    name, _, split = name.partition("@")
    if not name:
        raise InputError(f"data source {source!r} has no name: give {kind}:NAME or {kind}:NAME@SPLIT")
    opened = _open_tfds if f"{kind}:" == TFDS else _open_hugging_face
    examples, fields, num_bytes = opened(source, name, split or "train")
    files.check_field(text_field, fields, where=source)
    return examples, num_bytes


def _open_tfds(source: str, name: str, split: str) -> tuple[Any, list[str], int]:
    import tensorflow_datasets as tfds  # here, since it takes seconds to import

    with explained(f"data source {source!r} is no TFDS data set", "check the name", ValueError, OSError, ImportError):
        if name.startswith(("/", ".", "~")) or "://" in name:
            builder = tfds.builder_from_directory(os.path.expanduser(name))
        else:
            builder = tfds.builder(name)
    if not builder.is_prepared():
        remedy = f"build it with `tfds build {name} --file_format=array_record`, or set TFDS_DATA_DIR to where it is"
        raise InputError(f"data source {source!r} is not in {builder.data_dir}: {remedy}")
    splits = f"its splits are {', '.join(builder.info.splits)}"
    with (
        explained(f"data source {source!r}", splits, ValueError, AssertionError, OSError),
        explained(f"data source {source!r}", "build it with --file_format=array_record", NotImplementedError),
    ):
        examples = builder.as_data_source(split=split)
    total = sum(info.num_examples for info in builder.info.splits.values())
    return examples, list(builder.info.features), int(builder.info.dataset_size) * len(examples) // max(total, 1)


def _open_hugging_face(source: str, path: str, split: str) -> tuple[Any, list[str], int]:
    with explained(f"data source {source!r} needs the extra 'hf'", "pip install 'sedd_jax[hf]'", ImportError):
        import datasets

    problem = f"data source {source!r} is no folder that datasets' save_to_disk wrote"
    # ValueError, KeyError: JSON files beside the data that are not what they should be.
    with explained(problem, "check the path", OSError, ValueError, KeyError):
        found = datasets.load_from_disk(os.path.expanduser(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"data source {source!r} has no split {split!r}: give hf:PATH@ one of {[*found]}")
        found = found[split]
    elif split != "train":
        raise InputError(f"data source {source!r} has one part and no splits: leave out @{split}")
    return found, found.column_names, found.data.nbytes
