"""The least that a program needs: bytes between chips, which follow from the shardings, and seconds.

docs/tpu.md derives the bytes that one chip sends, by mesh axis. Sources: Rajbhandari et al. 2020 (ZeRO), section 7;
Shoeybi et al. 2019 (Megatron-LM), section 3; Patarasuk and Yuan 2009 for the rings.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sedd_jax.devices import sharding
from sedd_jax.devices.chips import Chip
from sedd_jax.training.experiment import Experiment


def roofline(chip: Chip, *, flops: float, traffic: float, sent: float, useful: float, full: float) -> dict[str, float]:
    """Seconds of one run on one chip: `step_seconds` if computing, HBM and links work at once and at their peaks (the
    least that is possible), `step_seconds_serial` if they take turns. mfu: the share of the peak for useful FLOPs;
    mfu_full: with the head at every position."""
    parts = {
        "compute_seconds": flops / chip.flops,
        "memory_seconds": traffic / chip.memory_bandwidth,
        "link_seconds": sent / chip.link_bandwidth,
    }
    longest, together = max(parts.values()), sum(parts.values())
    return parts | {
        "step_seconds": longest,
        "step_seconds_serial": together,
        "mfu": useful / chip.flops / longest,
        "mfu_serial": useful / chip.flops / together,
        "mfu_full": full / chip.flops / longest,
    }


def least_traffic(
    params: Any,
    experiment: Experiment,
    *,
    batch: int,
    calls: int,
    gradient_dtype: str,
    results: int = 0,
    training: bool = True,
) -> dict[str, float]:
    """Bytes that a chip must send per run, by mesh axis. batch: global tokens of a network call.
    calls: of the network; microbatches. results: bytes that every chip gets, of which each has computed its share.

    Without training, weights are gathered once per call and activations all-reduced in the forward pass only.
    """
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
