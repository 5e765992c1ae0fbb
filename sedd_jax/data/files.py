"""Documents of local files: text, JSON lines, both also compressed, and Parquet, known by their first bytes."""

import contextlib
import functools
import glob
import io
import json
import lzma
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from sedd_jax.devices import processes
from sedd_jax.errors import InputError, explained, utf8

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_ENDINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
# (offset, bytes there, what it is) of files that are not text, though some of them are UTF-8.
_OTHERS = (
    (0, b"PK\3\4", "a zip archive: unpack it"),
    (257, b"ustar", "a tar archive: unpack it"),
    (0, b"version https://git-lfs", "a pointer of Git LFS: run `git lfs pull`"),
    (0, (b"\xff\xfe", b"\xfe\xff"), "UTF-16: convert it, with `iconv -f UTF-16 -t UTF-8`"),
)
# How an object begins, or an array of objects or of strings: no prose does, not even ["Stop," he said].
_JSON = re.compile(
    rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*\}\s*)*(?:\{\s*"|\[\s*(?:\{\s*["}]|"(?:[^"\\\n]|\\.)*(?:"\s*[,\]]|\Z)))'
)
# Text shrinks to a tenth or a thirtieth. What expands more than this, beyond some bytes, is no text, or a bomb.
_EXPANSION, _FREE = 100, 1 << 26
_say_once = functools.cache(processes.say)


def find(source: str) -> list[pathlib.Path]:
    """The files that match a path or a glob (`**` descends), sorted. Raises InputError if there are none."""
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise InputError(f"data source {source!r} is a directory: give a file or a glob ({source.rstrip('/')}/*.txt)")
    # Try the literal name first: brackets are legal in file names.
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [pathlib.Path(name) for name in names if not os.path.isdir(name)]
    if not paths:
        raise InputError(f"data source {source!r} matches no file: give 'embedded', or a path or quoted glob of a disk")
    return paths


def parts(source: str, *, text_field: str, separator: str | None, size: int) -> list[functools.partial[Iterator[str]]]:
    """Groups of neighbouring files of at least `size` bytes together, each as a function that reads its documents."""
    groups, room = [], 0
    for path in find(source):
        with _explained(path):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is a pipe or a device, which cannot be read twice: write it to a file first")
        # A file of no bytes is not opened: those of /proc have none, and some of them never end.
        if status.st_size or path.suffix in (".parquet", *_ENDINGS):
            if room <= 0:
                groups.append([])
                room = size
            groups[-1].append(path)
            room -= status.st_size
    return [functools.partial(_read, paths, text_field, separator) for paths in groups]


def check_text(text: object, text_field: str, *, where: str) -> str:
    """`text`; null is none. Raises InputError if it is not a string, or has no UTF-8 form."""
    if not isinstance(text, str | None):
        raise InputError(f"{where}: field {text_field!r} is a {type(text).__name__}, not a string; set text_field")
    utf8(text or "", where)
    return text or ""


def check_field(text_field: str, fields: list[str], *, where: str) -> None:
    if text_field not in fields:
        raise InputError(f"{where}: no field {text_field!r}; set text_field to one of {', '.join(map(repr, fields))}")


def _read(paths: list[pathlib.Path], text_field: str, separator: str | None) -> Iterator[str]:
    for path in paths:
        with _explained(path), _open(path) as file:
            head = file.peek()
            if head.startswith(b"PAR1") or path.suffix == ".parquet":
                yield from _parquet(path, text_field)
                continue
            for offset, mark, remedy in _OTHERS:
                if head.startswith(mark, offset):
                    raise InputError(f"{path} is {remedy}")
            if head.count(0) > len(head) // 4:
                raise InputError(f"{path} is no text, but largely zeros: give UTF-8 (a UTF-16 file: convert it)")
            if head.startswith(b"\xef\xbb\xbf"):
                file.read(3)
            named = path.with_suffix("").suffix if path.suffix in _ENDINGS else path.suffix
            if named in (".jsonl", ".ndjson") or text_field and (named == ".json" or _JSON.match(head)):
                for where, record in _records(path, file):
                    check_field(text_field, list(record), where=where)
                    yield check_text(record[text_field], text_field, where=where)
            else:
                yield from _divide(decode(file.read(), where=str(path)), separator, where=path)


