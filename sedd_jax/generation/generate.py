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
    """seconds: for the samples, after compilation. calls: network evaluations for a batch, the most of all batches.
    weights: log_weight and origin [B] of samples that keep rules, see `sampling.probability`."""

    tokens: TokenRows
    changed: TokenRows
    calls: int
    clipped: float
    seconds: float
    weights: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Generator:
    """Samples windows, one sample for each, batch_size at a time; the samples do not depend on it.
    constraint: rules of the windows; equal windows of a batch are a population then, and samples do depend on it."""

    trained: Trained
    options: SamplingOptions
    batch_size: int
    constraint: sampling.Constraint | None = None
    _compiled: dict[tuple[int, int], jax.stages.Compiled] = field(default_factory=dict)

    def generate(self, windows: TokenRows, *, steps: int, seed: int) -> Generated:
        """Compiles once per shape; another number of steps, or other windows, do not compile again."""
        mesh = self.trained.experiment.mesh
        shape = sharding.whole_shards(min(self.batch_size, len(windows)), mesh), windows.shape[1]
        if shape not in self._compiled:
            with jax.set_mesh(mesh):
                sample_fn = self.trained.experiment.sample_fn(self.options)
                abstract = partial(jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh))
                batch = jax.tree.map(lambda a: abstract((shape[0], *a.shape[1:]), a.dtype), self._sequences(windows))
                arguments = self.trained.params, jax.random.key(seed), batch, steps, 0, *self._automaton
                self._compiled[shape] = sample_fn.lower(*arguments).compile()
        processes.barrier("compiled")
        return self._map(self._compiled[shape], windows, steps, seed, progress="sampling")

    def watch(self, windows: TokenRows, *, steps: int, seed: int, show: Callable[[Frame], None]) -> Generated:
        """The samples of `generate`, by the same events in a Python loop; `show` gets each batch after each event."""
        begin, advance, count_events = self.trained.experiment.event_fns(self.options)

        def run(*arguments: Any) -> sampling.Sample:
            first, size = arguments[4], len(windows) - arguments[4]
            length, state = int(count_events(*arguments)), begin(*arguments)
            for number in range(length + 1):
                state = advance(*arguments, state, number) if number else state
                tokens, changed = (array[:size] for array in jax.device_get((state.x, state.changed)))
                show(Frame(first, number, length, tokens, changed))
            return sampling.as_sample(state)

        return self._map(run, windows, steps, seed)

    def _map(self, run: Callable, windows: TokenRows, steps: int, seed: int, **options: Any) -> Generated:
        start, costs, key = time.perf_counter(), [], jax.random.key(seed)

        def batch(sequences: tuple[Any, ...], first: int) -> tuple[jax.Array, ...]:
            sample = run(self.trained.params, key, sequences, steps, first, *self._automaton)
            costs.append((sample.calls, sample.clipped, sample.failed))
            return sample.tokens, sample.changed, *((sample.log_weight, sample.origin) if self.constraint else ())

        map_batches = self.trained.experiment.map_batches
        tokens, changed, *weights = map_batches(batch, self._sequences(windows), self.batch_size, **options)
        calls, clipped, failed = zip(*jax.device_get(costs), strict=True)
        sampling.require_sound(np.array(failed))
        seconds = time.perf_counter() - start
        return Generated(tokens, changed, int(max(calls)), float(np.mean(clipped)), seconds, tuple(weights))

    def _sequences(self, windows: TokenRows) -> tuple[Any, ...]:
        rules = (self.constraint.rules,) if self.constraint else ()
        return windows != FREE, np.maximum(windows, 0).astype(np.int32), *rules

    @property
    def _automaton(self) -> tuple[sampling.Automaton, ...]:
        return (self.constraint.automaton,) if self.constraint else ()
