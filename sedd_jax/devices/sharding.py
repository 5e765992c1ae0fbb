"""Mesh, the one table from logical axes to mesh axes, and placing arrays. One device is a 1 x 1 x 1 mesh. data:
replicas that split the batch. fsdp: splits the batch and every weight along its model width. tensor: splits heads, MLP
and vocabulary. Each of several TPU slices holds complete replicas: only `data` goes between them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sedd_jax.devices import processes
from sedd_jax.errors import InputError, explained

MESH_AXES = ("data", "fsdp", "tensor")
LANES = 128  # columns of a TPU's tile
Names = tuple[str | None, ...]  # logical axes

# Logical axis -> the mesh axes that split it. Axes that are not named here (layers, length, cond) are not split.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = -1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over the devices, by default all, along the connections of the chips. data, fsdp, tensor: sizes; one of
    them may be -1: what the others leave. slices: those that `data` goes over; -1 for what the TPU devices belong to,
    and 1 for others. Raises InputError if the sizes do not fit the devices or their slices."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise InputError(f"{asked}: sizes must be positive, and at most one may be -1 (what the others leave)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        raise InputError(f"{asked}: {known} does not fit {len(devices)} devices; their product must be {len(devices)}")
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    slices = _num_slices(slices, devices)
    if shape[0] % slices:
        raise InputError(f"{asked}: mesh.data={shape[0]} must be a multiple of the {slices} slices, over which it goes")
    unfit = AssertionError, NotImplementedError, ValueError
    with explained(f"{asked} cannot be laid on these {len(devices)} devices", "give other sizes", *unfit):
        if slices > 1:
            inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
            grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def fitting_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = -1) -> Mesh:
    """`make_mesh` of these sizes over all devices. Where they do not fit, one that splits the weights into as many
    parts as they ask for or the largest divisor of them that fits, by `fsdp`."""
    try:
        return make_mesh(data=data, fsdp=fsdp, tensor=tensor, slices=slices)
    except InputError:
        devices = jax.devices()
        inside = len(devices) // _num_slices(-1, devices)
        parts = math.prod(inside if size == -1 else size for size in (fsdp, tensor))
        return make_mesh(fsdp=math.gcd(parts, inside))


def _num_slices(asked: int, devices: Sequence[Any]) -> int:
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if asked == -1:
        return found if devices[0].platform == "tpu" else 1
    if asked < 1 or (asked != found and (asked > 1 or devices[0].platform == "tpu")):
        raise InputError(f"mesh.slices={asked}: the devices are of {found}; give {found}, or -1")
    return asked


def _split(size: int, name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    axes = tuple(axis for axis in RULES.get(name or "", ()) if axis not in mesh.manual_axes)
    return axes if axes and size % _parts(mesh, axes) == 0 else None


def _parts(mesh: Mesh | AbstractMesh, axes: Iterable[str] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in axes or ())


def spec(shape: tuple[int, ...], names: Names, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array with these logical axes is split. An axis is not split if the mesh does not divide its length.
    Inside `jax.shard_map`, the mesh axes that it has split already are left out."""
    return PartitionSpec(*(_split(size, name, mesh) for size, name in zip(shape, names, strict=True)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to split an activation by its logical axes; does nothing where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))


def gathered(weight: jax.Array, names: Names) -> jax.Array:
    """A weight gathered along its model width where it is used. The compiler alone would pass the parts of the weight
    round in a ring, once more than needed under rematerialisation."""
    return constrain(weight, *(None if name == "embed" else name for name in names))


def summed(function: Callable[..., jax.Array], shape: tuple[int, ...], names: Names, *arrays: jax.Array) -> jax.Array:
    """function(*arrays [B, ...]), a sum over sequences, [*shape], that is split like a weight with these logical axes.
    Every device computes it for its own sequences, and they exchange the parts. By itself a TPU's compiler would cut a
    product of activations into a piece for each device, and read all activations for each."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axis for axis in RULES["batch"] if not mesh.empty and axis not in mesh.manual_axes and mesh.shape[axis] > 1]
    if not axes or len(arrays[0]) % _parts(mesh, RULES["batch"]):
        return constrain(function(*arrays), *names)
    # Lists and not sets, whose order is another one in each process: the program must be the same in all.
    places = [_split(size, name, mesh) or () for size, name in zip(shape, names, strict=True)]
    split = [[axis for axis in axes if axis in place] for place in places]

    def local(*arrays: jax.Array) -> jax.Array:
        total = function(*arrays)
        for dim, entry in enumerate(split):
            if entry:
                total = jax.lax.psum_scatter(total, tuple(entry), scatter_dimension=dim, tiled=True)
        return jax.lax.psum(total, tuple(axis for axis in axes if axis not in sum(split, [])))

    made, given = PartitionSpec(*(tuple(entry) or None for entry in split)), PartitionSpec(RULES["batch"])
    options = {"mesh": mesh, "axis_names": set(RULES["batch"]), "check_vma": False}
    return constrain(jax.shard_map(local, in_specs=(given,) * len(arrays), out_specs=made, **options)(*arrays), *names)


def tree_sharding(abstract: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of abstract arrays, some in Flax's boxes with logical names. The result has the structure of
    the unboxed tree; arrays without names are replicated."""

    def place(leaf: Any) -> Any:
        if not _is_box(leaf):
            return replicated(mesh)
        # An optimiser of some parameters alone has boxes without an array for the others.
        value = leaf.value
        return NamedSharding(mesh, spec(value.shape, leaf.names, mesh)) if hasattr(value, "shape") else value

    return jax.tree.map(place, abstract, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def unsharded(abstract: Any, mesh: Mesh) -> list[str]:
    """The axes in a tree as in `tree_sharding` that a rule names but that are not split: a line each, with the cost."""
    lines = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_is_box)[0]:
        for size, name in zip(leaf.value.shape, leaf.names, strict=True) if _is_box(leaf) else ():
            parts = _parts(mesh, RULES.get(name or ""))
            if parts > 1 and _split(size, name, mesh) is None:
                value = leaf.value
                held = math.prod(tree_sharding(leaf, mesh).shard_shape(value.shape)) * value.dtype.itemsize / 1e6
                lines.append(
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(value.shape)} is not split: its "
                    f"{size} along {name!r} are no multiple of mesh.{'*'.join(RULES[name])}={parts}. It takes "
                    f"{held:.3g} MB per device instead of {held / parts:.3g}, its average and moments too"
                )
    return lines


