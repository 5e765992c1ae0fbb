"""Files and directories that appear whole or not at all."""

import contextlib
import json
import os
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from etils import epath

from sedd_jax.errors import InputError

# Of buckets; see `epath`.
SCHEMES = ("gs", "s3", "az", "hf")
# Of names and paths in bytes, with room for what we append to them.
_LONGEST_NAME, _LONGEST_PATH = 240, 3500


def typed_path(text: str) -> str:
    """A path as people type it: `~` is the home, file:///x is /x, and slashes at the end do not count.

    Raises InputError for an empty one, an unknown scheme, a user's home that is not there, and one that is too long.
    """
    scheme, found, rest = text.partition("://")
    if found and scheme in SCHEMES:
        return text.rstrip("/")
    if found and scheme != "file" and re.fullmatch(r"[\w+.-]+", scheme):
        raise InputError(f"{text}: the scheme {scheme}:// is unknown; give a path here, or {'://, '.join(SCHEMES)}://")
    path = os.path.expanduser(urllib.parse.unquote(rest) if found and scheme == "file" else text)
    if not path or "\0" in path:
        raise InputError(f"{text!r} is no path")
    if path.startswith("~"):
        raise InputError(f"{text}: there is no such home; for a name that begins with ~ give ./{path}")
    encoded = os.fsencode(path)
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise InputError(f"{text} is too long for a path, or a name in it (more than {_LONGEST_NAME} bytes)")
    return path.rstrip("/") or "/"


def check_writable(path: str) -> str:
    """Raises InputError if no file can be written at `path`, on a local disk."""
    folder = os.path.dirname(path) or "."
    if path.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        return path
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise InputError("cannot be written; give a file in a folder that is there")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise InputError("cannot be written: permission denied; give another place")
    return path


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """Replaces the file in one move, so that a reader or a killed run never sees half of it. A device or a pipe, such
    as /dev/stdout, is written to."""
    path = epath.Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    temporary = path.parent / f".{path.name}.new"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def read_json(path: epath.PathLike, *, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, which ends with the remedy, if the file does not hold one."""
    path = epath.Path(path)
    try:
        return dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); {remedy}") from error


def make_directory(path: epath.PathLike, flag: str) -> epath.Path:
    """Makes the directory of a flag, with its parents. Raises InputError if that fails."""
    path = epath.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--{flag}={path} cannot be made a directory: {error.strerror}") from error
    return path


def check_free(path: epath.PathLike) -> epath.Path:
    """Raises InputError if something is at `path` already, unless it is an empty directory."""
    path = epath.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already and not an empty directory; name a new one, or remove it")
    return path


@contextlib.contextmanager
def new_directory(path: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a temporary directory beside `path`, which takes its name at the end, and vanishes after an error.

    Raises InputError as `check_free` does, or if nothing can be written there.
    """
    path = check_free(path)
    temporary = path.parent / f".{path.name}.new"
    try:
        temporary.rmtree(missing_ok=True)  # left by an earlier attempt that was killed
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; name another place") from error
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
    try:
        yield figure, axes
        with epath.Path(path).open("wb") as file:
            figure.savefig(file, format="png", dpi=dpi)
    finally:
        pyplot.close(figure)
