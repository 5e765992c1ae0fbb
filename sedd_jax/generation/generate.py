"""Samples of a trained model for windows of which any positions are given: all at once, or step by step to look on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from sedd_jax import sampling
from sedd_jax.devices import processes
from sedd_jax.generation.film import Frame
from sedd_jax.generation.templates import FREE
from sedd_jax.sampling.reverse import State
from sedd_jax.training.experiment import SamplingOptions, Trained


class Drawn(NamedTuple):
    """seconds: for the samples, after compilation. calls: network evaluations for a batch, the most of all batches."""

    tokens: Int[np.ndarray, "b l"]
    changed: Int[np.ndarray, "b l"]
    calls: int
    clipped: float
    seconds: float


@dataclass(frozen=True)
class Drawing:
    """Windows are drawn batch_size at a time, which gives the samples that all at once would give. options.num is not
    looked at: there is a sample per window, and its number is that of the window."""

    trained: Trained
    options: SamplingOptions
    batch_size: int
    _compiled: dict[tuple[int, int], jax.stages.Compiled] = field(default_factory=dict)

    def draw(self, windows: Int[np.ndarray, "b l"], *, steps: int, seed: int) -> Drawn:
        """Compiles once per shape: another number of steps, or other windows, do not compile again."""
        with jax.set_mesh(self.trained.experiment.mesh):
            slices = list(self._slices(windows))
            key = jax.random.key(seed)
            shape = slices[0][1][1].shape
            if shape not in self._compiled:
                sample_fn = self.trained.experiment.sample_fn(self.options)
                self._compiled[shape] = sample_fn.lower(self.trained.params, key, slices[0][1], steps, 0).compile()
            processes.barrier("compiled")
            start = time.perf_counter()
            parts = [
                jax.device_get(self._compiled[shape](self.trained.params, key, clamp, steps, first))
                for first, clamp in tqdm(
                    slices, desc="sampling", unit="slice", delay=2, disable=not processes.is_leader(), leave=False
                )
            ]
        return _whole(parts, len(windows), time.perf_counter() - start)

    def watch(self, windows: Int[np.ndarray, "b l"], *, steps: int, seed: int, show: Callable[[Frame], None]) -> Drawn:
        """The samples of `draw`, by the same events in a loop of Python's; `show` gets each batch after each event.

        The seconds include what `show` takes, and compilation.
        """
        begin, advance, length_of = self.trained.experiment.event_fns(self.options)
        start, parts = time.perf_counter(), []
        with jax.set_mesh(self.trained.experiment.mesh):
            for first, clamp in self._slices(windows):
                arguments = self.trained.params, jax.random.key(seed), clamp, steps, first
                rows = min(len(clamp[1]), len(windows) - first)
                length, state = int(length_of(*arguments)), begin(*arguments)
                show(_frame(state, first, 0, length, rows))
                for number in range(1, length + 1):
                    state = advance(*arguments, state, number)
                    show(_frame(state, first, number, length, rows))
                parts.append(jax.device_get(sampling.as_sample(state)))
        return _whole(parts, len(windows), time.perf_counter() - start)

    def _slices(self, windows: Int[np.ndarray, "b l"]) -> Iterator[tuple[int, sampling.Clamp]]:
        """(number of its first window, clamp) of each batch; the last one is filled up with repeats."""
        size = min(self.batch_size, len(windows))
        for first in range(0, len(windows), size):
            rows = windows[first : first + size]
            rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
            yield first, tuple(map(self.trained.experiment.place, (rows != FREE, np.maximum(rows, 0))))


def _frame(state: State, first: int, number: int, length: int, rows: int) -> Frame:
    tokens, changed = jax.device_get((state.x, state.changed))
    return Frame(first, number, length, tokens[:rows], changed[:rows])


def _whole(parts: list[sampling.Sample], num: int, seconds: float) -> Drawn:
    return Drawn(
        tokens=np.concatenate([part.tokens for part in parts])[:num],
        changed=np.concatenate([part.changed for part in parts])[:num],
        calls=int(max(part.calls for part in parts)),
        clipped=float(np.mean([part.clipped for part in parts])),
        seconds=seconds,
    )
