"""Samples of a trained model for windows with given positions: all at once, or step by step to watch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sedd_jax import sampling
from sedd_jax.devices import processes, sharding
from sedd_jax.generation.templates import FREE
from sedd_jax.generation.trajectory import Frame
from sedd_jax.training.options import SamplingOptions
from sedd_jax.training.trained import Trained
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
    """Samples windows, one sample for each, batch_size at a time; the samples do not depend on it."""

    trained: Trained
    options: SamplingOptions
    batch_size: int
    _compiled: dict[tuple[int, int], jax.stages.Compiled] = field(default_factory=dict)

    def generate(self, windows: TokenRows, *, steps: int, seed: int) -> Generated:
        """Compiles once per shape; another number of steps, or other windows, do not compile again."""
        mesh = self.trained.experiment.mesh
        shape = sharding.whole_shards(min(self.batch_size, len(windows)), mesh), windows.shape[1]
        if shape not in self._compiled:
            with jax.set_mesh(mesh):
                sample_fn = self.trained.experiment.sample_fn(self.options)
                abstract = partial(jax.ShapeDtypeStruct, shape, sharding=sharding.batch_sharding(mesh))
                clamp = abstract(dtype=bool), abstract(dtype=np.int32)
                arguments = self.trained.params, jax.random.key(seed), clamp, steps, 0
                self._compiled[shape] = sample_fn.lower(*arguments).compile()
        processes.barrier("compiled")
        return self._map(self._compiled[shape], windows, steps, seed, progress="sampling")

    def watch(self, windows: TokenRows, *, steps: int, seed: int, show: Callable[[Frame], None]) -> Generated:
        """The samples of `generate`, by the same events in a Python loop; `show` gets each batch after each event."""
        begin, advance, count_events = self.trained.experiment.event_fns(self.options)

        def run(*arguments: Any) -> sampling.Sample:
            first, size = arguments[-1], len(windows) - arguments[-1]
            length, state = int(count_events(*arguments)), begin(*arguments)
            for number in range(length + 1):
                state = advance(*arguments, state, number) if number else state
                tokens, changed = (array[:size] for array in jax.device_get((state.x, state.changed)))
                show(Frame(first, number, length, tokens, changed))
            return sampling.as_sample(state)

        return self._map(run, windows, steps, seed)

    def _map(
        self, run: Callable[..., sampling.Sample], windows: TokenRows, steps: int, seed: int, **options: Any
    ) -> Generated:
        start, costs, key = time.perf_counter(), [], jax.random.key(seed)

        def batch(clamp: tuple[jax.Array, jax.Array], first: int) -> tuple[jax.Array, jax.Array]:
            sample = run(self.trained.params, key, clamp, steps, first)
            costs.append((sample.calls, sample.clipped, sample.failed))
            return sample.tokens, sample.changed

        clamp = windows != FREE, np.maximum(windows, 0).astype(np.int32)
        tokens, changed = self.trained.experiment.map_batches(batch, clamp, self.batch_size, **options)
        calls, clipped, failed = zip(*jax.device_get(costs), strict=True)
        sampling.require_sound(np.array(failed))
        return Generated(tokens, changed, int(max(calls)), float(np.mean(clipped)), time.perf_counter() - start)
