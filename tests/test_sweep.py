"""A sweep trains each of its points once, whatever stops it, and names the ones that failed."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from ml_collections import ConfigDict
from running import ENVIRONMENT, ROOT, SMALL, files, losses, metrics, run, train_here, write_text

from sedd_jax.config import flatten
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.sweep import FIGURES, Trial, best, check_workdir, make_points, point_name, read_sweep, run_sweep

BASELINE = str(ROOT / "configs" / "baseline.py")
# ml_collections reads configs in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, as the only point of a sweep of graphs."""
    folder = tmp_path_factory.mktemp("trained")
    every = {"train__steps": 2, "train__eval_every": 2, "train__sample_every": 2}
    train_here(
        folder / "graph.kind=absorbing", graph__kind="absorbing", data__source=str(write_text(folder / "t")), **every
    )
    return folder


def write_sweep(path: Path, points: object) -> Path:
    path.write_text(f"CONFIG = {BASELINE!r}\ndef get_sweep():\n    return {points!r}\n")
    return path


def overrides(**fields: object) -> list[str]:
    """SMALL, without what a sweep of corpora sets itself, and then `fields`."""
    values = SMALL | {"train.sample_every": 0} | {name.replace("__", "."): value for name, value in fields.items()}
    return [f"--config.{name}={value}" for name, value in values.items() if name != "data.source"]


def points_of(path: Path, workdir: Path, *extra: str) -> list:
    config, points = read_sweep(str(path))
    return make_points(config, points, extra, epath.Path(workdir))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_in_configs(path, tmp_path):
    config, overrides = read_sweep(str(path))
    points = points_of(path, tmp_path)
    assert len({point.name for point in points}) == len(points) >= 3
    base = dict(flatten(make_points(config, [{}], [], epath.Path(tmp_path))[0].config))
    for point, wanted in zip(points, overrides, strict=True):
        assert dict(flatten(point.config)) == base | wanted


def test_noise_sweep_crosses_graphs_and_schedules(tmp_path):
    names = [point.name for point in points_of(ROOT / "configs" / "sweeps" / "noise.py", tmp_path)]
    assert names == [
        f"graph.kind={graph},noise.kind={noise}"
        for graph in ("absorbing", "uniform")
        for noise in ("loglinear", "geometric")
    ]


def test_names_are_directory_names_and_differ_between_points():
    assert point_name({"optim.lr": 1e-4, "data.shift": False}) == point_name({"data.shift": False, "optim.lr": 1e-4})
    assert point_name({"optim.lr": 1e-4}) == "optim.lr=0.0001"
    odd = [{}, {"data.source": "a/b"}, {"data.source": "a b"}, {"data.source": "é" * 300}, {"data.source": "é" * 301}]
    names = [point_name(point) for point in odd]
    assert len(set(names)) == len(odd)
    assert all(len(name.encode()) < 255 and not set(name) & set("/ ") for name in names)


