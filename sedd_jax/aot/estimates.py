"""What a config says of a program without compiling it: trips of its loops, the least bytes between chips and seconds.

Loops through noised positions in chunks end with the data. Each stands in a named scope: "loss", "diffusion",
"reconstruction", "exact", "step", "denoise", "first_hitting" or "ordered" (and "events", the calls of these two). Trips
are averages of whole chunks, at the noise levels of the schedule; a sampler has those too, if its scores are right.

docs/tpu.md derives the bytes that one chip sends, by mesh axis. Sources: Rajbhandari et al. 2020 (ZeRO), section 7;
Shoeybi et al. 2019 (Megatron-LM), section 3; Patarasuk and Yuan 2009 for the rings."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.devices import chips, sharding
from sedd_jax.errors import InputError
from sedd_jax.network import chunk_size
from sedd_jax.rates import Absorbing
from sedd_jax.sampling.sampler import END_TIME, GRID_METHODS, grid_time
from sedd_jax.training.experiment import Experiment
from sedd_jax.training.step import loss_rows

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
    rows = loss_rows(experiment.mesh, parts.shape[-1] * length)
    return {"loss": _loop(parts, length, rows, options.microbatches)}


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
    if options.method not in GRID_METHODS:  # as many calls as there may be
        scope, per_call = "ordered", -(-length // options.steps)
        drawn = np.arange(length, 0, -per_call)
        if options.method == "first_hitting":
            scope, drawn = options.method, np.full(len(drawn), per_call)
        calls, trips = len(drawn), float(np.mean(-(-shape[-1] * drawn // rows)))
        drawn_share = float(np.mean(drawn)) / length
        return {scope: Loop(calls, drawn_share, trips, trips), "events": Loop(0, 0.0, calls, calls)}
    grid = jax.vmap(lambda progress: grid_time(options.grid, progress))(jnp.arange(options.steps) / options.steps)
    calls = options.steps * (options.corrector_steps + 1 + (options.method == "trapezoidal"))

    def loop(t: Any, calls: int) -> Loop:
        shares = experiment.head_share(experiment.noise.total(t))[:, None, None]
        return _loop(np.broadcast_to(shares, (len(t), *shape)), length, rows, calls)

    return {"step": loop(grid, calls), "denoise": loop(jnp.full(DRAWS, END_TIME), 1)}


def roofline(
    chip: chips.Chip, *, flops: float, traffic: float, sent: float, useful: float, full: float
) -> dict[str, float]:
    """Seconds of a run on a chip: `step_seconds` if computing, HBM and links work at once at their peaks (the least
    possible), `step_seconds_serial` in turns. mfu: useful FLOPs' share of the peak; mfu_full: head everywhere."""
    parts = {"compute_seconds": flops / chip.flops, "memory_seconds": traffic / chip.memory_bandwidth}
    parts["link_seconds"] = sent / chip.link_bandwidth
    longest, together = max(parts.values()), sum(parts.values())
    shares = {"mfu": useful / longest, "mfu_serial": useful / together, "mfu_full": full / longest}
    seconds = {"step_seconds": longest, "step_seconds_serial": together}
    return parts | seconds | {name: share / chip.flops for name, share in shares.items()}


def least_traffic(
    params: Any, experiment: Experiment, *, batch: int, calls: int, gradient_dtype: str, results: int, training: bool
) -> dict[str, float]:
    """Bytes that a chip must send per run, by mesh axis. batch: global tokens of a network call. calls: of the network;
    microbatches. results: bytes that every chip gets, of which each has computed its share. Without training, weights
    are gathered once per call and activations all-reduced in the forward pass only."""
    mesh, model = experiment.mesh, experiment.model
    data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.MESH_AXES)
    width, summed = (jnp.dtype(dtype).itemsize for dtype in (model.dtype, gradient_dtype))
    local = batch // (data * fsdp)  # tokens of one chip, at a time
    least = {"data": 0.0, "fsdp": 0.0, "tensor": 0.0}
    ring = lambda group: (group - 1) / group  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = [axis for axes in leaf.sharding.spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)]
        size = math.prod(leaf.shape) / (tensor if "tensor" in axes else 1)
        split = "fsdp" in axes
        if path[0].key == "embedding":
            moved = min(size, local * model.dim) * (width + (summed if training else 0))
        else:
            moved = size * (2 * width + summed if training else width)
        least["fsdp"] += calls * moved * ring(fsdp) if split else 0
        if training:
            group = data if split else data * fsdp
            least["data"] += 2 * ring(group) * size * summed / (fsdp if split else 1)
    least["data"] += results * ring(data * fsdp)
    head_is_split = "tensor" in str(params["head"]["kernel"].sharding.spec)
    reductions = 4 * model.num_layers + head_is_split if training else 2 * model.num_layers
    least["tensor"] = calls * reductions * 2 * ring(tensor) * local * model.dim * width
    return least
