"""Several training runs beside one another: a table and a plot of their workdirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import files
from sedd_jax.evaluation import tables
from sedd_jax.training.report import read_metrics

BITS = "eval_bits_per_byte"
FIGURES = ("train_loss", BITS, f"{BITS}_stderr", "eval_nats_per_token", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Trial:
    """One training run, begun or not. arguments: those of its training command."""

    name: str
    config: ConfigDict
    workdir: epath.Path
    arguments: Sequence[str] = ()

    def entries(self) -> list[dict[str, int | float | None]]:
        """The entries of metrics.jsonl."""
        return read_metrics(self.workdir)

    def last(self) -> dict[str, int | float | None]:
        """All figures of the last step reported; step 0 before the first."""
        entries = self.entries()
        last = {"step": max((entry["step"] for entry in entries), default=0)}
        for entry in entries:
            last |= entry if entry["step"] == last["step"] else {}
        return last

    def is_done(self) -> bool:
        """Whether everything is there that training leaves behind its last step."""
        options, last = self.config.train, self.last()
        return (
            last["step"] >= options.steps
            and "train_loss" in last
            and (not options.eval_every or "eval_nats_per_token" in last)
            and (not options.sample_every or (self.workdir / "samples" / f"{last['step']}.txt").exists())
            and (self.workdir / "checkpoints" / str(last["step"])).exists()
        )


def write(
    folder: epath.Path, trials: Sequence[Trial], fields: Sequence[str], states: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Writes results.{json,csv,md,png} into the folder. Returns the table, with a line per trial: name, state, values
    of the fields of its config, and the figures of its last step.

    states: of some trials, by name; that of the others, done or unfinished, is read from their workdirs.
    """
    table = []
    for trial in trials:
        values, last = dict(configuration.flatten(trial.config)), trial.last()
        state = states.get(trial.name) or ("done" if trial.is_done() else "unfinished")
        table.append(
            {"name": trial.name, "state": state, "step": last["step"], "steps": trial.config.train.steps}
            | {field: values[field] for field in fields}
            | {name: last.get(name) for name in FIGURES}
            | {"workdir": str(trial.workdir)}
        )
    columns = {field: lambda line, field=field: str(line[field]) for field in fields}
    columns = columns or {"point": lambda line: line["name"]}
    columns["bits per byte"] = tables.number(BITS, ".3f")
    columns["training loss"] = tables.number("train_loss", ".3f")
    columns["step"] = lambda line: f"{line['step']} of {line['steps']}"
    columns["tokens/s"] = tables.number("tokens_per_second", ",.0f")
    columns["state"] = lambda line: line["state"]
    tables.write(folder, table, tables.markdown(table, columns))
    plot(folder / "results.png", trials)
    return table


def best(table: Sequence[Mapping[str, Any]]) -> str | None:
    """The finished trial with the fewest bits per byte, or with the lowest loss if none knows its bits per byte."""
    for figure in (BITS, "eval_nats_per_token", "train_loss"):
        known = [line for line in table if line["state"] == "done" and line[figure] is not None]
        if known:
            return min(known, key=lambda line: line[figure])["name"]
    return None


def plot(path: epath.Path, trials: Sequence[Trial]) -> None:
    """Validation bound in bits per byte against steps, or the training loss if no trial has two bounds."""
    entries = {trial.name: trial.entries() for trial in trials}
    figure, label = BITS, "validation bound, bits per byte"
    if all(sum(figure in entry for entry in found) < 2 for found in entries.values()):
        figure, label = "train_loss", "training loss, nats per token"
    with files.plot(path, size=(7.0, 4.5)) as (page, axes):
        for name, found in entries.items():
            points = [(entry["step"], entry[figure]) for entry in found if entry.get(figure)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o" if figure.startswith("eval") else "", label=name)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            page.legend(loc="outside lower center", fontsize="small", ncols=1 + (len(axes.lines) > 6))
