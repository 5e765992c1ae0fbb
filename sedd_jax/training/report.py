"""What a run leaves for people: metrics, samples, a plot, a progress bar. Process 0 writes, the others keep silent."""

import json
import sys
from typing import Any

from etils import epath
from tqdm import tqdm

from sedd_jax import distributed
from sedd_jax.config import write_atomically
from sedd_jax.training import metrics


def say(text: str) -> None:
    if distributed.is_leader():
        tqdm.write(text, file=sys.stderr)


class Report:
    """The files of one run. Every process makes the same calls."""

    def __init__(self, workdir: epath.Path, *, step: int):
        """Entries after `step`, of steps that will be done again, go."""
        self._workdir = workdir
        self._log = metrics.Log(workdir, step=step) if distributed.is_leader() else None

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
            lines = metrics.Log.lines(self._workdir / "metrics.jsonl")
            evaluated = any(line["step"] == step and "eval_nats_per_token" in line for line in lines)
            return json.dumps([evaluated, (self._workdir / "samples" / f"{step}.txt").exists()]).encode()

        evaluated, sampled = json.loads(distributed.from_leader("reported", look))
        return evaluated, sampled

    def bar(self, *, step: int, steps: int) -> tqdm:
        quiet = {} if sys.stderr.isatty() else {"mininterval": 10}
        return tqdm(
            total=steps,
            initial=step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not distributed.is_leader(),
            **quiet,
        )

    def final(self, step: int) -> dict[str, Any]:
        """Draws the plot and returns the values for the last step, so that a run already done answers the same."""
        final: dict[str, Any] = {"step": step, "train_loss": None, "eval_bits_per_byte": None}
        if self._log:
            metrics.plot(self._workdir)
            for line in metrics.Log.lines(self._workdir / "metrics.jsonl"):
                if line["step"] == step:
                    final |= line
        return final | {"workdir": str(self._workdir)}

    def close(self) -> None:
        if self._log:
            self._log.close()
