"""What a run leaves for people: metrics, samples, a plot, a progress bar. Process 0 writes, the others keep silent."""

import json
import math
import sys
import time
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sedd_jax.devices import processes
from sedd_jax.files import write_atomically


class Stopwatch:
    """Steps per second of training proper: compilation, evaluation and checkpoints do not count."""

    def __init__(self):
        self._seconds, self._steps, self._last = 0.0, 0, None

    def tick(self) -> None:
        """A step is done. The first one of all, with its compilation, only starts the clock."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._steps += 1
        self._last = now

    def skip(self) -> None:
        """Leaves out the time since the last tick."""
        self._last = time.perf_counter()

    def steps_per_second(self) -> float:
        """Since the last call; NaN if no step was timed."""
        rate = self._steps / self._seconds if self._seconds else float("nan")
        self._seconds, self._steps = 0.0, 0
        return rate


class Log:
    """Appends to metrics.jsonl and to TensorBoard. Entries after `step`, of steps that will be done again, go."""

    def __init__(self, workdir: epath.Path, *, step: int):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in self.lines(self._path) if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    @staticmethod
    def lines(path: epath.Path) -> list[dict[str, int | float | None]]:
        """The entries of a metrics file; a last line that a killed run left unfinished is dropped."""
        entries = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    def write(self, step: int, **values: float) -> None:
        """A figure that could not be computed is null in the file, since JSON has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def text(self, step: int, name: str, value: str) -> None:
        self._events.add_text(name, value, step)

    def close(self) -> None:
        self._events.close()


def plot(workdir: epath.Path) -> None:
    """Draws loss.png from metrics.jsonl: training loss, and the validation bound where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = Log.lines(workdir / "metrics.jsonl")
    train = [(line["step"], line["train_loss"]) for line in lines if line.get("train_loss")]
    valid = [(line["step"], line["eval_nats_per_token"]) for line in lines if line.get("eval_nats_per_token")]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="C0", alpha=0.6, linewidth=1, label="training loss")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="C1", marker="o", label="validation bound, averaged weights")
    axes.set(xlabel="step", ylabel="nats per token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with (workdir / "loss.png").open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot.close(figure)


class Report:
    """The files of one run. Every process makes the same calls."""

    def __init__(self, workdir: epath.Path, *, step: int):
        """Entries after `step`, of steps that will be done again, go."""
        self._workdir = workdir
        self._log = Log(workdir, step=step) if processes.is_leader() else None

    def entry(self, step: int, **values: float) -> None:
        if self._log:
            self._log.write(step, **values)

    def samples(self, step: int, texts: list[str]) -> None:
        if self._log:
            folder = self._workdir / "samples"
            folder.mkdir(exist_ok=True)
            text = "".join(f"=== sample {i} at step {step} ===\n{text}\n" for i, text in enumerate(texts))
            write_atomically(folder / f"{step}.txt", text)
            self._log.text(step, "samples", text)

    def has(self, step: int) -> tuple[bool, bool]:
        """Whether the evaluation and the samples of a step are there: the same answer on all processes."""

        def look() -> bytes:
            lines = Log.lines(self._workdir / "metrics.jsonl")
            evaluated = any(line["step"] == step and "eval_nats_per_token" in line for line in lines)
            return json.dumps([evaluated, (self._workdir / "samples" / f"{step}.txt").exists()]).encode()

        evaluated, sampled = json.loads(processes.from_leader("reported", look))
        return evaluated, sampled

    def bar(self, *, step: int, steps: int) -> tqdm:
        quiet = {} if sys.stderr.isatty() else {"mininterval": 10}
        return tqdm(
            total=steps,
            initial=step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not processes.is_leader(),
            **quiet,
        )

    def final(self, step: int) -> dict[str, Any]:
        """Draws the plot and returns the values for the last step, so that a run already done answers the same."""
        final: dict[str, Any] = {"step": step, "train_loss": None, "eval_bits_per_byte": None}
        if self._log:
            plot(self._workdir)
            for line in Log.lines(self._workdir / "metrics.jsonl"):
                if line["step"] == step:
                    final |= line
        return final | {"workdir": str(self._workdir)}

    def close(self) -> None:
        if self._log:
            self._log.close()
