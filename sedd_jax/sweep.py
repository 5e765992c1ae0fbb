"""Runs a sweep: python -m sedd_jax.sweep --sweep=configs/sweeps/noise.py --workdir=DIR [--config.a.b=value ...]

Trains the points of the sweep one after another, each in its own directory under DIR; overrides apply to all of them.
The same command continues where it stopped, and uses points that were trained elsewhere. It ends with a table on
stderr, results.{json,csv,md,png} in DIR and one JSON line on stdout. Exit code 1: points failed (the others were run).
With --print_commands it runs nothing and prints the commands of the points that are not done, one per line.

A sweep file has CONFIG, the path of its config relative to the file, and get_sweep(), a list of overrides."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from sedd_jax import cli, config as configuration, files, lock
from sedd_jax.devices.processes import say
from sedd_jax.devices.stopping import Stopped
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.evaluation import results
from sedd_jax.training.report import read_metrics

cli.define_path("workdir", "Directory of the sweep, with one for each point.")
cli.define_path("sweep", "Sweep, a file such as configs/sweeps/noise.py.")
cli.define_path("config", "Experiment that the points are overrides of; by default the sweep's.")
flags.DEFINE_boolean("print_commands", False, "Prints the commands for a cluster instead of running them.")

BITS = "eval_bits_per_byte"
FIGURES = ("train_loss", BITS, f"{BITS}_stderr", "eval_nats_per_token", "tokens_per_second", "mfu")


class Trial(NamedTuple):
    """One point, begun or not. arguments: those of its training command."""

    name: str
    config: ConfigDict
    workdir: epath.Path
    arguments: Sequence[str] = ()

    def last(self) -> dict[str, int | float | None]:
        """All figures of the last step reported; step 0 before the first."""
        entries = read_metrics(self.workdir)
        last = {"step": max((entry["step"] for entry in entries), default=0)}
        for entry in entries:
            last |= entry if entry["step"] == last["step"] else {}
        return last

    def is_done(self) -> bool:
        """Whether everything is there that training leaves behind its last step."""
        options, last = self.config.train, self.last()
        trained = last["step"] >= options.steps and "train_loss" in last
        evaluated = not options.eval_every or "eval_nats_per_token" in last
        sampled = not options.sample_every or (self.workdir / "samples" / f"{last['step']}.txt").exists()
        return trained and evaluated and sampled and (self.workdir / "checkpoints" / str(last["step"])).exists()


def read_sweep(path: str) -> tuple[str | None, list[dict[str, Any]]]:
    """(path of the config, overrides of each point) of a sweep file. Raises InputError."""
    points, names = cli.run_file("sweep", path, "get_sweep")
    if not (isinstance(points, list) and points and all(isinstance(point, dict) for point in points)):
        raise InputError(f"--sweep={path}: get_sweep() must return a list of dicts of overrides, at least one")
    for field in (field for point in points for field in point):
        if not (isinstance(field, str) and re.fullmatch(r"\w+(\.\w+)*", field)):
            raise InputError(f"--sweep={path}: {field!r} is not the name of a field, such as 'optim.lr'")
    config = names.get("CONFIG")
    # Not resolved, so that a relative path stays one in the commands that are printed.
    return config and os.path.normpath(os.path.join(os.path.dirname(path), config)), points


def point_name(overrides: dict[str, Any]) -> str:
    """A directory name from the overrides of a point. It does not depend on the other points."""
    text = ",".join(f"{field}={value}" for field, value in sorted(overrides.items())) or "base"
    name = re.sub(r"[^\w.,=+-]", "_", text)[:100]
    return name if name == text else f"{name}-{zlib.crc32(text.encode()):08x}"


def make_points(config: str, points: list[dict], overrides: Sequence[str], workdir: epath.Path) -> list[Trial]:
    """The points with their configs. Raises InputError for one that does not fit the config, or that is there twice."""
    made: list[Trial] = []
    for point in points:
        name = point_name(point)
        given = [*overrides, *(f"--config.{field}={value}" for field, value in point.items())]
        arguments = [f"--config={config}", f"--workdir={workdir / name}", *given]
        trial = Trial(name, cli.read_config(config, given), workdir / name, arguments)
        values = configuration.flatten(trial.config)
        for field, value in point.items():
            if any(override.startswith(f"--config.{field}=") for override in overrides):
                raise InputError(f"--config.{field} is given for all points, and the sweep sets it too")
            if values.get(field) != value:
                what = f"--config.{field}={value} in the sweep means {values.get(field)!r} on a command line"
                raise InputError(f"{what} and not {value!r}; give a field that holds one number, string or truth value")
        if same := [other.name for other in made if other.config == trial.config]:
            raise InputError(f"the points {same[0]} and {name} of the sweep are the same experiment")
        made.append(trial)
    return made


def check_workdir(points: Sequence[Trial], workdir: epath.Path) -> None:
    """Raises InputError if workdir holds something else than these points."""
    if (workdir / "config.json").exists():
        raise InputError(f"--workdir={workdir} holds a run of its own; choose another --workdir for the sweep")
    names, record = [point.name for point in points], workdir / "sweep.json"
    held = files.read_json(record, remedy=f"if {workdir} is of this sweep, remove it", absent=True)
    if others := [name for name in held.get("points", []) if name not in names]:
        raise InputError(f"--workdir={workdir} holds another sweep, with the point {others[0]}; choose another one")
    for point in points:
        configuration.check_same_experiment(point.config, point.workdir)


class Trainer(contextlib.ExitStack):
    """Trains points as processes of their own, to which it passes signals on. stopped: that ends the sweep, or 0."""

    def __init__(self):
        super().__init__()
        self.stopped, self._process = 0, None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if (previous := signal.getsignal(number)) is not signal.SIG_IGN:
                signal.signal(number, self._receive)
                self.callback(signal.signal, number, previous)

    def _receive(self, number: int, _: object) -> None:
        self.stopped = number
        if self._process:
            # Training saves at SIGTERM and SIGINT. A terminal that is closed is no reason to lose steps.
            self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def train(self, arguments: Sequence[str]) -> int:
        """Returns the exit code. All output goes to stderr: the last line of stdout is that of the sweep."""
        command = [sys.executable, "-m", "sedd_jax.train", *arguments]
        # A process group of its own: Ctrl-C reaches it through us, once. Twice would end it without saving.
        with subprocess.Popen(command, stdout=sys.stderr.fileno(), process_group=0) as self._process:
            if self.stopped:
                self._process.send_signal(signal.SIGTERM)
            code = self._process.wait()
        if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):  # stopped by somebody else, or by us
            self.stopped = self.stopped or code - 128
        return code


def run_sweep(points: list[Trial], fields: list[str], workdir: epath.Path) -> list[dict[str, Any]]:
    """Trains the points that are not done and returns the table. Raises TrainingError if points fail."""
    states, record = dict[str, str](), {"points": [point.name for point in points]}
    with lock.hold(workdir, "workdir"), Trainer() as trainer:
        files.write_atomically(workdir / "sweep.json", json.dumps(record, indent=2) + "\n")
        for number, point in enumerate(points, 1):
            what = f"point {number} of {len(points)}, {point.name}"
            if point.is_done():
                say(f"{what}: done already")
                continue
            if trainer.stopped:
                break
            say(f"{what}: {shlex.join(['train', *point.arguments])}")
            code = trainer.train(point.arguments)
            if trainer.stopped:
                break
            reason = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            states[point.name] = "done" if code == 0 else f"failed: {reason}"
            write_results(workdir, points, fields, states)
        table = write_results(workdir, points, fields, states)
        say((workdir / "results.md").read_text())
        if left := [line["name"] for line in table if line["state"] == "unfinished"]:
            raise Stopped(trainer.stopped, f"at the point {left[0]}")
    if failed := [f"{name} ({state.removeprefix('failed: ')})" for name, state in states.items() if state != "done"]:
        raise TrainingError(f"{len(failed)} of {len(points)} points failed: {'; '.join(failed)}; see above for why")
    return table


def write_results(folder: epath.Path, trials: list[Trial], fields: list[str], states: dict[str, str]) -> list[dict]:
    """Writes results.{json,csv,md,png} into the folder. Returns the table, with a line per trial: name, state, values
    of the fields of its config, and the figures of its last step. states: of some trials, by name."""
    table = []
    for trial in trials:
        values, last = configuration.flatten(trial.config), trial.last()
        state = states.get(trial.name) or ("done" if trial.is_done() else "unfinished")
        line = {"name": trial.name, "state": state, "step": last["step"], "steps": trial.config.train.steps}
        line |= {field: values[field] for field in fields} | {name: last.get(name) for name in FIGURES}
        table.append(line | {"workdir": str(trial.workdir)})
    columns = {field: lambda line, field=field: str(line[field]) for field in fields}
    columns = columns or {"point": lambda line: line["name"]}
    columns |= {"bits per byte": results.number(BITS, ".3f"), "training loss": results.number("train_loss", ".3f")}
    columns["step"] = lambda line: f"{line['step']} of {line['steps']}"
    columns |= {"tokens/s": results.number("tokens_per_second", ",.0f"), "state": lambda line: line["state"]}
    results.write(folder, table, results.markdown(table, columns))
    plot(folder / "results.png", trials)
    return table


def best(table: Sequence[Mapping[str, Any]]) -> str | None:
    """The finished trial with the fewest bits per byte, or with the lowest loss if none knows its bits per byte."""
    for figure in (BITS, "eval_nats_per_token", "train_loss"):
        if known := [line for line in table if line["state"] == "done" and line[figure] is not None]:
            return min(known, key=lambda line: line[figure])["name"]
    return None


def plot(path: epath.Path, trials: Sequence[Trial]) -> None:
    """Validation bound in bits per byte against steps, or the training loss if no trial has two bounds."""
    entries = {trial.name: read_metrics(trial.workdir) for trial in trials}
    figure, label = BITS, "validation bound, bits per byte"
    if all(sum(figure in entry for entry in found) < 2 for found in entries.values()):
        figure, label = "train_loss", "training loss, nats per token"
    with files.plot(path, size=(7.0, 4.5)) as (page, axes):
        for name, found in entries.items():
            if points := [(entry["step"], entry[figure]) for entry in found if entry.get(figure)]:
                axes.plot(*zip(*points, strict=True), marker="o" if figure.startswith("eval") else "", label=name)
        axes.set(xlabel="step", ylabel=label)
        if axes.lines:
            page.legend(loc="outside lower center", fontsize="small", ncols=1 + (len(axes.lines) > 6))


def main() -> dict[str, Any] | None:
    path, workdir = cli.required("sweep"), cli.path()
    config, overrides = read_sweep(path)
    config = flags.FLAGS.config or config
    if not config:
        raise InputError(f"--sweep={path} names no CONFIG; give --config")
    points = make_points(config, overrides, cli.OVERRIDES, workdir)
    check_workdir(points, workdir)
    if flags.FLAGS.print_commands:
        for point in points:
            if point.is_done():
                say(f"{point.name}: done already")
            else:
                print(shlex.join(["python", "-m", "sedd_jax.train", *point.arguments]))
        return None
    fields = list(dict.fromkeys(field for point in overrides for field in point))
    table = run_sweep(points, fields, workdir)
    return {"sweep": epath.Path(path).stem, "points": table, "best": best(table), "workdir": str(workdir)}


if __name__ == "__main__":
    cli.run(main)
