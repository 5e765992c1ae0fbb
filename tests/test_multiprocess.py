"""Two real processes with four virtual devices each are one run: they compute, save, stop and fail together."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath
from running import (
    ENVIRONMENT,
    QUICK_TO_COMPILE,
    ROOT,
    arguments,
    close,
    command,
    files,
    losses,
    make_config,
    metrics,
    run,
    saved_states,
    train_here,
    write_text,
)

from sedd_jax.devices import processes
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.training.loop import train

# Long enough for a machine on which other work goes on, and still an end.
LIMIT = 400
SAVE = {"train__steps": 12, "train__checkpoint_every": 3, "train__eval_every": 12, "train__sample_every": 12}
# All weights are split over both processes. One axis alone: on the CPU, collectives of one step that join different
# groups of devices may be entered in different orders by two processes, and Gloo waits 30 s for them and gives up.
QUIET = {"train__eval_every": 0, "train__sample_every": 0}
DEVICES = {
    "NPROC": "64",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_cpu_collective_timeout_seconds=600 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + QUICK_TO_COMPILE,
}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Two:
    """Two processes of one command line. `extra` are flags of the second one alone."""

    def __init__(self, folder: Path, *line: str, extra: tuple[str, ...] = ()):
        flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        self._outputs = [(folder / f"out{i}", folder / f"err{i}") for i in range(2)]
        self.processes = []
        for i, (out, err) in enumerate(self._outputs):
            argv = [*line, *flags, f"--process_id={i}", *(extra if i else ())]
            with out.open("w") as stdout, err.open("w") as stderr:
                environment = ENVIRONMENT | DEVICES
                self.processes.append(subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr))

    def out(self, index: int) -> list[str]:
        return self._outputs[index][0].read_text().splitlines()

    def err(self, index: int) -> str:
        return self._outputs[index][1].read_text()

    def wait(self) -> list[int]:
        return [process.wait(timeout=LIMIT) for process in self.processes]

    def wait_for(self, text: str) -> None:
        """Until the first process has printed it."""
        end = time.monotonic() + LIMIT
        while text not in self.err(0):
            assert time.monotonic() < end and self.processes[0].poll() is None, self.err(0) + self.err(1)
            time.sleep(0.05)


@contextlib.contextmanager
def two(folder: Path, name: str, *argv: str, extra: tuple[str, ...] = (), real: bool = False) -> Iterator[Two]:
    pair = Two(folder, *command(name, *argv, real=real), extra=extra)
    try:
        yield pair
    finally:
        for process in pair.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return {"data__source": str(text), "data__tokenizer": "sentencepiece", "data__vocab_size": 400}


@pytest.fixture(scope="module")
def one(tmp_path_factory, source):
    """Workdir of a run by this process alone, on its eight devices."""
    workdir = tmp_path_factory.mktemp("one")
    train_here(workdir, **source, **SAVE, mesh__fsdp=8)
    return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source):
    """(workdir, the two processes) of the same run by two."""
    folder = tmp_path_factory.mktemp("trained")
    with two(folder, "train", *arguments(folder / "run", **source, **SAVE, mesh__fsdp=8)) as pair:
        assert pair.wait() == [0, 0], pair.err(0) + pair.err(1)
    return folder / "run", pair


def copy_at(workdir: Path, step: int, copy: Path) -> Path:
    """The run as it was after `step`."""
    shutil.copytree(workdir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return copy


def require_close(found: Path, expected: Path, tolerance: float = 1e-4) -> None:
    """The same losses up to the order of sums, over the steps that both have. A step is Adam's, so it amplifies."""
    left, right = dict(losses(found)), dict(losses(expected))
    common = left.keys() & right.keys()
    assert len(common) >= 12
    assert [left[step] for step in common] == pytest.approx([right[step] for step in common], rel=tolerance)


