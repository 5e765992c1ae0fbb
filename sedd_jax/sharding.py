"""Mesh, the one table from logical axes to mesh axes, and placing arrays. One device is a 1 x 1 x 1 mesh.

data: replicas that split the batch. fsdp: splits the batch and every weight along its model width. tensor: splits
heads, MLP and vocabulary.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sedd_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> the mesh axes that split it. Axes that are not named here (layers, length, cond) stay whole.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or over those given. One size may be -1: what the others leave. Raises InputError where
    they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    num_devices = len(devices)
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise InputError(f"{asked}: sizes must be positive, and at most one may be -1 (what the others leave)")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if num_devices % known or (-1 not in sizes.values() and known != num_devices):
        raise InputError(f"{asked}: {known} does not fit {num_devices} devices; their product must be {num_devices}")
    shape = tuple(num_devices // known if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array with these logical axes is split. An axis whose length the mesh does not divide stays whole.

    Inside `jax.shard_map` the axes that it split already are left out.
    """

    def split(size: int, name: str | None) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in RULES.get(name or "", ()) if axis not in mesh.manual_axes)
        return axes if axes and size % int(np.prod([mesh.shape[axis] for axis in axes])) == 0 else None

    return PartitionSpec(*(split(size, name) for size, name in zip(shape, names, strict=True)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to split an activation by its logical axes; does nothing where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(weight: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A weight made whole along its model width where it is used, and its gradient split again as the weight is.

    Said twice because the compiler does neither by itself: it would pass the parts of the weight round in a ring, once
    more than needed under rematerialisation; and for the gradient it would all-reduce, at twice the bytes of a
    reduce-scatter, since the transpose of a constraint asks the gradient to be whole as well.
    """
    return constrain(weight, *(None if name == "embed" else name for name in names))


gather.defvjp(lambda weight, names: (gather(weight, names), None), lambda names, _, grad: (constrain(grad, *names),))


def of_tree(abstract: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of abstract arrays, of which Flax's partition boxes carry logical names.

    The result has the structure of the unboxed tree; arrays without names are replicated.
    """

    def sharding(leaf) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(leaf.value.shape, leaf.names, mesh))
        return replicated(mesh)

    return jax.tree.map(sharding, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: Mesh) -> NamedSharding:
    """Split along the first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))


def place_batch(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """The global batch [B, ...] from this process's rows [B / processes, ...]."""
    return jax.make_array_from_process_local_data(of_batch(mesh), local)


def place(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """An array that every process has whole, as one global array."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
