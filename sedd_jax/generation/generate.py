"""Samples of a trained model for windows with given positions: all at once, or step by step to watch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from sedd_jax import sampling
from sedd_jax.devices import processes
from sedd_jax.generation.templates import FREE
from sedd_jax.generation.trajectory import Frame
from sedd_jax.training.experiment import Trained
from sedd_jax.training.options import SamplingOptions
from sedd_jax.typing import TokenRows


class Generated(NamedTuple):
    """seconds: for the samples, after compilation. calls: network evaluations for a batch, the most of all batches."""

    tokens: TokenRows
    changed: TokenRows
    calls: int
    clipped: float
    seconds: float


@dataclass(frozen=True)
class Generator:
    """Samples windows, batch_size at a time; the samples do not depend on it. There is one sample per window, whose
    index is the window's; options.num is ignored."""

    trained: Trained
    options: SamplingOptions
    batch_size: int
    _compiled: dict[tuple[int, int], jax.stages.Compiled] = field(default_factory=dict)

    def generate(self, windows: TokenRows, *, steps: int, seed: int) -> Generated:
        """Compiles once per shape; another number of steps, or other windows, do not compile again."""
        params, key = self.trained.params, jax.random.key(seed)
        with jax.set_mesh(self.trained.experiment.mesh):
            batches = list(self._batches(windows))
            shape = batches[0][1][1].shape
            if shape not in self._compiled:
                sample_fn = self.trained.experiment.sample_fn(self.options)
                self._compiled[shape] = sample_fn.lower(params, key, batches[0][1], steps, 0).compile()
            processes.barrier("compiled")
            start = time.perf_counter()
            bar = tqdm(batches, desc="sampling", unit="batch", delay=2, disable=not processes.is_leader(), leave=False)
            parts = [jax.device_get(self._compiled[shape](params, key, clamp, steps, first)) for first, clamp in bar]
        return _joined(parts, len(windows), time.perf_counter() - start)

    def watch(self, windows: TokenRows, *, steps: int, seed: int, show: Callable[[Frame], None]) -> Generated:
        """The samples of `generate`, by the same events in a Python loop; `show` gets each batch after each event.

        The seconds include `show` and compilation.
        """
        begin, advance, count_events = self.trained.experiment.event_fns(self.options)
        start, parts = time.perf_counter(), []
        with jax.set_mesh(self.trained.experiment.mesh):
            for first, clamp in self._batches(windows):
                arguments = self.trained.params, jax.random.key(seed), clamp, steps, first
                size = min(len(clamp[1]), len(windows) - first)
                length, state = int(count_events(*arguments)), begin(*arguments)
                for number in range(length + 1):
                    state = advance(*arguments, state, number) if number else state
                    tokens, changed = (array[:size] for array in jax.device_get((state.x, state.changed)))
                    show(Frame(first, number, length, tokens, changed))
                parts.append(jax.device_get(sampling.as_sample(state)))
        return _joined(parts, len(windows), time.perf_counter() - start)

    def _batches(self, windows: TokenRows) -> Iterator[tuple[int, sampling.Clamp]]:
        """(index of its first window, clamp) of each batch; the last one is filled with repeats."""
        size, place = min(self.batch_size, len(windows)), self.trained.experiment.place
        for first in range(0, len(windows), size):
            batch = windows[np.minimum(np.arange(first, first + size), len(windows) - 1)]
            yield first, (place(batch != FREE), place(np.maximum(batch, 0)))


def _joined(parts: list[sampling.Sample], num: int, seconds: float) -> Generated:
    tokens, changed = (np.concatenate([getattr(part, name) for part in parts])[:num] for name in ("tokens", "changed"))
    clipped = float(np.mean([part.clipped for part in parts]))
    return Generated(tokens, changed, int(max(part.calls for part in parts)), clipped, seconds)
