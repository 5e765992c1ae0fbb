"""Compiles a training step and the sampler for TPU topologies ahead of time, and reports what they need.

The functions are those of training and sampling; only their arguments are abstract. XLA reports the bytes per chip. The
text of the program gives FLOPs, bytes to and from HBM and bytes between chips (`costs`), which are compared with the
least possible (`least`).
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sedd_jax.aot import costs
from sedd_jax.aot.hlo import Program
from sedd_jax.aot.least import least_traffic, roofline
from sedd_jax.devices import chips, sharding
from sedd_jax.devices.chips import Chip
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.network import chunk_size
from sedd_jax.training import flops
from sedd_jax.training.experiment import Experiment, make_experiment

TARGETS = ("train", "sample", "both")


def topology_devices(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """The devices of `num_slices` TPU slices such as 'v5e:4x4', for compilation only.

    Raises InputError without libtpu, or for a name that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology needs libtpu, which is not installed: pip install 'sedd_jax[aot]' (Linux, x86-64)")
    if num_slices < 1:
        raise InputError(f"--num_slices={num_slices} must be at least 1")
    # libtpu would otherwise ask a metadata server for these; their values do not matter.
    for variable, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    # Both cores of a v4 chip are one device, as on real machines; for later versions that is the default.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].split("\n")[0]
        raise InputError(f"--topology={name} is not known to libtpu, unlike v5e:4x4 ({reason})") from error


def report(config: ConfigDict, *, topology: str, num_slices: int, vocab_size: int, what: str) -> dict[str, Any]:
    """Compiles `what` ('train', 'sample' or 'both') and returns the figures of the final line.

    Raises InputError for a config that does not fit the topology, TrainingError for a program that does not fit a chip.
    """
    if what not in TARGETS:
        raise InputError(f"--what={what} is unknown; choose one of {', '.join(TARGETS)}")
    devices = topology_devices(topology, num_slices)
    experiment = make_experiment(config, vocab_size, devices)
    mesh, length = experiment.mesh, config.data.length
    kind = devices[0].device_kind
    chip = chips.of_kind(kind)
    if chip is None:
        raise InputError(f"--topology={topology}: sedd_jax/devices/chips.py has no figures of {kind!r} yet; add them")
    result: dict[str, Any] = {
        "topology": topology,
        "num_slices": num_slices,
        "chips": mesh.size,
        "device_kind": kind,
        "mesh": dict(mesh.shape),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.abstract_state().params)),
        "length": length,
    }
    if what != "sample":
        experiment.train.check(mesh)
        chunks = mean_chunks(experiment, length)
    with jax.set_mesh(mesh):
        if what != "sample":
            result["train"] = _train(experiment, length, chip, chunks)
        if what != "train":
            result["sample"] = _sample(experiment, length, chip)
    return result


def mean_chunks(experiment: Experiment, length: int) -> int:
    """Chunks of the loss on one chip for a microbatch of average noise: its loop ends with the last position that
    contributes (`score_entropy.loss_and_grads`)."""
    noised = experiment.objective.noised(jax.random.key(0), jnp.zeros((512, 128), jnp.int32))
    share = float(experiment.objective.contributes(noised.x).mean())
    options = experiment.train
    positions = options.batch_size * length // sharding.batch_shards(experiment.mesh) // options.microbatches
    return math.ceil(share * positions / chunk_size(positions))


