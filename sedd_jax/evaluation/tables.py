"""Several runs beside one another: a table, JSON, CSV and a plot of what their workdirs hold."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.files import write_atomically
from sedd_jax.training.report import Log

FIGURES = (
    "train_loss",
    "eval_bits_per_byte",
    "eval_bits_per_byte_stderr",
    "eval_nats_per_token",
    "tokens_per_second",
    "mfu",
)


@dataclass(frozen=True)
class Run:
    """One run of the comparison, which need not have begun. config: what it is trained with."""

    name: str
    config: ConfigDict
    workdir: epath.Path

    def lines(self) -> list[dict[str, int | float | None]]:
        return Log.lines(self.workdir / "metrics.jsonl")

    def last(self) -> dict[str, int | float | None]:
        """All figures of the last step reported; step 0 before the first."""
        lines = self.lines()
        last = {"step": max((line["step"] for line in lines), default=0)}
        for line in lines:
            if line["step"] == last["step"]:
                last |= line
        return last

    def is_done(self) -> bool:
        """Whether all is there that training leaves behind its last step."""
        options, last = self.config.train, self.last()
        return (
            last["step"] >= options.steps
            and "train_loss" in last
            and (not options.eval_every or "eval_nats_per_token" in last)
            and (not options.sample_every or (self.workdir / "samples" / f"{last['step']}.txt").exists())
            and (self.workdir / "checkpoints" / str(last["step"])).exists()
        )


def rows(runs: Sequence[Run], fields: Sequence[str], states: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each run its name, state, values of the fields of the config, and the figures of its last step.

    states: what to say of some runs instead of what their workdir does: done or unfinished.
    """
    table = []
    for run in runs:
        values, last = dict(configuration.flatten(run.config)), run.last()
        state = states.get(run.name) or ("done" if run.is_done() else "unfinished")
        table.append(
            {"name": run.name, "state": state, "step": last["step"], "steps": run.config.train.steps}
            | {field: values[field] for field in fields}
            | {name: last.get(name) for name in FIGURES}
            | {"workdir": str(run.workdir)}
        )
    return table


def best(table: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the run that is done with the fewest bits per byte; where no run knows them, the lowest loss."""
    for figure in ("eval_bits_per_byte", "eval_nats_per_token", "train_loss"):
        known = [row for row in table if row["state"] == "done" and row[figure] is not None]
        if known:
            return min(known, key=lambda row: row[figure])["name"]
    return None


def markdown(table: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    """A table with a line for each row."""

    def bits(row: Mapping[str, Any]) -> str:
        value, error = row["eval_bits_per_byte"], row["eval_bits_per_byte_stderr"]
        return "" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    head = [*(fields or ["point"]), "bits per byte", "training loss", "step", "tokens/s", "state"]
    lines = []
    for row in table:
        loss, rate = number(row["train_loss"], ".3f"), number(row["tokens_per_second"], ",.0f")
        point = [str(row[field]) for field in fields or ["name"]]
        lines.append([*point, bits(row), loss, f"{row['step']} of {row['steps']}", rate, row["state"]])
    return as_markdown(head, lines)


def as_markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def write(folder: epath.Path, runs: Sequence[Run], table: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Leaves results.json, results.csv, results.md and results.png in the folder."""
    write_table(folder, table, markdown(table, fields))
    plot(folder / "results.png", runs)


def write_table(folder: epath.Path, table: Sequence[Mapping[str, Any]], text: str) -> None:
    """Leaves results.json, results.csv and, with `text`, results.md in the folder."""
    write_atomically(folder / "results.json", json.dumps(table, indent=2) + "\n")
    sheet_text = io.StringIO()
    sheet = csv.DictWriter(sheet_text, fieldnames=list(table[0]), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(table)
    write_atomically(folder / "results.csv", sheet_text.getvalue())
    write_atomically(folder / "results.md", text)


def plot(path: epath.Path, runs: Sequence[Run]) -> None:
    """Draws the validation bound in bits per byte against steps, or the training loss where no run has two bounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {run.name: run.lines() for run in runs}
    figure, label = "eval_bits_per_byte", "validation bound, bits per byte"
    if all(sum(figure in line for line in entries) < 2 for entries in lines.values()):
        figure, label = "train_loss", "training loss, nats per token"
    page, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, entries in lines.items():
        points = [(line["step"], line[figure]) for line in entries if line.get(figure)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if figure.startswith("eval") else "", label=name)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.lines:
        page.legend(loc="outside lower center", fontsize="small", ncols=1 + (len(axes.lines) > 6))
    with path.open("wb") as file:
        page.savefig(file, format="png", dpi=150)
    pyplot.close(page)
