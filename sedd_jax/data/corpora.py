"""Text as documents: where it is read from, and how it is divided for training and validation."""

import dataclasses
import glob
import json
import os
import pathlib
from collections.abc import Iterator

from sedd_jax.data import text8
from sedd_jax.errors import InputError

EMBEDDED = "embedded"


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
      text_field: the field of a `.jsonl` record that holds its text.

    Raises:
      InputError: a source cannot be read, holds no text, or cannot be divided as asked.
    """
    whole = documents(source, text_field=text_field)
    if valid_source is not None:
        return Corpus(train=whole, valid=documents(valid_source, text_field=text_field))
    if not 0 < valid_fraction < 1:
        raise InputError(f"valid_fraction={valid_fraction}: give a fraction between 0 and 1, or a valid_source")
    size = sum(map(len, whole))
    cut = size - round(size * valid_fraction)
    if not 0 < cut < size:
        raise InputError(f"valid_fraction={valid_fraction} of {size} characters leaves a part empty: give more text")
    return _divide(whole, cut)


def documents(source: str, *, text_field: str = "text") -> tuple[str, ...]:
    """Reads one source whole, without its empty documents.

    Args:
      source: "embedded", the language reference that ships with Python (0.5 MB of English and code, which needs no
        network and changes a little with each minor version of Python); or the path, or a glob (`**` descends), of
        local UTF-8 files, read in sorted order. A text file is one document, a line of a `.jsonl` file another.
        Or `text8:PATH@SPLIT`, see `text8.read`.
      text_field: the field of a `.jsonl` record that holds its text.

    Raises:
      InputError: names the file, the line or byte in it, and what would help.
    """
    if source == EMBEDDED:
        from pydoc_data.topics import topics  # here, since half a megabyte is slow to import for those who need none

        texts = list(topics.values())
    elif source.startswith(text8.PREFIX):
        texts = [text8.read(source)]
    else:
        texts = [text for path in _files(source) for text in _texts(path, text_field)]
    found = tuple(text for text in texts if text)
    if not found:
        raise InputError(f"data source {source!r} holds no text: give files that are not empty")
    return found


def _divide(whole: tuple[str, ...], cut: int) -> Corpus:
    train, valid, start = [], [], 0
    for text in whole:
        inside = min(max(cut - start, 0), len(text))
        train.append(text[:inside])
        valid.append(text[inside:])
        start += len(text)
    return Corpus(train=tuple(filter(None, train)), valid=tuple(filter(None, valid)))


def _files(source: str) -> list[pathlib.Path]:
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise InputError(f"data source {source!r} is a directory: give a file or a glob ({source.rstrip('/')}/*.txt)")
    # A name is tried as it stands first, because brackets are legal in file names.
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [pathlib.Path(name) for name in names if not os.path.isdir(name)]
    if not paths:
        raise InputError(f"data source {source!r} matches no file: give {EMBEDDED!r}, a path, or a glob in quotes")
    return paths


def _texts(path: pathlib.Path, text_field: str) -> Iterator[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: convert it, with iconv for example") from error
    if path.suffix != ".jsonl":
        yield text
        return
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record_text(line, text_field, where=f"{path}:{number}")


def _record_text(line: str, text_field: str, *, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: invalid JSON ({error.msg}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, not an object; each line must be one JSON object")
    if text_field not in record:
        raise InputError(f"{where}: no field {text_field!r}; set text_field to one of {', '.join(map(repr, record))}")
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} is a {type(text).__name__}, not a string; set text_field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start}; write the pair whole") from error
    return text