def test_printed_commands_are_those_that_a_shell_reads(tmp_path):
    out, err = run(
        "sweep",
        f"--sweep={ROOT / 'configs' / 'sweeps' / 'noise.py'}",
        f"--workdir={tmp_path / 'a b'}",
        "--print_commands",
        "--config=configs/tiny.py",
        "--config.data.source=it's here",
    )
    commands = [shlex.split(line) for line in out.splitlines()]
    assert [command[:3] for command in commands] == [["python", "-m", "sedd_jax.train"]] * 4
    for command, kind in zip(commands, ("loglinear", "geometric") * 2, strict=True):
        assert {"--config=configs/tiny.py", "--config.data.source=it's here", f"--config.noise.kind={kind}"} < {
            *command
        }
        assert any(part.startswith(f"--workdir={tmp_path}/a b/graph.kind=") for part in command)
    assert len({*map(tuple, commands)}) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("points", "extra", "named"),
    [
        ([], [], "at least one"),
        ({"optim.lr": 1e-4}, [], "a list of dicts"),
        ([{"optim.lr": 1e-4}, 3], [], "a list of dicts"),
        ([{"lr": 1e-4}], [], "'lr'"),
        ([{3: 1e-4}], [], "3 is not the name"),
        ([{"optim.rate": 1e-4}], [], "--config.optim.rate=0.0001: config.optim has no 'rate'"),
        ([{"optim.lr": "fast"}], [], "--config.optim.lr=fast"),
        ([{"data.valid_source": "None"}], [], "--config.data.valid_source=None"),
        ([{"optim.lr": 1e-4}, {"optim.lr": 0.0001}], [], "optim.lr=0.0001 and optim.lr=0.0001"),
        ([{"graph.kind": "uniform"}, {}, {"optim.lr": 3e-4}], [], "base and optim.lr=0.0003"),
        ([{"optim.lr": 1e-4}], ["--config.optim.lr=1"], "--config.optim.lr is given for all points"),
        ([{"optim.lr": 1e-4}], ["--config.optim.rate=1"], "--config.optim.rate=1"),
    ],
)
def test_points_that_make_no_sweep_are_named(tmp_path, points, extra, named):
    path = write_sweep(tmp_path / "bad.py", points)
    with pytest.raises(InputError) as refusal:
        points_of(path, tmp_path, *extra)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [(None, "is no file"), ("def get_sweep(:", "SyntaxError"), ("CONFIG = ''", "get_sweep"), ("1 / 0", "division")],
)
def test_files_that_are_no_sweep(tmp_path, text, named):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=named) as refusal:
        read_sweep(str(path))
    assert str(path) in str(refusal.value)


def test_workdir_of_something_else_is_refused_and_left_alone(trained, tmp_path):
    rates, kinds = tmp_path / "rates", Path(shutil.copytree(trained, tmp_path / "kinds"))
    points = points_of(write_sweep(tmp_path / "s.py", [{"optim.lr": 1e-3}, {"optim.lr": 1e-4}]), rates)
    rates.mkdir()
    (rates / "sweep.json").write_text(json.dumps({"points": ["optim.lr=0.001"]}))
    check_workdir(points, epath.Path(rates))  # A sweep may grow.
    with pytest.raises(InputError, match="another sweep, with the point optim.lr=0.001;"):
        check_workdir(points[1:], epath.Path(rates))
    (rates / "sweep.json").write_text("{")
    with pytest.raises(InputError, match="sweep.json is damaged"):
        check_workdir(points, epath.Path(rates))
    kind = points_of(write_sweep(tmp_path / "s.py", [{"graph.kind": "absorbing"}]), kinds)
    with pytest.raises(
        InputError, match="graph.kind=absorbing holds another experiment: config.data.length is 32 there"
    ):
        check_workdir(kind, epath.Path(kinds))
    with pytest.raises(InputError, match="holds a run of its own"):
        check_workdir(kind, epath.Path(kinds / "graph.kind=absorbing"))
    before = files(tmp_path)
    for workdir, named in [(kinds, "another experiment"), (tmp_path / "s.py" / "x", "cannot be made a directory")]:
        out, err = run("sweep", f"--sweep={tmp_path / 's.py'}", f"--workdir={workdir}", expect=2)
        (line,) = err.splitlines()
        assert (out, line[:7]) == ("", "error: ") and named in line
    assert files(tmp_path) == before