def test_two_processes_train_as_one(one, trained):
    workdir, pair = trained
    require_close(workdir, one)
    figures = [next(line for line in metrics(run) if "eval_nats_per_token" in line) for run in (workdir, one)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    positions = [{step: state["position"] for step, state in saved_states(run).items()} for run in (workdir, one)]
    assert positions[0] == positions[1]


def test_two_processes_tune_adapters_as_one(one, source, tmp_path):
    fields = source | QUIET | {"train__steps": 12, "model__lora_rank": 2, "mesh__fsdp": 8}
    train(make_config(**fields), epath.Path(tmp_path / "alone"), init=str(one))
    with two(tmp_path, "train", *arguments(tmp_path / "both", **fields), f"--init={one}") as pair:
        assert pair.wait() == [0, 0], pair.err(0) + pair.err(1)
    require_close(tmp_path / "both", tmp_path / "alone")


def test_only_the_first_process_writes_and_answers(one, trained):
    workdir, pair = trained
    assert json.loads(pair.out(0)[-1])["step"] == 12 and pair.out(1) == []
    assert "parameters on 8 x cpu" in pair.err(0) and "2 processes" in pair.err(0)
    assert "parameters" not in pair.err(1) and "step/s" not in pair.err(1)
    assert [line["step"] for line in metrics(workdir) if "train_loss" in line] == list(range(1, 13))
    names = [{path.name for path in run.iterdir()} for run in (workdir, one)]
    assert names[0] == names[1]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert (workdir / "tokenizer.model").read_bytes() == (one / "tokenizer.model").read_bytes()


def test_stop_signal_to_one_process_saves_and_ends_both(trained, source, tmp_path):
    """And the run that goes on ends as the one that was left alone, bit for bit."""
    workdir = copy_at(trained[0], 3, tmp_path / "run")
    argv = arguments(workdir, **source, **SAVE | QUIET, mesh__fsdp=8)
    with two(tmp_path, "train", *argv) as pair:
        pair.wait_for("resuming after step 3")
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [128 + signal.SIGTERM] * 2, pair.err(0) + pair.err(1)
    lines = [
        re.findall(r"^error: stopped by SIGTERM after step (\d+); .*$", pair.err(i), re.MULTILINE) for i in range(2)
    ]
    assert lines[0] == lines[1]
    (step,) = map(int, lines[0])
    assert max(saved_states(workdir)) == step < 12
    with two(tmp_path, "train", *argv) as pair:
        assert pair.wait() == [0, 0], pair.err(0) + pair.err(1)
    expected = saved_states(trained[0])
    assert saved_states(workdir)[12] == expected[12]
    assert losses(workdir) == losses(trained[0])


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_other_and_the_run_goes_on(one, source, tmp_path, victim):
    """Two processes take up the run of one on another mesh, and one takes up what they left."""
    workdir = copy_at(one, 3, tmp_path / "run")
    fields = source | QUIET | {"train__checkpoint_every": 2}
    long = fields | {"train__steps": 1_000_000, "mesh__fsdp": 8}
    with two(tmp_path, "train", *arguments(workdir, **long), "--heartbeat_timeout=10", real=True) as pair:
        pair.wait_for("resuming after step 3")
        while len(losses(workdir)) < 16:
            assert pair.processes[0].poll() is None, pair.err(0)
            time.sleep(0.05)
        pair.processes[victim].kill()
        killed = time.monotonic()
        assert pair.processes[1 - victim].wait(timeout=LIMIT) == 1
        # A heartbeat timeout, and as much again for a busy machine to notice.
        assert time.monotonic() - killed < 60
    last = pair.err(1 - victim).splitlines()[-1]
    assert last.startswith("error: another process died or cannot be reached; start all of them again")
    assert "Traceback" not in pair.err(1 - victim)
    done = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    train_here(workdir, **fields, train__steps=done + 2)
    assert [step for step, _ in losses(workdir)] == list(range(1, done + 3))
    require_close(workdir, one)


def test_bad_input_of_one_process_ends_both(source, tmp_path):
    argv = arguments(tmp_path / "run", **source, **QUIET)
    with two(tmp_path, "train", *argv, extra=("--config.data.source=absent.txt",)) as pair:
        assert pair.wait() == [2, 2]
    assert pair.err(1).splitlines()[-1].startswith("error: data source 'absent.txt' matches no file")
    assert pair.err(0).splitlines()[-1].startswith("error: process 1: data source 'absent.txt' matches no file")
    assert not (tmp_path / "run").exists()


def test_processes_have_to_be_started_on_the_same_config(source, tmp_path):
    argv = arguments(tmp_path / "run", **source, **QUIET)
    with two(tmp_path, "train", *argv, extra=("--config.optim.lr=0.5",)) as pair:
        assert pair.wait() == [2, 2]
    assert all("the processes have not all got the same config" in pair.err(i).splitlines()[-1] for i in range(2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "argv"),
    [("evaluate", ["--num_times=2", "--num_sequences=8"]), ("sample", ["--steps=2", "--num=2", "--prefix=The"])],
)
def test_commands_on_two_processes_answer_as_on_one(trained, tmp_path, name, argv):
    argv = [f"--workdir={trained[0]}", *argv]
    before = files(trained[0])
    with two(tmp_path, name, *argv) as pair:
        assert pair.wait() == [0, 0], pair.err(0) + pair.err(1)
    assert pair.out(1) == [] and files(trained[0]) == before
    found, alone = json.loads(pair.out(0)[-1]), json.loads(run(name, *argv)[0].splitlines()[-1])
    if name == "sample":
        assert found["samples"] == alone["samples"]
    else:
        assert found == close(alone, 1e-4)


FEED = textwrap.dedent(
    """
    import json
    import jax, numpy as np
    from absl import flags
    from sedd_jax import cli
    from sedd_jax.devices import processes, sharding
    from sedd_jax.data.loader import Loader
    from sedd_jax.data.packing import Stream

    cli.define_processes()

    def main():
        stream = Stream(np.arange(1000, dtype=np.uint16), 1000, 1)
        batch = next(Loader(stream, length=5, batch_size=16, seed=0))
        held = {}
        for sizes in ({}, {"tensor": 8}, {"fsdp": 2, "tensor": 2}):
            # The devices of the two processes take turns, as those of neighbouring hosts may.
            devices = np.array(jax.devices()).reshape(2, 4).T.ravel()
            for order in (jax.devices(), list(devices)):
                mesh = sharding.make_mesh(**sizes, devices=order)
                mine = sharding.local_sequences(16, mesh)
                local = next(Loader(stream, length=5, batch_size=16, seed=0, rows=mine))
                for shard in sharding.place_batch(local, mesh).addressable_shards:
                    np.testing.assert_array_equal(shard.data, batch[shard.index])
                held[f"{sizes} {order is not devices and order == jax.devices()}"] = mine.tolist()
        return {"held": [json.loads(text) for text in processes.all_gather("held", json.dumps(held))]}

    cli.run(main)
    """
)


def test_each_process_feeds_its_own_sequences_wherever_its_devices_are(tmp_path):
    (tmp_path / "feed.py").write_text(FEED)
    pair = Two(tmp_path, sys.executable, str(tmp_path / "feed.py"))
    assert pair.wait() == [0, 0], pair.err(0) + pair.err(1)
    first, second = json.loads(pair.out(0)[-1])["held"]
    assert (first["{} True"], second["{} True"]) == (list(range(8)), list(range(8, 16)))
    assert first["{} False"] == [0, 1, 4, 5, 8, 9, 12, 13] and sorted(first["{} False"] + second["{} False"]) == [
        *range(16)
    ]
    assert first["{'tensor': 8} True"] == second["{'tensor': 8} True"] == list(range(16))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(coordinator="localhost", num_processes=2, process_id=0), "--coordinator=localhost: give host:port"),
        (dict(coordinator="localhost:1234", num_processes=2, process_id=2), "--process_id=2 must lie from 0 to 1"),
        (dict(coordinator="localhost:1234", num_processes=2, process_id=-1), "--process_id=-1 must lie"),
        (dict(num_processes=0), "--num_processes=0 must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, named):
    with pytest.raises(InputError) as refusal:
        processes.initialise(**given)
    assert named in str(refusal.value)


def test_environment_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES='two' in the environment is not a number"):
        processes.initialise()


def test_coordinator_that_is_not_there_or_whose_port_is_taken():
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(InputError, match="process 0 cannot listen there"):
            processes.initialise(address, 2, 0)
    with pytest.raises(TrainingError, match="did not answer for 1 s"):
        processes.initialise(address, 2, 1, start_timeout=1)


JOIN = textwrap.dedent(
    """
    import os
    from sedd_jax.devices import processes
    from sedd_jax.errors import InputError

    address = {"coordinator": "localhost:1"}
    for given in (address, {"num_processes": 2}, address | {"process_id": 0}):
        try:
            processes.initialise(**given)
        except InputError as error:
            print(error)
    processes.initialise()
    processes.initialise(num_processes=1)
    # A job step of one task is alone, and has all the GPUs of the node; one of several is not, nor is one of several
    # that mpirun starts within one task.
    os.environ["SLURM_NTASKS"] = "1"
    for tasks in ("1", "2"):
        os.environ["OMPI_COMM_WORLD_SIZE"] = tasks
        try:
            processes.initialise()
            print(processes.is_leader(), processes.several())
        except InputError as error:
            print(error)
    """
)


def test_what_is_missing_is_looked_for_and_a_process_alone_stays_alone():
    process = subprocess.run([sys.executable, "-c", JOIN], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    *incomplete, alone, lost = process.stdout.splitlines()
    given = ["--coordinator=localhost:1", "--num_processes=2", "--coordinator=localhost:1 --process_id=0"]
    found = "jax does not find the rest by itself here; give --coordinator=host:port"
    assert [line.split(", --num")[0] for line in incomplete] == [f"{flags}: {found}" for flags in given], process.stderr
    assert alone == "True False"
    assert lost.startswith(f"a cluster job of several tasks: {found}")


def test_local_launcher_prints_what_it_would_run(tmp_path):
    command = [ROOT / "launch" / "local.sh", "--dry-run", "2", "train", "--workdir=a b"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [re.search(r"--process_id=(\d) *$", line)[1] for line in lines] == ["0", "1"]
    assert all(r"-m sedd_jax.train --workdir=a\ b --coordinator=127.0.0.1:" in line for line in lines)
