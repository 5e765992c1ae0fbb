"""A disk that fills up, and damage to the files of a run: one line, and what was saved stays."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from running import saved_states, train_here, write_text

from sedd_jax import cli

STEPS = {"train__eval_every": 2, "train__sample_every": 2, "train__steps": 4, "train__checkpoint_every": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_here(folder / "run", data__source=str(write_text(folder / "text.txt")), **STEPS)
    return folder


def train_again(trained: Path, workdir: Path) -> tuple[str, int | None]:
    """(line, exit code) of the command; code 0 if it is done."""
    try:
        train_here(workdir, data__source=str(trained / "text.txt"), **STEPS)
        return "", 0
    except Exception as error:
        return cli.verdict(error)


def damage(path: Path, kind: str) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "link loop":
        path.symlink_to(path)
    else:
        path.write_bytes(b"" if kind == "emptied" else b"\xff\x00{")


DAMAGES = ("directory", "link loop", "emptied", "garbage")
# Exit codes by damage. What a run only writes is replaced; what it needs is never guessed.
EXPECTED = {
    "data.json": (2, 2, 2, 2),
    "config.json": (2, 2, 2, 2),
    "tokenizer.json": (2, 0, 0, 0),  # this kind has no file of its own, and data.json has its fingerprint
    "metrics.jsonl": (2, 0, 0, 0),
    "loss.png": (2, 0, 0, 0),
    "tensorboard": (0, 2, 2, 2),
    "samples": (0, 2, 2, 2),
    "samples/4.txt": (0, 0, 0, 0),
}


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(EXPECTED, DAMAGES)])
def test_damaged_file_is_one_line_or_replaced(trained, tmp_path, name, kind):
    workdir = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    damage(workdir / name, kind)
    line, code = train_again(trained, workdir)
    assert code == EXPECTED[name][DAMAGES.index(kind)]
    assert "\n" not in line and (code == 0 or str(workdir / name) in line)
    assert saved_states(workdir) == saved_states(trained / "run")


@pytest.mark.parametrize("kind", ["directory", "link loop", "emptied"])
def test_checkpoint_that_is_passed_over_is_said(trained, tmp_path, capsys, kind):
    workdir = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    damage(workdir / "checkpoints" / "4", kind)
    assert train_again(trained, workdir) == ("", 0)
    assert "checkpoint 4 is damaged" in capsys.readouterr().err
    assert saved_states(workdir) == saved_states(trained / "run")
    assert (workdir / "samples" / "4.txt").read_text() == (trained / "run" / "samples" / "4.txt").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.parametrize("size", ["32k", "600k", "900k"])
def test_full_disk(trained, tmp_path, size):
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        line, code = train_again(trained, disk / "run")
        assert code == 1 and str(disk) in line and "\n" not in line
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert train_again(trained, disk / "run") == ("", 0)
        assert saved_states(disk / "run") == saved_states(trained / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