def _train(experiment: Experiment, length: int, chip: Chip, chunks: int) -> dict[str, Any]:
    mesh, state, options = experiment.mesh, experiment.abstract_state(), experiment.train
    tokens = jax.ShapeDtypeStruct((options.batch_size, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    flops_per_token = flops.train_flops_per_token(experiment.model, length)
    useful, step = flops_per_token * tokens.size, experiment.train_step_fn()
    figures = _figures(step, (state, _key(), tokens), "the training step", mesh, chip, useful, data_trips=chunks)
    held = {"params": state.params, "ema": state.ema, "moments": state.opt_state, "batch": tokens}
    minimum = least_traffic(state.params, experiment, tokens=tokens.size, microbatches=options.microbatches)
    return _compared(figures, held, minimum) | {
        "batch_size": options.batch_size,
        "microbatches": options.microbatches,
        "flops_per_step": useful,
        "flops_per_token": flops_per_token,
        "tokens_per_second": tokens.size / figures["roofline"]["step_seconds"],
    }


def _sample(experiment: Experiment, length: int, chip: Chip) -> dict[str, Any]:
    mesh, options = experiment.mesh, experiment.sampling
    split = options.num % sharding.batch_shards(mesh) == 0
    place = sharding.batch_sharding(mesh) if split else sharding.replicated(mesh)
    clamp = [jax.ShapeDtypeStruct((options.num, length), dtype, sharding=place) for dtype in (jnp.bool_, jnp.int32)]
    params = experiment.abstract_state().params
    causal = experiment.model.causal  # One position of each sequence per call.
    calls, tokens = (length, options.num) if causal else (options.steps + 1, options.num * length)
    # A forward pass is a third of a step. If the mesh does not divide the samples, every chip computes all of them.
    flops_per_call = flops.train_flops_per_token(experiment.model, length) // 3 * tokens
    copies = 1 if split else sharding.batch_shards(mesh)
    function, useful = experiment.sample_fn(options, options.steps), flops_per_call * calls * copies
    figures = _figures(function, (params, _key(), tuple(clamp)), "the sampler", mesh, chip, useful)
    minimum = least_traffic(params, experiment, tokens=tokens * copies, microbatches=calls, training=False)
    return _compared(figures, {"params": params}, minimum) | {
        "num": options.num,
        "split": split,
        "network_calls": calls,
        "flops_per_call": flops_per_call,
        "program_flops_per_chip_per_call": figures["program_flops_per_chip"] / calls,
        "memory_traffic_per_call": figures["memory_traffic"] / calls,
        "seconds_per_call": figures["roofline"]["step_seconds"] / calls,
    }


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def _figures(
    function: jax.stages.Wrapped,
    arguments: tuple,
    name: str,
    mesh: Mesh,
    chip: Chip,
    useful_flops: float,
    data_trips: int = 1,
) -> dict[str, Any]:
    """The needs of the compiled function on one chip."""
    lowered, start = function.lower(*arguments), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _out_of_memory(name, error) from error
    seconds = time.perf_counter() - start
    memory, program = compiled.memory_analysis(), Program(compiled.as_text(), mesh.size, data_trips=data_trips)
    kinds = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    held = {kind: getattr(memory, f"{own}_size_in_bytes") for kind, own in kinds.items()}
    held["code"] = memory.generated_code_size_in_bytes
    held["total"] = sum(held.values()) - 2 * held["aliased"]  # Outputs in the place of arguments count once.
    collectives: dict[str, dict[str, float]] = {}
    for entry in costs.collectives(program):
        figures = collectives.setdefault(entry.kind, {"count": 0, "bytes": 0.0})
        figures["count"] += entry.executions
        figures["bytes"] += entry.executions * entry.bytes
    flops, sent = costs.flops(program), sum(figures["bytes"] for figures in collectives.values())
    traffic = costs.memory_traffic(program)
    return {
        "bytes_per_chip": held,
        "memory": chip.memory,
        "fits": held["total"] <= chip.memory,
        "headroom": chip.memory - held["total"],
        "program_flops_per_chip": flops,
        "xla_flops_per_chip": compiled.cost_analysis()["flops"],
        "program_flops_per_chip_loops_once": costs.flops(program, loops_once=True),
        "data_dependent_loops": program.data_dependent_loops,
        "data_dependent_trips": data_trips,
        "unknown_trip_counts": program.unknown_trip_counts,
        "memory_traffic": traffic,
        "collectives": collectives,
        "collective_bytes": sent,
        "roofline": roofline(chip, flops=flops, traffic=traffic, sent=sent, useful_flops=useful_flops / mesh.size),
        "compile_seconds": round(seconds, 1),
    }


def _compared(figures: dict[str, Any], held: dict[str, Any], minimum: dict[str, float]) -> dict[str, Any]:
    """The figures with the bytes of the trees that a chip holds, and its collectives against the least possible."""
    sizes = {
        kind: sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        for kind, leaves in ((kind, jax.tree.leaves(tree)) for kind, tree in held.items())
    }
    least = sum(minimum.values())
    return figures | {
        "bytes_per_chip": sizes | figures["bytes_per_chip"],
        "collective_bytes_minimum": least,
        "collective_bytes_minimum_by_axis": minimum,
        "collective_bytes_ratio": figures["collective_bytes"] / least if least else None,
    }


def _out_of_memory(name: str, error: jax.errors.JaxRuntimeError) -> Exception:
    """A TrainingError if the program does not fit; any other error unchanged."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    # "... required for HLO temporaries (37.25G) exceeds available HBM (15.75G)", or "Used 37.25G of 15.75G hbm".
    sizes = re.findall(r"\b[\d.]+[KMGT]\b", str(error))
    needs = f"needs {sizes[0]}iB of {sizes[1]}iB" if len(sizes) > 1 else str(error).split("\n")[0]
    return TrainingError(
        f"{name} does not fit a chip: it {needs}; split more (mesh.fsdp), recompute (model.remat), or take "
        "train.microbatches or a smaller batch"
    )


def describe(result: dict[str, Any], say: Callable[[str], None]) -> None:
    """Prints the figures for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    say(f"{result['parameters']:,} parameters on {result['chips']} x {result['device_kind']} ({mesh})")
    for name, figures in ((name, result[name]) for name in ("train", "sample") if name in result):
        held, roof = figures["bytes_per_chip"], figures["roofline"]
        say(f"{name}: compiled in {figures['compile_seconds']} s")
        say("  memory per chip, GB: " + ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in held.items()))
        say(
            f"  {'fits' if figures['fits'] else 'DOES NOT FIT'}: {held['total'] / 1e9:.2f} of "
            f"{figures['memory'] / 1e9:.0f} GB, {figures['headroom'] / 1e9:.2f} GB left"
        )
        once, xla = figures["program_flops_per_chip_loops_once"], figures["xla_flops_per_chip"]
        say(
            f"  TFLOPs per chip: {figures['program_flops_per_chip'] / 1e12:.3f} in matrix products, loops multiplied "
            f"out ({once / 1e12:.3f} with each loop body once; XLA's cost analysis, which counts so too, with other "
            f"operations and without kernels, says {xla / 1e12:.3f})"
        )
        if name == "train":
            share = figures["flops_per_step"] / result["chips"]
            say(
                f"  by the formula, with the head at every position: {share / 1e12:.3f} "
                f"({figures['flops_per_token'] / 1e9:.3f} GFLOPs per token)"
            )
        for kind, entry in figures["collectives"].items():
            say(f"  {kind}: {entry['count']:,} per run, {entry['bytes'] / 1e9:.4f} GB sent per chip")
        least, ratio = figures["collective_bytes_minimum"], figures["collective_bytes_ratio"]
        times = f"{ratio:.2f} times the least" if ratio else "more than the least"
        say(f"  collectives in all: {figures['collective_bytes'] / 1e9:.4f} GB, {times}, {least / 1e9:.4f} GB")
        say(
            f"  at published peaks: compute {roof['compute_seconds'] * 1e3:.1f} ms, HBM "
            f"{roof['memory_seconds'] * 1e3:.1f} ms, links {roof['link_seconds'] * 1e3:.1f} ms; MFU "
            f"{roof['mfu']:.0%} if all overlap, "
            f"{roof['mfu_serial']:.0%} if nothing does"
        )
        if figures["data_dependent_loops"]:
            say(f"  loops over noised positions were counted {figures['data_dependent_trips']} times: average noise")
        if figures["unknown_trip_counts"]:
            say(f"  {figures['unknown_trip_counts']} loops of unknown length were counted once")