def _open(path: pathlib.Path) -> io.BufferedReader:
    with open(path, "rb") as file:
        head = file.read(8)
    marked = (name for mark, name in _COMPRESSIONS.items() if head.startswith(mark))
    compression = next(marked, _ENDINGS.get(path.suffix))
    # pyarrow reports a compressed file that ends too early; the gzip and zstandard modules do not. It knows no xz.
    read = lzma.LZMAFile if compression == "xz" else functools.partial(pyarrow.input_stream, compression=compression)
    return io.BufferedReader(_Expanding(path, read(str(path))) if compression else read(str(path)), 1 << 20)


class _Expanding(io.RawIOBase):
    """What a compressed file holds. Raises InputError once that is out of proportion to the file."""

    def __init__(self, path: pathlib.Path, stream: Any):
        self._path, self._stream = path, stream
        self._room = _FREE + _EXPANSION * path.stat().st_size

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._room -= count
        if self._room < 0:
            raise InputError(f"{self._path} expands more than {_EXPANSION}-fold, as no text does: unpack it and look")
        return count


def _divide(text: str, separator: str | None, *, where: pathlib.Path) -> Iterator[str]:
    """A text between its separators, of each of which one line end on either side is a part."""
    if separator is not None:
        yield from re.split(rf"(?:\r?\n)?{re.escape(separator)}(?:\r?\n)?", text)
        return
    if re.search(r"(?m)^<\|endoftext\|>\r?$", text):
        what = f"warning: texts in {where.parent} spell <|endoftext|> on lines of their own, which are read as letters"
        _say_once(f"{what}; to divide them there, set separator to '<|endoftext|>'")
    yield text


def _explained(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    damages = OSError, EOFError, lzma.LZMAError  # pyarrow raises OSError for what it cannot decompress, too
    return explained(f"cannot read {path}", "check the file and its permissions", *damages)


def decode(content: bytes, *, where: str) -> str:
    """UTF-8. Raises InputError, which names the byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}: convert it, with iconv for example") from error


def records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of JSON lines. Raises InputError for a line that is none."""
    for path in find(source):
        with _explained(path), _open(path) as file:
            yield from _records(path, file)


def _records(path: pathlib.Path, file: io.BufferedReader) -> Iterator[tuple[str, dict[str, Any]]]:
    remedy = "each line must be one JSON object (`jq -c` writes such lines; text_field='' reads other files as text)"
    for where, line in ((f"{path}:{number}", line) for number, line in enumerate(file, start=1) if line.strip()):
        with explained(f"{where}: invalid JSON", remedy, json.JSONDecodeError, RecursionError):
            # Python makes no number of 5,000 digits.
            record = json.loads(decode(line, where=where), parse_int=lambda digits: int(digits[:20]))
        if not isinstance(record, dict):
            raise InputError(f"{where}: a JSON {type(record).__name__}, not an object; {remedy}")
        yield where, record


def _parquet(path: pathlib.Path, text_field: str) -> Iterator[str]:
    damages = pyarrow.ArrowException, UnicodeDecodeError
    sound = explained(f"{path} is no sound Parquet file", "give a complete copy", *damages)
    with sound, pyarrow.parquet.ParquetFile(path) as table:
        check_field(text_field, table.schema_arrow.names, where=str(path))
        batches = table.iter_batches(batch_size=256, columns=[text_field])
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        for row, text in enumerate(texts, start=1):
            yield check_text(text, text_field, where=f"{path}, row {row}")
