"""Documents of local files: text, JSON lines, either of them compressed, and Parquet."""

import contextlib
import functools
import glob
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import pyarrow
import pyarrow.parquet

from sedd_jax.errors import InputError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def find(source: str) -> list[pathlib.Path]:
    """The files that a path or a glob (`**` descends) names, sorted. Raises InputError if there are none."""
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise InputError(f"data source {source!r} is a directory: give a file or a glob ({source.rstrip('/')}/*.txt)")
    # A name is tried as it stands first, because brackets are legal in file names.
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [pathlib.Path(name) for name in names if not os.path.isdir(name)]
    if not paths:
        raise InputError(f"data source {source!r} matches no file: give 'embedded', a path, or a glob in quotes")
    return paths


def parts(source: str, *, text_field: str, size: int) -> list[Callable[[], Iterator[str]]]:
    """Runs of neighbouring files of at least `size` bytes together, each as a function that reads its documents."""
    runs: list[list[pathlib.Path]] = []
    room = 0
    for path in find(source):
        if room <= 0:
            runs.append([])
            room = size
        runs[-1].append(path)
        with _explained(path):
            room -= path.stat().st_size
    return [functools.partial(_read_all, paths, text_field) for paths in runs]


def read(path: pathlib.Path, text_field: str) -> Iterator[str]:
    """The documents of one file, by the ending of its name: see `corpora.documents`.

    Raises InputError: names the file, the line or byte in it, and what would help.
    """
    compression = _COMPRESSION.get(path.suffix)
    kind = path.with_suffix("").suffix if compression else path.suffix
    with _explained(path):
        if kind == ".parquet" and not compression:
            yield from _columns(path, text_field)
        elif kind == ".jsonl":
            with _open(path, compression) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _record_text(line, text_field, where=f"{path}:{number}")
        else:
            yield _decode(_open(path, compression).read() if compression else path.read_bytes(), where=str(path))


def check_text(text: object, text_field: str, *, where: str) -> str:
    """`text`, or an InputError if it is no string, or one that has no UTF-8 form."""
    if not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} is a {type(text).__name__}, not a string; set text_field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start}; write the pair whole") from error
    return text


def _read_all(paths: list[pathlib.Path], text_field: str) -> Iterator[str]:
    for path in paths:
        yield from read(path, text_field)


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # pyarrow's too, of what cannot be decompressed
        reason = " ".join((error.strerror or str(error)).split())
        raise InputError(f"cannot read {path}: {reason}; check the file and its permissions") from error


def _open(path: pathlib.Path, compression: str | None) -> io.BufferedReader:
    # Unlike the readers of gzip and zstandard themselves, pyarrow tells of a compressed file that ends too early.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 20)


def _decode(content: bytes, *, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}: convert it, with iconv for example") from error


def _record_text(line: bytes, text_field: str, *, where: str) -> str:
    try:
        record = json.loads(_decode(line, where=where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: invalid JSON ({error.msg}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, not an object; each line must be one JSON object")
    if text_field not in record:
        raise InputError(f"{where}: no field {text_field!r}; set text_field to one of {', '.join(map(repr, record))}")
    return check_text(record[text_field], text_field, where=where)


def _columns(path: pathlib.Path, text_field: str) -> Iterator[str]:
    """Rows of a Parquet file in which the field is null are documents without text."""
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise InputError(
                    f"{path}: no field {text_field!r}; set text_field to one of {', '.join(map(repr, names))}"
                )
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield "" if text is None else check_text(text, text_field, where=f"{path}, row {row}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no sound Parquet file ({reason}): give a whole copy") from error