def narrow(width: int, mesh: Mesh) -> list[str]:
    """A line if fsdp leaves less than a TPU's tile of this many columns to a device."""
    parts = mesh.shape["fsdp"]
    if mesh.devices.flat[0].platform != "tpu" or parts == 1 or width >= parts * LANES:
        return []
    left = f"mesh.fsdp={parts} leaves {width / parts:.3g} of {width} columns of a weight to a chip"
    remedy = "the compiler may send more than needed (docs/tpu.md). Give mesh.data what a smaller fsdp leaves"
    return [f"{left}, less than a tile's {LANES}: {remedy}"]


def batch_axes(place: NamedSharding) -> list[tuple[str, ...]]:
    """For each dimension of a weight, the mesh axes of size > 1 that split it and the batch."""
    # A spec may hold a single axis as a name or as a tuple of one.
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in place.spec)
    exchanged = {axis for axis in RULES["batch"] if place.mesh.shape[axis] > 1}
    return [tuple(axis for axis in entry if axis in exchanged) for entry in entries]


def on_shards(function: Callable, places: Mapping[str, NamedSharding], dtype: str, *, outputs: Any = None) -> Callable:
    """function(weights, *arrays [B, ...]) -> arrays [B, ...], run by every device on its own sequences. weights: {name:
    array} with the shardings `places`. Where batch axes of the mesh split them, every device gets them complete, moved
    in `dtype`, half the bytes; `tensor` splits them as before. outputs: specs of results that are no batches, where the
    mesh divides B."""
    mesh = next(iter(places.values())).mesh
    split = {name: batch_axes(place) for name, place in places.items()}
    specs = {name: PartitionSpec(*(axes or None for axes in entries)) for name, entries in split.items()}
    batch = PartitionSpec(RULES["batch"])

    def gather(name: str, weight: jax.Array) -> jax.Array:
        for dim, axes in enumerate(split[name]):
            if axes:
                weight = jax.lax.all_gather(weight.astype(dtype), axes, axis=dim, tiled=True).astype(weight.dtype)
        return weight

    def local(weights: Mapping[str, jax.Array], *arrays: Any) -> Any:
        return function({name: gather(name, weight) for name, weight in weights.items()}, *arrays)

    def mapped(weights: Mapping[str, jax.Array], *arrays: Any) -> Any:
        count = len(jax.tree.leaves(arrays)[0])
        if extra := -count % batch_shards(mesh):  # filled up with repeats of the last sequence
            arrays = jax.tree.map(lambda a: a[jnp.minimum(jnp.arange(count + extra), count - 1)], arrays)
        split_by = {"mesh": mesh, "axis_names": set(RULES["batch"]), "check_vma": False}
        given, made = (specs, *[batch] * len(arrays)), batch if outputs is None else outputs
        results = jax.shard_map(local, in_specs=given, out_specs=made, **split_by)(weights, *arrays)
        return jax.tree.map(lambda a: a[:count], results) if extra else results

    return mapped


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return _parts(mesh, RULES["batch"])


def whole_shards(batch_size: int, mesh: Mesh) -> int:
    """The next multiple of the parts that a batch is split into."""
    return -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)


def local_sequences(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The numbers of the sequences of a global batch that the devices of this process hold, ascending. If `tensor` goes
    across processes, several hold the same ones. They need not be neighbours."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def place_batch(local: Any, mesh: Mesh) -> Any:
    """The global batch, arrays [B, ...], from this process's part of it: the `local_sequences`, in their order."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local)


def place(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """A global array from a host array that every process has completely."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def map_batches(function: Callable, sequences: Any, batch_size: int, *, mesh: Mesh, progress: str | None = None) -> Any:
    """`function(batch, number of its first sequence)` over all sequences, a tree of arrays [N, ...]: a tree of NumPy
    arrays [N, ...]. The batches are split over the mesh, which is set meanwhile. batch_size: sequences in each, rounded
    up to what the mesh splits; the last is filled up with repeats, whose results are dropped, so that all are of one
    shape. progress: the name of a bar on stderr once a second has passed, by the first process; by default none."""
    count, size, parts = len(jax.tree.leaves(sequences)[0]), whole_shards(batch_size, mesh), []
    options = {"unit": "batch", "delay": 1, "leave": False, "disable": progress is None or not processes.is_leader()}
    with jax.set_mesh(mesh):
        for first in tqdm(range(0, count, size), desc=progress, **options):
            numbers = np.minimum(np.arange(first, first + size), count - 1)
            batch = jax.tree.map(lambda a: place(a[numbers], batch_sharding(mesh)), sequences)  # noqa: B023
            parts.append(jax.device_get(function(batch, first)))
    return jax.tree.map(lambda *values: np.concatenate(values)[:count], *parts)
