"""Files and directories that appear whole or not at all."""

import contextlib
import errno
import io
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Iterator
from typing import Any

import fsspec.config
from etils import epath

from sedd_jax.errors import InputError, explained

_BUCKETS = ("gs://", "s3://", "az://", "hf://")
# What a bucket lists does not stay so, since Tensorstore and other processes write; and what gcsfs raises it logs, too.
fsspec.config.conf["gcs"] = {"use_listings_cache": False}
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def typed_path(text: str) -> str:
    """A path as people type it: `~` is the home, file:///x is /x, and slashes at the end do not count. For flags.
    Raises InputError for another scheme than those of buckets, a home that is not there, and what no disk can hold."""
    path = text if text.startswith(_BUCKETS) else os.path.expanduser(text.removeprefix("file://"))
    if not path.startswith(_BUCKETS) and re.match(r"[\w+.-]+://|~", path):
        raise InputError(f"unknown scheme or home; give a path here, or one of {', '.join(_BUCKETS)}")
    # With room for what is appended to names, and for the folders inside.
    if not path or "\0" in path or len(path) > 3500 or max(map(len, os.fsencode(path).split(b"/"))) > 240:
        raise InputError("empty, or too long for a path; give another")
    return path.rstrip("/") or "/"


def output_path(text: str) -> str:
    """The path of a file to write. Raises InputError, as `typed_path` does and if it cannot be written."""
    path = typed_path(text)
    folder = os.path.dirname(path) or "."
    writable = os.path.isdir(folder) and os.access(path if os.path.exists(path) else folder, os.W_OK)
    if not path.startswith(_BUCKETS) and (os.path.isdir(path) or not writable):
        raise InputError("cannot be written; give a file in a folder that is there")
    return path


def in_bucket(path: epath.PathLike) -> bool:
    return str(path).startswith(_BUCKETS)


def system_error(error: BaseException) -> OSError | None:
    """An OSError with a number, also for whatever the client of a bucket raises; None for other errors."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ImportError) or not any(name.startswith("fsspec.") for name in names):
        return error if isinstance(error, OSError) and error.errno is not None else None
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return OSError(errno.ENOENT, f"there is no {text}")
    return OSError(errno.EACCES if re.search("^Forbidden|, 40[13]$", text) else errno.EIO, text)


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Gives an error of the system that names no file, such as that of a full disk or of a bucket, this one."""
    try:
        yield
    except Exception as error:
        if known := system_error(error):
            known.filename = known.filename or str(path)
        raise known or error from None


class Log:
    """A file that grows by complete records. Objects in a bucket do not: there it is held here, and written whole by
    `flush`, and by `append` at most once a minute and for a hundredth of the time."""

    def __init__(self, path: epath.PathLike, content: bytes = b""):
        self._path, self._content = epath.Path(path), bytearray(content)
        self._written, self._due = -1, 0.0
        self.flush()

    def append(self, record: bytes) -> None:
        if not in_bucket(self._path):
            with naming(self._path), self._path.open("ab") as file:
                file.write(record)
            return
        self._content += record
        if time.monotonic() > self._due:
            self.flush()

    def flush(self) -> None:
        """Writes what is held. A failure is not repeated: the run ends with it."""
        written, self._written, began = self._written, len(self._content), time.monotonic()
        if written < self._written:
            write_atomically(self._path, bytes(self._content))
            self._due = time.monotonic() + max(60.0, 100 * (time.monotonic() - began))


def _open_if_read(path: str, flags: int) -> int:
    """For a pipe, an error where nobody reads it: open() alone would wait without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """Replaces the file in one move, as buckets do, so that nobody ever sees half of it. Pipes and devices stay."""
    path, content = epath.Path(path), content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.new"
    with naming(path):
        if in_bucket(path):
            path.write_bytes(content)
        elif os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb", opener=_open_if_read) as file:
                file.write(content)
        else:
            try:
                temporary.write_bytes(content)
                temporary.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise


def read_json(path: epath.PathLike, *, remedy: str, absent: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, which ends with the remedy, if the file does not hold one. absent:
    whether the file may be, and {} is returned then; a link to itself is not absent."""
    fine = (FileNotFoundError, NotADirectoryError) if absent else ()
    with explained(f"{path} is damaged", remedy, TypeError, ValueError, RecursionError), contextlib.suppress(*fine):
        return dict(json.loads(epath.Path(path).read_bytes()))
    return {}


def make_folder(path: epath.Path) -> None:
    """Makes a folder with its parents, but none in a bucket, which has no folders and would itself be made."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def check_free(path: epath.PathLike) -> epath.Path:
    """Raises InputError if something is at `path` already, unless it is an empty directory."""
    path = epath.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already and not an empty directory; name a new one, or remove it")
    return path


@contextlib.contextmanager
def new_directory(path: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a temporary directory beside `path`, which takes its name at the end, and vanishes after an error. Raises
    InputError as `check_free` does, or if nothing can be written there."""
    path = check_free(path)
    temporary = path.parent / f".{path.name}.new"
    with explained(f"{path} cannot be written", "name another place", OSError):
        temporary.rmtree(missing_ok=True)  # left by an earlier attempt that was killed
        temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        temporary.rmtree(missing_ok=True)


@contextlib.contextmanager
def plot(path: epath.PathLike, *, size: tuple[float, float], dpi: int = 150) -> Iterator[tuple[Any, Any]]:
    """Gives the figure and the axes of a plot, which is written as PNG at the end."""
    import matplotlib  # here, since it is slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.grid(alpha=0.3, which="both")
    try:
        yield figure, axes
        figure.savefig(page := io.BytesIO(), format="png", dpi=dpi)
        write_atomically(path, page.getvalue())
    finally:
        pyplot.close(figure)
