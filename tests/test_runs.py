"""One run, one directory: who may write there, whose data counts, and what a start without a checkpoint leaves."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from running import arguments, files, losses, saved_states, start, train_here, write_text

from sedd_jax import lock
from sedd_jax.errors import InputError
from sedd_jax.evaluation import perplexity
from sedd_jax.training.trained import load_trained

QUIET = {"train__eval_every": 0, "train__sample_every": 0, "train__steps": 2, "train__checkpoint_every": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_here(folder / "run", data__source=str(write_text(folder / "text.txt")), **QUIET)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A folder with run/ and text.txt of one's own."""
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    config = folder / "run" / "config.json"
    config.write_text(config.read_text().replace(str(trained), str(folder)))
    return folder


def test_second_run_in_a_directory_is_refused_by_name_and_a_killed_one_is_not_in_the_way(trained, tmp_path):
    fields = QUIET | {"data__source": str(trained / "text.txt"), "train__steps": 100_000, "train__checkpoint_every": 2}
    argv = arguments(tmp_path, **fields)
    first = start("train", *argv, real=True)
    while first.poll() is None and not (tmp_path / "checkpoints" / "2").exists():
        time.sleep(0.05)
    held = json.loads((tmp_path / ".lock").read_text())
    assert held["pid"] == first.pid
    with pytest.raises(InputError, match=f"in use by process {first.pid} on .* since 2.*choose another --workdir"):
        train_here(tmp_path, **fields)
    done = len(losses(tmp_path))
    while first.poll() is None and len(losses(tmp_path)) < done + 3:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    steps = 1 + max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert train_here(tmp_path, **fields | {"train__steps": steps})["step"] == steps
    assert [step for step, _ in losses(tmp_path)] == list(range(1, steps + 1))
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("lease", [False, True])
def test_lock_is_free_again_after_its_holder(tmp_path, lease):
    for _ in range(2):
        with lock.hold(tmp_path, "output", lease=lease, period=0.1):
            other = lock.hold(tmp_path, "output", lease=lease, period=0.1)
            with pytest.raises(InputError, match=f"--output={tmp_path} is in use by process .*another --output"):
                other.__enter__()
        assert files(tmp_path) == {}


def test_lease_of_a_killed_holder_is_taken_over_and_only_one_of_several_gets_it(tmp_path):
    (tmp_path / ".lock").write_text('{"host": "gone", "pid": 3, "since": "then", "token": "x"}')
    got, refused = [], []

    def take():
        try:
            with lock.hold(tmp_path, "workdir", lease=True, period=0.5):
                got.append(1)
                time.sleep(1)
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 2)


def test_a_late_write_of_a_holder_that_has_ended_does_not_stop_a_start(tmp_path):
    """As from a bucket that answers again: it is written over the new lease, and taken away."""
    path = tmp_path / ".lock"

    def late():
        while not path.exists():
            time.sleep(0.01)
        path.write_text("{}")
        time.sleep(0.3)
        path.unlink()

    writer = threading.Thread(target=late)
    writer.start()
    with lock.hold(tmp_path, "workdir", lease=True, period=1.0):
        assert "token" in path.read_text()
    writer.join()


def test_data_that_moved_is_the_same_data(copy):
    moved = (copy / "text.txt").rename(copy / "elsewhere.txt")
    fields = QUIET | {"train__steps": 3}
    train_here(copy / "run", **fields | {"data__source": str(moved)})
    config = json.loads((copy / "run" / "config.json").read_text())
    assert config["data"]["source"] == str(moved)
    assert saved_states(copy / "run").keys() == {1, 2, 3}


@pytest.mark.parametrize("change", ["text", "source"])
def test_other_data_is_refused(copy, change):
    text = copy / "text.txt"
    other = text if change == "text" else copy / "other.txt"
    other.write_text(text.read_text() + "More.\n")
    before = files(copy / "run")
    with pytest.raises(InputError, match="was trained on other data"):
        train_here(copy / "run", **QUIET | {"data__source": str(other)})
    assert files(copy / "run") == before


def test_evaluation_refuses_other_data_than_the_training_had(copy):
    trained = load_trained(epath.Path(copy / "run"), log=pytest.fail)
    stream = perplexity.validation_stream(trained, epath.Path(copy / "run"), remedy="give --data")
    assert len(stream) > 1000
    (copy / "text.txt").write_text((copy / "text.txt").read_text()[:-500])
    with pytest.raises(InputError, match="was trained on other data.*give --data"):
        perplexity.validation_stream(trained, epath.Path(copy / "run"), remedy="give --data")
