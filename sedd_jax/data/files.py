"""Documents of local files: text, JSON lines, both also compressed, and Parquet."""

import contextlib
import functools
import glob
import io
import json
import os
import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from sedd_jax.errors import InputError, explained

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def find(source: str) -> list[pathlib.Path]:
    """The files that match a path or a glob (`**` descends), sorted. Raises InputError if there are none."""
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise InputError(f"data source {source!r} is a directory: give a file or a glob ({source.rstrip('/')}/*.txt)")
    # Try the literal name first: brackets are legal in file names.
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [pathlib.Path(name) for name in names if not os.path.isdir(name)]
    if not paths:
        raise InputError(f"data source {source!r} matches no file: give 'embedded', a path, or a glob in quotes")
    return paths


def parts(source: str, *, text_field: str, size: int) -> list[functools.partial[Iterator[str]]]:
    """Groups of neighbouring files of at least `size` bytes together, each as a function that reads its documents."""
    groups: list[list[pathlib.Path]] = []
    room = 0
    for path in find(source):
        if room <= 0:
            groups.append([])
            room = size
        groups[-1].append(path)
        with _explained(path):
            room -= path.stat().st_size
    return [functools.partial(_read, paths, text_field) for paths in groups]


def check_text(text: object, text_field: str, *, where: str) -> str:
    """`text`. Raises InputError if it is not a string, or has no UTF-8 form."""
    if not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} is a {type(text).__name__}, not a string; set text_field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start}; write both halves") from error
    return text


def check_field(text_field: str, fields: list[str], *, where: str) -> None:
    if text_field not in fields:
        raise InputError(f"{where}: no field {text_field!r}; set text_field to one of {', '.join(map(repr, fields))}")


def _read(paths: list[pathlib.Path], text_field: str) -> Iterator[str]:
    """The documents of files, whose format is the ending of their names: see `corpora.documents`.

    Raises InputError, which names the file, the line or byte in it, and the remedy.
    """
    for path in paths:
        compression = _COMPRESSION.get(path.suffix)
        kind = path.with_suffix("").suffix if compression else path.suffix
        with _explained(path):
            if kind == ".parquet" and not compression:
                yield from _parquet(path, text_field)
                continue
            # pyarrow reports a compressed file that ends too early; the gzip and zstandard modules do not.
            with io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 20) as file:
                if kind == ".jsonl":
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield _record_text(line, text_field, where=f"{path}:{number}")
                else:
                    yield decode(file.read(), where=str(path))


def _explained(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    # pyarrow raises OSError for files that it cannot decompress, too.
    return explained(f"cannot read {path}", "check the file and its permissions", OSError)


def decode(content: bytes, *, where: str) -> str:
    """UTF-8. Raises InputError, which names the byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}: convert it, with iconv for example") from error


def _record_text(line: bytes, text_field: str, *, where: str) -> str:
    remedy = "each line must be one JSON object"
    with explained(f"{where}: invalid JSON", remedy, json.JSONDecodeError):
        record = json.loads(decode(line, where=where))
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, not an object; {remedy}")
    check_field(text_field, list(record), where=where)
    return check_text(record[text_field], text_field, where=where)


def _parquet(path: pathlib.Path, text_field: str) -> Iterator[str]:
    """A row whose field is null is a document without text."""
    damages = pyarrow.ArrowException, UnicodeDecodeError
    with (
        explained(f"{path} is no sound Parquet file", "give a complete copy", *damages),
        pyarrow.parquet.ParquetFile(path) as table,
    ):
        check_field(text_field, table.schema_arrow.names, where=str(path))
        batches = table.iter_batches(batch_size=256, columns=[text_field])
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        for row, text in enumerate(texts, start=1):
            yield "" if text is None else check_text(text, text_field, where=f"{path}, row {row}")
