"""A run that is stopped, killed or damaged and then resumed ends as an uninterrupted one, bit for bit."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from running import arguments, losses, make_config, metrics, run, saved_states, start, train_here, write_text

import sedd_jax.training.loop as loop
from sedd_jax.errors import TrainingError
from sedd_jax.training.checkpoint import Checkpoints
from sedd_jax.training.experiment import make_experiment

STEPS = 4
EVERY_STEP = {"train__checkpoint_every": 1, "train__eval_every": 2, "train__sample_every": 3}
QUIET = {"train__eval_every": 0, "train__sample_every": 0}
KINDS = {
    "plain": {"model__dropout": 0.0},
    "dropout, microbatches, sharded": {
        "model__dropout": 0.3,
        "train__microbatches": 2,
        "mesh__data": 2,
        "mesh__fsdp": 2,
        "mesh__tensor": 2,
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return {"data__source": str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))}


@pytest.fixture(scope="module", params=KINDS)
def straight(request, tmp_path_factory, source):
    """(workdir, config fields) of a run with no interruption."""
    fields = source | EVERY_STEP | KINDS[request.param]
    workdir = tmp_path_factory.mktemp("straight")
    train_here(workdir, train__steps=STEPS, **fields)
    return workdir, fields


def timeless(workdir: Path) -> list[dict]:
    """The metrics, but for how fast it went."""
    speed = ("tokens_per_second", "mfu", "mfu_full")
    return [{name: value for name, value in line.items() if name not in speed} for line in metrics(workdir)]


def sample_files(workdir: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (workdir / "samples").iterdir()}


def require_same(workdir: Path, expected: Path) -> None:
    assert saved_states(workdir) == saved_states(expected)
    assert timeless(workdir) == timeless(expected)
    assert sample_files(workdir) == sample_files(expected)


def test_resumed_after_every_step_is_uninterrupted(straight, tmp_path):
    expected, fields = straight
    assert saved_states(expected).keys() == set(range(1, STEPS + 1))
    for steps in range(1, STEPS + 1):
        train_here(tmp_path, **fields | QUIET | {"train__steps": steps})
        assert saved_states(tmp_path)[steps] == saved_states(expected)[steps]
    assert saved_states(tmp_path) == saved_states(expected)
    assert losses(tmp_path) == losses(expected)


@pytest.mark.parametrize("straight", ["dropout, microbatches, sharded"], indirect=True)
@pytest.mark.parametrize("moment", ["_write_log", "_evaluate", "_sample"])
def test_stop_signal_between_two_steps(straight, tmp_path, monkeypatch, moment):
    """The step that the message names is saved, and what was due there is done later, once."""
    expected, fields = straight
    fields = fields | {"train__checkpoint_every": 100}
    do = getattr(loop.Loop, moment)

    def stop_and_do(self):
        patch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        do(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, moment, stop_and_do)
        with pytest.raises(TrainingError, match="stopped by SIGTERM after step") as stop:
            train_here(tmp_path, train__steps=STEPS, **fields)
    (step,) = map(int, re.findall(r"after step (\d+);", str(stop.value)))
    assert saved_states(tmp_path) == {step: saved_states(expected)[step]}
    train_here(tmp_path, train__steps=STEPS, **fields)
    assert saved_states(tmp_path)[STEPS] == saved_states(expected)[STEPS]
    assert timeless(tmp_path) == timeless(expected)
    assert sample_files(tmp_path) == sample_files(expected)


@pytest.mark.parametrize("straight", ["plain"], indirect=True)
@pytest.mark.parametrize("damage", ["cut short", "emptied", "altered"])
def test_newest_checkpoint_damaged(straight, tmp_path, capsys, damage):
    expected, fields = straight
    shutil.copytree(expected, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / str(STEPS)
    for path in sorted(folder.rglob("d/*")):
        content = path.read_bytes()
        middle = len(content) // 2
        altered = content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 4]) + content[middle + 4 :]
        path.write_bytes({"cut short": content[:middle], "emptied": b"", "altered": altered}[damage])
    train_here(tmp_path / "run", train__steps=STEPS, **fields)
    printed = capsys.readouterr().err
    assert f"checkpoint {STEPS} is damaged" in printed
    assert f"resuming after step {STEPS - 1}" in printed
    require_same(tmp_path / "run", expected)


def test_every_function_is_compiled_once(source, tmp_path, monkeypatch):
    """Steps, evaluations of several batches, samples and a restored state alternate."""
    runs = []
    do = loop.Loop.run
    monkeypatch.setattr(loop.Loop, "run", lambda self, signals: (runs.append(self), do(self, signals))[1])
    fields = source | {
        "train__eval_every": 1,
        "train__sample_every": 1,
        "eval__num_sequences": 5,
        "eval__batch_size": 2,
    }
    for steps in (3, 6):
        train_here(tmp_path, train__steps=steps, **fields)
        functions = (runs[-1].train_step, runs[-1].bound, runs[-1].sample)
        assert [function._cache_size() for function in functions] == [1, 1, 1]


def test_microbatches_may_change_at_a_resumption(source, tmp_path):
    fields = source | QUIET | {"model__dropout": 0.3, "mesh__data": 2, "mesh__fsdp": 4, "train__batch_size": 16}
    train_here(tmp_path / "straight", train__steps=4, **fields)
    for steps, microbatches in ((2, 2), (4, 1)):
        train_here(tmp_path / "resumed", train__steps=steps, train__microbatches=microbatches, **fields)
    np.testing.assert_allclose(losses(tmp_path / "resumed"), losses(tmp_path / "straight"), rtol=1e-4)


def test_loss_that_is_not_finite_ends_the_run(source, tmp_path):
    argv = arguments(tmp_path / "run", optim__lr=1e30, train__checkpoint_every=1, **source, **QUIET)
    out, err = run("train", *argv, expect=1)
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    failed, saved = map(int, re.findall(r"step (\d+)", line))
    assert err.splitlines()[-1] == line and re.search("loss is (nan|inf)", line)
    assert failed == saved + 1 and saved_states(tmp_path / "run").keys() == set(range(1, failed))
    config = make_config(**source)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(make_experiment(config, vocab_size=257).abstract_state(), log=pytest.fail)
    assert restored.step == saved
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state))


def wait_for_steps(workdir: Path, steps: int, process: subprocess.Popen) -> None:
    while process.poll() is None and not ((workdir / "metrics.jsonl").exists() and len(losses(workdir)) >= steps):
        time.sleep(0.01)
    assert process.returncode is None, process.stderr.read()


def end_as_uninterrupted(workdir: Path, uninterrupted: Path, steps: int, **fields: object) -> None:
    """Takes the run in workdir to `steps`, and compares it with one that goes there without a break."""
    for folder in (workdir, uninterrupted):
        run("train", *arguments(folder, train__steps=steps, **fields))
    assert saved_states(workdir)[steps] == saved_states(uninterrupted)[steps]
    assert [step for step, _ in losses(workdir)] == list(range(1, steps + 1))
    assert losses(workdir) == losses(uninterrupted)


def test_killed_at_random_moments(source, tmp_path):
    fields = source | QUIET
    workdir, rng, done = tmp_path / "killed", random.Random(0), 0
    for _ in range(4):
        every = rng.choice((1, 2))
        argv = arguments(workdir, train__steps=100_000, train__checkpoint_every=every, **fields)
        process = start("train", *argv, real=True)
        wait_for_steps(workdir, done + rng.randint(1, 8), process)
        time.sleep(rng.random() / 5)
        process.kill()
        process.communicate()
        done = len(losses(workdir))
    end_as_uninterrupted(workdir, tmp_path / "uninterrupted", done + 3, **fields)


def test_terminated(source, tmp_path):
    fields = source | QUIET | {"train__checkpoint_every": 1000}
    workdir = tmp_path / "terminated"
    process = start("train", *arguments(workdir, train__steps=100_000, **fields))
    wait_for_steps(workdir, 3, process)
    process.terminate()
    out, err = process.communicate()
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    (step,) = map(int, re.findall(r"^error: stopped by SIGTERM after step (\d+); the same .*$", err, re.MULTILINE))
    assert err.splitlines()[-1].startswith("error: stopped by SIGTERM")
    assert saved_states(workdir).keys() == {step}
    end_as_uninterrupted(workdir, tmp_path / "uninterrupted", step + 3, **fields)
