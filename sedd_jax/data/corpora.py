"""Text as documents: where it is read from, and how it is divided for training and validation."""

import dataclasses
from collections.abc import Callable, Iterator

from sedd_jax.data import files, libraries, text8
from sedd_jax.errors import InputError

EMBEDDED = "embedded"

# A part of a source, which any process can read by itself.
Part = Callable[[], Iterator[str]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in reading order; none is empty, and neither part is."""

    train: tuple[str, ...]
    valid: tuple[str, ...]


def read(
    source: str = EMBEDDED,
    *,
    valid_source: str | None = None,
    valid_fraction: float = 0.1,
    text_field: str = "text",
) -> Corpus:
    """Reads a corpus and divides it.

    Args:
      source: what `documents` reads.
      valid_source: validation text, read whole; None divides `source` itself.
      valid_fraction: without a `valid_source`, the share of the characters, taken from the end of the corpus. The
        document in which the cut falls is divided there, so the share holds for one large file as for many documents.
      text_field: the field of a record that holds its text.

    Raises:
      InputError: a source cannot be read, holds no text, or cannot be divided as asked.
    """
    whole = documents(source, text_field=text_field)
    if valid_source is not None:
        return Corpus(train=whole, valid=documents(valid_source, text_field=text_field))
    halves = list(divide(iter(whole), cut_of(sum(map(len, whole)), valid_fraction)))
    return Corpus(
        train=tuple(train for train, _ in halves if train), valid=tuple(valid for _, valid in halves if valid)
    )


def documents(source: str, *, text_field: str = "text") -> tuple[str, ...]:
    """Reads one source whole, without its empty documents.

    Args:
      source: one of
        * "embedded", the language reference that ships with Python (0.5 MB of English and code, which needs no network
          and changes a little with each minor version of Python);
        * the path, or the glob (`**` descends), of local UTF-8 files, read in sorted order. A line of a `.jsonl` file
          and a row of a `.parquet` file is a document, any other file one document; `.gz` or `.zst` may come last;
        * `tfds:NAME`, a TFDS data set that has been built as array_record, found in TFDS_DATA_DIR (by default
          ~/tensorflow_datasets); or by its folder, `tfds:/data/lm1b/1.1.0`. `tfds:NAME@SPLIT` is another split than
          train, or a part of one, `train[:10%]`;
        * `hf:PATH`, a folder that `save_to_disk` of Hugging Face datasets wrote, and `hf:PATH@SPLIT`;
        * `text8:PATH@SPLIT`, see `text8.read`.
      text_field: the field of a record that holds its text.

    Raises:
      InputError: names the file, the line or byte in it, and what would help.
    """
    found = tuple(text for part in parts(source, text_field=text_field) for text in part() if text)
    if not found:
        raise InputError(f"data source {source!r} holds no text: give files that are not empty")
    return found


def parts(source: str, *, text_field: str = "text", size: int = 1 << 26) -> list[Part]:
    """What `documents` reads, in parts of about `size` bytes that are read one document at a time.

    Which parts there are depends on the source and `size` alone; a file is never divided. Documents may be empty.
    Raises InputError as `documents` does, some of it only when a part is read.
    """
    if source == EMBEDDED:
        return [_embedded]
    if source.startswith(text8.PREFIX):
        return [lambda: iter([text8.read(source)])]
    library = source.startswith((libraries.TFDS, libraries.HUGGING_FACE))
    return (libraries if library else files).parts(source, text_field=text_field, size=size)


def cut_of(size: int, valid_fraction: float) -> int:
    """How many of `size` characters are for training. Raises InputError if either part would be empty."""
    if not 0 < valid_fraction < 1:
        raise InputError(f"valid_fraction={valid_fraction}: give a fraction between 0 and 1, or a valid_source")
    cut = size - round(size * valid_fraction)
    if not 0 < cut < size:
        raise InputError(f"valid_fraction={valid_fraction} of {size} characters leaves a part empty: give more text")
    return cut


def divide(documents: Iterator[str], cut: int) -> Iterator[tuple[str, str]]:
    """Of each document what lies before character `cut` of them all, and the rest."""
    start = 0
    for text in documents:
        inside = min(max(cut - start, 0), len(text))
        yield text[:inside], text[inside:]
        start += len(text)


def _embedded() -> Iterator[str]:
    from pydoc_data.topics import topics  # here, since half a megabyte is slow to import for those who need none

    yield from topics.values()
