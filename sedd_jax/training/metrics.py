"""What a run reports: metrics.jsonl, TensorBoard events, a plot, and how fast it was against what the chip can do."""

import json
import math
import time

import jax
import jax.numpy as jnp
from etils import epath
from tensorboardX import SummaryWriter

from sedd_jax.config import write_atomically
from sedd_jax.training import chips
from sedd_jax.transformer import Transformer


def train_flops_per_token(model: Transformer, length: int) -> int:
    """FLOPs of the matrix products of a training step, per token: 6 per weight, and attention's 12 L dim per layer.

    Of a causal model's attention half: its queries have (L + 1) / 2 keys on average.

    Three times the forward pass (2 per weight, 4 L dim per layer). The embedding is a look-up and the conditioning is
    per sequence: neither counts. Recomputation (remat) is not counted either, so MFU is a share of useful work.
    """
    keys = (length + 1) // 2 if model.causal else length
    weights = model.num_layers * (4 + 2 * model.mlp_ratio) * model.dim**2 + model.dim * model.num_states
    return 6 * weights + 12 * model.num_layers * keys * model.dim


def matmul_rate(size: int = 1536, dtype: str = "float32", seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on one device, measured."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        product(a, a).block_until_ready()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def peak_flops() -> float:
    """FLOP/s of all devices together: published, or for a device that is not in the table (a CPU) measured."""
    kind = jax.devices()[0].device_kind
    if chip := chips.of_kind(kind):
        return chip.flops * jax.device_count()
    # Virtual CPU devices share the cores of their host.
    return matmul_rate() * (jax.process_count() if kind == "cpu" else jax.device_count())


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
