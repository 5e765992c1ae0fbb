"""Compiles a training step, the evaluation and the sampler for TPU topologies, and reports what they need.

The functions are those that run; only their arguments are abstract. XLA reports the bytes per chip. Its text gives
FLOPs, bytes to and from HBM and between chips (`costs`), to compare with the least possible (`estimates`)."""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from sedd_jax.aot import costs, estimates
from sedd_jax.aot.hlo import Program
from sedd_jax.devices import chips, sharding
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.training import flops
from sedd_jax.training.experiment import Experiment, make_experiment
from sedd_jax.training.options import MOST
from sedd_jax.transformer.model import DTYPES

TARGETS = ("train", "evaluate", "sample", "all")
_key = partial(jax.eval_shape, partial(jax.random.key, 0))


def topology_devices(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """The devices of `num_slices` TPU slices such as 'v5e:4x4', to compile for. Raises InputError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology needs libtpu, which is not installed: pip install 'sedd_jax[aot]' (Linux, x86-64)")
    # libtpu would otherwise ask a metadata server for these; their values do not matter.
    asked = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.update({"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | asked | dict(os.environ))
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


def known_chip(device: jax.Device) -> chips.Chip:
    if (chip := chips.of_kind(device.device_kind)) is None:
        raise InputError(f"sedd_jax/devices/chips.py has no figures of {device.device_kind!r} yet; add them")
    return chip


def bytes_per_chip(tree: Any) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


class _Program(NamedTuple):
    """What `report` compiles. num: sequences. parts: of a batch, by microbatch or token. held: beside parameters."""

    name: str
    function: jax.stages.Wrapped
    arguments: tuple
    num: int
    loops: dict[str, estimates.Loop]
    parts: int = 1
    held: dict[str, Any] = {}  # noqa: RUF012 (never changed)


def report(config: ConfigDict, *, topology: str, num_slices: int, vocab_size: int, what: str) -> dict[str, Any]:
    """Compiles `what`, one of TARGETS, and returns the figures of the final line. Raises InputError for a config that
    does not fit the topology, TrainingError for a program that does not fit a chip."""
    if config.model.get("lora_rank"):
        raise InputError(f"model.lora_rank={config.model.lora_rank}: programs with adapters are not reported; give 0")
    devices = topology_devices(topology, num_slices)
    experiment = make_experiment(config, vocab_size, devices)
    mesh, length = experiment.mesh, config.data.length
    chip = known_chip(devices[0])
    result: dict[str, Any] = {"topology": topology, "num_slices": num_slices, "chips": mesh.size}
    result |= {"device_kind": devices[0].device_kind, "mesh": dict(mesh.shape), "length": length}
    result["parameters"] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.abstract_state().params))
    result["warnings"] = experiment.unsharded()
    makers = {"train": _train, "evaluate": _evaluate, "sample": _sample}
    # Before the mesh is set: they compute their loops' trips, which its abstract devices cannot.
    programs = {name: make(experiment, length) for name, make in makers.items() if what in (name, "all")}
    with jax.set_mesh(mesh):
        return result | {name: _figures(program, experiment, length, chip) for name, program in programs.items()}


def _train(experiment: Experiment, length: int) -> _Program:
    options, state = experiment.train, experiment.abstract_state()
    options.check(experiment.mesh)
    arguments = state, _key(), _batch(experiment, options.batch_size, length)
    held = {"ema": state.ema, "moments": state.opt_state, "batch": arguments[2]}
    step, loops = experiment.train_step_fn(), estimates.training(experiment, length)
    return _Program("the training step", step, arguments, options.batch_size, loops, options.microbatches, held)


def _evaluate(experiment: Experiment, length: int) -> _Program:
    options, params = experiment.eval, experiment.abstract_state().params
    num = sharding.whole_shards(min(options.batch_size, options.num_sequences or MOST), experiment.mesh)
    arguments = params, _key(), _batch(experiment, num, length), jax.ShapeDtypeStruct((), jnp.int32)
    loops = estimates.evaluation(experiment, length, num)
    return _Program("the evaluation", experiment.bound_fn(options.num_times, options.estimator), arguments, num, loops)


def _sample(experiment: Experiment, length: int) -> _Program:
    options, params = experiment.sampling, experiment.abstract_state().params
    num = sharding.whole_shards(options.num, experiment.mesh)
    arguments = params, _key(), tuple(_batch(experiment, num, length, dtype) for dtype in (jnp.bool_, jnp.int32))
    loops, parts = estimates.sampling(experiment, length, num), length if experiment.model.causal else 1
    return _Program("the sampler", experiment.sample_fn(options, options.steps), arguments, num, loops, parts)


def _batch(experiment: Experiment, num: int, length: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num, length), dtype, sharding=sharding.batch_sharding(experiment.mesh))


def _figures(program: _Program, experiment: Experiment, length: int, chip: chips.Chip) -> dict[str, Any]:
    """The needs of the compiled program on one chip."""
    lowered, start = program.function.lower(*program.arguments), time.perf_counter()
    compiled = _compiled(program.name, lowered)
    figures: dict[str, Any] = {"num": program.num, "compile_seconds": round(time.perf_counter() - start, 1)}
    mesh, loops, training = experiment.mesh, program.loops, bool(program.held)
    memory, slices = compiled.memory_analysis(), len({getattr(chip, "slice_index", 0) for chip in mesh.devices.flat})
    kinds = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    held = {kind: getattr(memory, f"{own}_size_in_bytes") for kind, own in kinds.items()}
    held["code"] = memory.generated_code_size_in_bytes
    held["total"] = sum(held.values()) - 2 * held["aliased"]  # Outputs in the place of arguments count once.
    parts = {"params": experiment.abstract_state().params} | program.held
    figures["bytes_per_chip"] = {kind: bytes_per_chip(tree) for kind, tree in parts.items()} | held
    figures |= {"memory": chip.memory, "fits": held["total"] <= chip.memory, "headroom": chip.memory - held["total"]}
    tokens, calls = program.num * length, sum(loop.calls for loop in loops.values())
    batch, passes = tokens // program.parts, 3 if training else 1
    per_token = partial(flops.flops_per_token, experiment.model, length)
    full = passes * calls * batch * per_token()
    useful = passes * batch * sum(loop.calls * per_token(loop.share) for loop in loops.values())
    figures |= {"microbatches": program.parts, "network_calls": calls, "flops_per_step": useful}
    figures |= {"flops_per_step_full": full, "flops_per_token": useful / tokens, "flops_per_token_full": full / tokens}
    counted = Program(compiled.as_text(), mesh.size // slices, trips={name: loops[name].trips for name in loops})
    done, (traffic, padded) = costs.flops(counted), map(float, costs.memory_traffic(counted))
    figures |= {"program_flops_per_chip": done, "memory_traffic": traffic, "memory_traffic_padded": padded}
    figures["chunk_loops"] = {name: loop._asdict() for name, loop in loops.items()}
    figures |= {"unknown_trip_counts": counted.unknown_trip_counts, "conditionals": counted.conditionals}
    results = 0 if training else 4 * sum(math.prod(a.shape) for a in jax.tree.leaves(lowered.out_info))
    figures |= _collectives(counted, experiment, batch=batch, calls=calls, results=results, training=training)
    done_by = {"flops": done, "traffic": padded, "sent": figures["collective_bytes"]}
    roof = estimates.roofline(chip, **done_by, useful=useful / mesh.size, full=full / mesh.size)
    figures |= {"bytes_between_slices": costs.between_slices(counted, slices), "roofline": roof}
    return figures | {"tokens_per_second": tokens / roof["step_seconds"]}


def _compiled(name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # "... required for HLO temporaries (37.25G) exceeds available HBM (15.75G)", or "Used 37.25G of 15.75G hbm".
        sizes = re.findall(r"\b[\d.]+[KMGT]\b", str(error))
        needs = f"needs {sizes[0]}iB of {sizes[1]}iB" if len(sizes) > 1 else str(error).split("\n")[0]
        remedy = "split more (mesh.fsdp), recompute (model.remat), or take train.microbatches or a smaller batch"
        raise TrainingError(f"{name} does not fit a chip: it {needs}; {remedy}") from error


def _collectives(counted: Program, experiment: Experiment, **options: Any) -> dict[str, Any]:
    """What a chip sends, by kind, and the least that it must. options: those of `least_traffic`."""
    kinds, found, model = dict[str, Counter[str]](), costs.collectives(counted), experiment.model
    for entry in found:
        size = entry.executions * entry.bytes
        figures = {"count": entry.executions, "bytes": size, f"bytes_{entry.dtype}": size}
        kinds.setdefault(entry.kind, Counter()).update(figures)
    sent, dtypes = sum(figures["bytes"] for figures in kinds.values()), DTYPES[: DTYPES.index(model.dtype) + 1]
    made = partial(estimates.least_traffic, experiment.abstract_state().params, experiment, **options)
    axes = {dtype: made(gradient_dtype=dtype) for dtype in dtypes}
    by_dtype = {dtype: sum(each.values()) for dtype, each in axes.items()}
    least, inside = by_dtype[model.gradient_dtype], sum(entry.loop not in ("", "events") for entry in found)
    minimum = {"": least, "_by_axis": axes[model.gradient_dtype], "_by_gradient_dtype": by_dtype}
    figures = {"collectives": kinds, "collectives_in_chunk_loops": inside, "collective_bytes": sent}
    figures |= {f"collective_bytes_minimum{by}": value for by, value in minimum.items()}
    return figures | {"collective_bytes_ratio": sent / least if least else None}


def describe(result: dict[str, Any], say: Callable[[str], None]) -> None:
    """Prints the figures for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    for line in result["warnings"]:
        say(f"warning: {line}")
    say(f"{result['parameters']:,} parameters on {result['chips']} x {result['device_kind']} ({mesh})")
    for name, figures in ((name, result[name]) for name in TARGETS if name in result):
        held, roof = figures["bytes_per_chip"], figures["roofline"]
        fits = f"{'fits' if figures['fits'] else 'DOES NOT FIT'}, {figures['headroom'] / 1e9:.2f} GB left"
        say(f"{name}: {fits}; {figures['network_calls']} network calls, compiled in {figures['compile_seconds']} s")
        say("  memory per chip, GB: " + ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in held.items()))
        useful, full = (figures[f"flops_per_step{kind}"] / result["chips"] / 1e12 for kind in ("", "_full"))
        done = f"{figures['program_flops_per_chip'] / 1e12:.3f} in matrix products"
        say(f"  TFLOPs per chip: {done}; by the formula {useful:.3f}, with the head at every position {full:.3f}")
        moved, padded = (figures[f"memory_traffic{kind}"] / 1e9 for kind in ("", "_padded"))
        say(f"  to and from HBM: {moved:.2f} GB, with the padding of layouts {padded:.2f} GB")
        for kind, entry in figures["collectives"].items():
            say(f"  {kind}: {entry['count']:,.0f} per run, {entry['bytes'] / 1e9:.4f} GB sent per chip")
        sent, least = (figures[f"collective_bytes{kind}"] / 1e9 for kind in ("", "_minimum"))
        say(f"  collectives in all: {sent:.4f} GB, at the least {least:.4f} GB")
        if name == "train":
            price = figures["collective_bytes_minimum_by_gradient_dtype"].items()
            say("  the least by model.gradient_dtype, GB: " + ", ".join(f"{k} {size / 1e9:.4f}" for k, size in price))
        if result["num_slices"] > 1:
            say(f"  between slices: {figures['bytes_between_slices'] / 1e9:.4f} GB sent per chip, over the hosts")
        kinds = {"compute": "compute", "memory": "HBM", "link": "links"}
        times = ", ".join(f"{kind} {roof[f'{name}_seconds'] * 1e3:.1f} ms" for name, kind in kinds.items())
        mfu = f"MFU {roof['mfu']:.0%} if all overlap, {roof['mfu_serial']:.0%} if nothing does"
        say(f"  at published peaks: {times}; {mfu}")
        for scope, loop in figures["chunk_loops"].items():
            trips = f"{loop['trips']:.3g} chunks, {loop['slowest']:.3g} on the slowest chip (mean noise)"
            say(f"  assumed: loop '{scope}' has {trips}")
        if count := figures["unknown_trip_counts"]:
            say(f"  assumed: {count} loops of unknown length were counted once")
        if count := figures["conditionals"]:
            say(f"  assumed: {count} conditionals take every branch")
