"""The customary division of text8: of its 100 million characters 90 to train, 5 to validate and 5 to test."""

import os
import pathlib

from sedd_jax.errors import InputError

PREFIX = "text8:"
_SIZE = 100_000_000
_SPLITS = {"train": slice(0, 90_000_000), "valid": slice(90_000_000, 95_000_000), "test": slice(95_000_000, _SIZE)}


def read(source: str) -> str:
    """The characters of `text8:PATH@SPLIT`, PATH being the file of mattmahoney.net/dc/text8.zip.

    Raises InputError for another file, a part of it (which would be divided elsewhere), or another split.
    """
    name, _, split = source.removeprefix(PREFIX).rpartition("@")
    if not name or split not in _SPLITS:
        raise InputError(f"data source {source!r}: give {PREFIX}PATH@SPLIT, SPLIT one of {', '.join(_SPLITS)}")
    path = pathlib.Path(os.path.expanduser(name))
    try:
        size = path.stat().st_size
        text = path.read_bytes().decode("ascii") if size == _SIZE else ""
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; unpack mattmahoney.net/dc/text8.zip there") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text8: it is not ASCII at byte {error.start}") from error
    if size != _SIZE:
        raise InputError(
            f"{path} has {size} bytes, and text8 has {_SIZE}: get the whole of mattmahoney.net/dc/text8.zip"
        )
    return text[_SPLITS[split]]
