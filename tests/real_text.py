"""Published files that are too large, or not ours, to be part of the project: tests that need one skip without it."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(
    os.environ.get("SEDD_JAX_TEST_DATA") or pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
)


def find(name: str) -> pathlib.Path:
    """The path of a file, or the test is skipped."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no {name} in {FOLDER}: set SEDD_JAX_TEST_DATA to a folder that has it")
    return path
