"""How often the loops run whose end depends on the data, on average: those through noised positions in chunks.

Each stands in a named scope: "loss", "diffusion", "reconstruction", "exact", "step", "denoise", "first_hitting" or
"ordered" (and "events", the calls of these two). Averages are of whole chunks. Noise levels are those of the schedule;
a sampler's too, if its scores are right.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.devices import sharding
from sedd_jax.errors import InputError
from sedd_jax.network import chunk_size
from sedd_jax.rates import Absorbing
from sedd_jax.sampling.sampler import END_TIME, GRID_METHODS, grid_time
from sedd_jax.training.experiment import Experiment

DRAWS = 256


class Loop(NamedTuple):
    """calls: network calls of a run that the loop belongs to. share: of their positions that go through the head.
    trips: of the loop each time. slowest: of the device with the most, on which the others wait."""

    calls: int
    share: float
    trips: float
    slowest: float


def _loop(share: np.ndarray, length: int, rows: int, calls: int) -> Loop:
    """share: [draws, devices, sequences of one]; one chunk has `rows` positions."""
    trips = -(-np.random.default_rng(0).binomial(length, share).sum(-1) // rows)
    return Loop(calls, float(share.mean()), float(trips.mean()), float(trips.max(-1).mean()))


def training(experiment: Experiment, length: int) -> dict[str, Loop]:
    options, shards = experiment.train, sharding.batch_shards(experiment.mesh)
    # Sequences as `split_microbatches` deals them out.
    parts = experiment.head_share().reshape(-1, options.microbatches).T.reshape(options.microbatches, shards, -1)
    return {"loss": _loop(parts, length, chunk_size(parts.shape[-1] * length), options.microbatches)}


def evaluation(experiment: Experiment, length: int, batch_size: int) -> dict[str, Loop]:
    shards, num_times = sharding.batch_shards(experiment.mesh), experiment.eval.num_times
    shape = DRAWS, shards, batch_size // shards
    rows = chunk_size(shape[-1] * length)
    if experiment.model.causal:
        return {"exact": _loop(np.ones(shape), length, rows, 1)}
    # Each sequence has stratified times, or counts of masked positions, of its own: uniform in every call.
    estimator, draws = experiment.eval.estimator, np.random.default_rng(1).uniform(size=shape)
    if estimator == "orders":
        raise InputError("eval.estimator='orders' calls the network once per token and order: compile another one")
    by_count = isinstance(experiment.graph, Absorbing) and estimator in ("auto", "count")
    shares = draws if by_count else experiment.head_share(experiment.noise.total(jnp.asarray(draws)))
    loops = {"diffusion": _loop(shares, length, rows, num_times)}
    if experiment.noise.at_start > 0 and not by_count and estimator != "published":
        loops["reconstruction"] = _loop(np.ones(shape), length, rows, max(2, num_times // 8))
    return loops


def sampling(experiment: Experiment, length: int, num: int) -> dict[str, Loop]:
    """Of a step, the noise at its start. "next": the AR baseline, one position per call and no chunks."""
    options, shards = experiment.sampling, sharding.batch_shards(experiment.mesh)
    shape = shards, num // shards
    rows = min(options.rows, shape[-1] * length)
    if experiment.model.causal:
        return {"next": Loop(length, 1.0, 0.0, 0.0)}
    if options.method == "first_hitting":
        per_call = -(-length // options.steps)
        calls, trips = -(-length // per_call), -(-shape[-1] * per_call // rows)
        return {"first_hitting": Loop(calls, per_call / length, trips, trips), "events": Loop(0, 0.0, calls, calls)}
    if options.method not in GRID_METHODS:  # the most calls that 'entropy' may take
        per_call = -(-length // options.steps)
        left = np.arange(length, 0, -per_call)
        trips = float(np.mean(-(-shape[-1] * left // rows)))
        ordered = Loop(len(left), float(np.mean(left)) / length, trips, trips)
        return {"ordered": ordered, "events": Loop(0, 0.0, len(left), len(left))}
    grid = jax.vmap(partial(grid_time, options.grid))(jnp.arange(options.steps) / options.steps)
    calls = options.steps * (options.corrector_steps + 1 + (options.method == "trapezoidal"))

    def loop(t: Any, calls: int) -> Loop:
        shares = experiment.head_share(experiment.noise.total(t))[:, None, None]
        return _loop(np.broadcast_to(shares, (len(t), *shape)), length, rows, calls)

    return {"step": loop(grid, calls), "denoise": loop(jnp.full(DRAWS, END_TIME), 1)}
