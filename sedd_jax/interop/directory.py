"""A directory that appears whole or not at all."""

import contextlib
from collections.abc import Iterator

from etils import epath

from sedd_jax.errors import InputError


def check_free(path: epath.PathLike) -> epath.Path:
    """Raises InputError if something is at `path` already, unless it is an empty directory."""
    path = epath.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already and not an empty directory; name a new one, or remove it")
    return path


@contextlib.contextmanager
def written_whole(path: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a temporary directory beside `path`, which takes its name at the end, and vanishes after an error.

    Raises InputError as `check_free` does, or if nothing can be written there.
    """
    path = check_free(path)
    temporary = path.parent / f".{path.name}.new"
    try:
        # Of an earlier attempt that was killed.
        temporary.rmtree(missing_ok=True)
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