def interrupt(argv: list[str], point: Path, number: int) -> tuple[int, str, str]:
    """Starts the sweep as in a terminal, and presses Ctrl-C, say, when the point has made its first step."""
    command = [sys.executable, "-m", "sedd_jax.sweep", *argv]
    pipe = subprocess.PIPE
    # Tests that a shell runs in the background ignore Ctrl-C, and what they start would inherit that.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, previous)
    while process.poll() is None and not ((point / "metrics.jsonl").exists() and losses(point)):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def test_sweep_fails_stops_continues_and_ends_with_results(tmp_path, monkeypatch):
    """One point has no corpus at first; the other one is stopped by Ctrl-C."""
    here, there = write_text(tmp_path / "here.txt"), tmp_path / "there.txt"
    path = write_sweep(tmp_path / "corpora.py", [{"data.source": str(there)}, {"data.source": str(here)}])
    workdir = tmp_path / "out"
    late, early = (point_name({"data.source": str(source)}) for source in (there, here))
    argv = [f"--sweep={path}", f"--workdir={workdir}"]

    code, out, err = interrupt([*argv, *overrides(train__steps=100_000)], workdir / early, signal.SIGINT)
    assert (code, out) == (128 + signal.SIGINT, ""), err
    stopped = losses(workdir / early)[-1][0]
    assert f"error: stopped by SIGINT at the point {early}; the same command goes on there" in err
    assert (workdir / early / "checkpoints" / str(stopped)).is_dir()
    assert "there.txt" in err and not (workdir / late).exists()
    states = {line["name"]: line["state"] for line in json.loads((workdir / "results.json").read_text())}
    assert states == {late: "failed: exit code 2", early: "unfinished"}

    # As its subprocesses see it: one device.
    monkeypatch.setenv("XLA_FLAGS", ENVIRONMENT["XLA_FLAGS"])
    monkeypatch.delenv("NPROC")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    extra = overrides(train__steps=stopped + 2)
    points = points_of(path, workdir, *extra)
    check_workdir(points, epath.Path(workdir))
    with pytest.raises(TrainingError) as failure:
        run_sweep(points, ["data.source"], epath.Path(workdir))
    assert f"1 of 2 points failed: {late} (exit code 2)" in str(failure.value)
    assert [step for step, _ in losses(workdir / early)] == list(range(1, stopped + 3))
    assert [point.is_done() for point in points] == [False, True]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    there.write_bytes(here.read_bytes())
    before = files(workdir / early)
    out, err = run("sweep", *argv, *extra)
    assert files(workdir / early) == before
    assert f"point 2 of 2, {early}: done already" in err
    (line,) = out.splitlines()
    answer = json.loads(line)
    assert (answer["sweep"], answer["workdir"]) == ("corpora", str(workdir))
    results = json.loads((workdir / "results.json").read_text())
    assert answer["points"] == results
    assert [(line["state"], line["step"]) for line in results] == [("done", stopped + 2)] * 2
    for line in results:
        last = [entry for entry in metrics(Path(line["workdir"])) if entry["step"] == stopped + 2]
        reported = {name: value for entry in last for name, value in entry.items()}
        assert all(line[name] == reported[name] for name in FIGURES)
        assert 0 < line["eval_bits_per_byte"] < 20
    # The same text under two names, but one run was stopped on its way: Ctrl-C cost nothing.
    assert results[0]["eval_bits_per_byte"] == results[1]["eval_bits_per_byte"]
    with (workdir / "results.csv").open() as file:
        assert [line["name"] for line in csv.DictReader(file)] == [late, early]
    table = (workdir / "results.md").read_text()
    assert table in err
    assert f"| {there} | {results[0]['eval_bits_per_byte']:.3f} ± " in table
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_best_is_the_lowest_of_the_finished():
    def line(name: str, state: str, **figures: float) -> dict:
        return dict.fromkeys(FIGURES) | {"name": name, "state": state} | figures

    bits = [
        line("stopped", "unfinished", eval_bits_per_byte=1.0),
        line("good", "done", eval_bits_per_byte=2.0, train_loss=3.0),
        line("bad", "done", eval_bits_per_byte=3.0, train_loss=2.0),
    ]
    assert best(bits) == "good"
    assert best([entry | {"eval_bits_per_byte": None} for entry in bits]) == "bad"
    assert best(bits[:1]) is None


def test_trial_is_done_with_all_that_is_due_after_its_last_step(trained, tmp_path):
    folder = epath.Path(shutil.copytree(trained / "graph.kind=absorbing", tmp_path / "run"))

    def is_done(**train: int) -> bool:
        fields = {"steps": 2, "eval_every": 2, "sample_every": 2} | train
        return Trial("run", ConfigDict({"train": fields}), folder).is_done()

    assert is_done()
    assert not is_done(steps=3)
    (folder / "samples" / "2.txt").unlink()
    assert not is_done() and is_done(sample_every=0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if "eval" not in line))
    assert not is_done(sample_every=0) and is_done(sample_every=0, eval_every=0)
    (folder / "checkpoints").rename(tmp_path / "gone")
    assert not is_done(sample_every=0, eval_every=0)
