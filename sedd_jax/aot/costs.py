"""FLOPs and bytes of a compiled program on one device: per instruction, times its executions.

XLA's `cost_analysis` counts the body of a loop once: one of twelve scanned blocks. The text does not show the inside of
a custom call (a Pallas kernel): attention kernels have a formula here, others count by their author's estimate."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sedd_jax.aot.hlo import Array, Computation, Instruction, Program, called

# Bytes that each of n devices must send per byte of its operands. A ring reaches these; an all-reduce is two passes.
COLLECTIVES = {"all-gather": lambda n: n - 1.0, "all-reduce": lambda n: 2 * (n - 1) / n}
COLLECTIVES |= dict.fromkeys(("reduce-scatter", "all-to-all", "ragged-all-to-all"), lambda n: (n - 1) / n)
COLLECTIVES |= dict.fromkeys(("collective-permute", "collective-broadcast"), lambda n: 1.0)
# Products of L x L x D per head, by the beginning of a kernel's name: backward, scores again and four gradients.
PRODUCTS_OF_KERNEL = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
# These copy nothing, or stand for the computations that they call; the last three are custom calls.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}


class Collective(NamedTuple):
    """One collective of the program. bytes: least bytes that a device sends in one execution, see COLLECTIVES.
    loop: the scope of the loop around it whose end depends on the data, if any."""

    kind: str
    bytes: float
    executions: int | float
    dtype: str
    loop: str


def flops(program: Program) -> float:
    """FLOPs of matrix products and convolutions (the form of matrix products on a TPU), 2 per multiply-add."""
    total = 0.0
    for _, computation, instruction, times in program.executed():
        if instruction.opcode == "dot":
            lhs = computation[instruction.operands[0]].arrays[0].dims
            depth = math.prod(lhs[axis] for axis in instruction.numbers("lhs_contracting_dims"))
            total += times * 2.0 * math.prod(instruction.arrays[0].dims) * depth
        elif instruction.opcode == "convolution":
            shapes = [computation[name].arrays[0].dims for name in instruction.operands]
            total += times * 2.0 * _multiply_adds(instruction, *shapes)
        elif instruction.attribute("custom_call_target") == '"tpu_custom_call"':
            total += times * _flops_of_kernel(computation, instruction)
    return total


def collectives(program: Program) -> list[Collective]:
    """Every collective, asynchronous ones once, in the order of the text. A TPU program may spread one collective over
    several fusions, which share its channel and carry a chain number: it counts where it is executed least often."""
    found: dict[tuple, Collective] = {}
    for name, computation, instruction, times in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        operands = [array for operand in instruction.operands for array in computation[operand].arrays]
        size, group = sum(array.bytes for array in operands), _group_size(program, instruction)
        sent, dtype = size * COLLECTIVES[kind](group), operands[0].dtype
        entry = Collective(kind, sent, times, dtype, program.loop_of[name])
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        key = (instruction.attribute("channel_id"), chain[1]) if chain else (name, instruction.name)
        if key not in found or times < found[key].executions:
            found[key] = entry
    return [entry for entry in found.values() if entry.bytes]


def between_slices(program: Program, num_slices: int) -> float:
    """Bytes that a device sends to other slices, by a ring of slices as in COLLECTIVES. XLA sums within a slice first
    and hands each device's part to its host; the program that it writes is that of one slice."""
    total = 0.0
    for _, computation, instruction, times in program.executed():
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if kind and instruction.opcode == "send":
            size = sum(array.bytes for array in computation[instruction.operands[0]].arrays)
            total += times * size * COLLECTIVES[kind[1].lower().replace("_", "-")](num_slices)
    return total


def _group_size(program: Program, instruction: Instruction) -> int:
    """Devices per group, which is written as {{0,1},{2,3}}, as [2,2]<=[4], or by named mesh axes."""
    text = instruction.attributes
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=[\w@]*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        split = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in split)
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    return program.num_devices


def memory_traffic(program: Program) -> np.ndarray:
    """Bytes to and from HBM, of the data and with the padding of their layouts: operands and results of every
    instruction outside of fusions. Of an operand that a fusion slices the slice counts, and of a result that it updates
    in place the update, like XLA's analysis; arrays on the chip do not."""
    everything = (entry for body in program.computations.values() for entry in body.values())
    fused = {name for entry in everything if entry.opcode == "fusion" for name in called(entry)}
    total = np.zeros(2)
    for name, computation, instruction, times in program.executed():
        # The second half of an asynchronous instruction has the arrays of the first.
        if name in fused or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            continue
        if instruction.attribute("custom_call_target").strip('"') in FREE:
            continue
        operands = [computation[operand].arrays for operand in instruction.operands if operand in computation]
        total += times * (_read(program, instruction, operands) + _written(program, instruction, operands))
    return total


def _read(program: Program, instruction: Instruction, operands: list[tuple[Array, ...]]) -> np.ndarray:
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return _in_hbm(instruction.arrays)
    if instruction.opcode == "dynamic-update-slice":
        return _in_hbm(operands[1])
    if instruction.opcode == "fusion":
        inside = program.inside(instruction)
        parameters = (entry for entry in inside.values() if entry.opcode == "parameter")
        used = [_used(program, inside, entry) for entry in parameters if any(a.in_hbm for a in entry.arrays)]
        return np.sum([np.zeros(2), *used], 0)
    return np.sum([np.zeros(2), *map(_in_hbm, operands)], 0)


def _used(program: Program, inside: Computation, operand: Instruction) -> np.ndarray:
    """Bytes of a parameter, or of a view of it, that a fusion reads."""
    size, used = _sizes(operand.arrays), np.zeros(2)
    for user in inside.values():
        if operand.name not in user.operands or _passes_on(user) or user.opcode == "tuple":
            continue
        position = user.operands.index(operand.name)
        if user.opcode in ("dynamic-slice", "slice"):
            used += _sizes(user.arrays)
        elif _is_view(user):
            used += _used(program, inside, user)
        elif user.opcode == "fusion":
            nested = program.inside(user)
            parameters = (entry for entry in nested.values() if entry.opcode == "parameter")
            used += _used(program, nested, next(p for p in parameters if int(p.arguments) == position))
        elif user.opcode != "dynamic-update-slice" or position > 0:
            return size
    return np.minimum(used, size)


def _written(program: Program, instruction: Instruction, operands: list[tuple[Array, ...]]) -> np.ndarray:
    if instruction.opcode == "dynamic-update-slice":
        return _in_hbm(operands[1])
    if instruction.opcode.endswith("-start"):  # Its result has the operands in it.
        return np.maximum(0, _in_hbm(instruction.arrays) - np.sum([np.zeros(2), *map(_in_hbm, operands)], 0))
    if instruction.opcode == "fusion":
        inside = program.inside(instruction)
        root = next(entry for entry in inside.values() if entry.root)
        producers = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(producers) == len(instruction.arrays):
            results = zip(instruction.arrays, producers, strict=True)
            stored = [_stored(program, inside, producer) for array, producer in results if array.in_hbm]
            return np.sum([np.zeros(2), *stored], 0)
        return np.zeros(2) if _passes_on(root) else _in_hbm(instruction.arrays)
    return _in_hbm(instruction.arrays)


def _stored(program: Program, inside: Computation, producer: Instruction) -> np.ndarray:
    """Bytes of a fusion's result that it writes: for a result that is updated in place, the update."""
    while producer.opcode == "bitcast" or _is_view(producer):
        producer = inside[producer.operands[0]]
    if producer.opcode == "parameter" or _passes_on(producer):
        return np.zeros(2)
    if producer.opcode == "dynamic-update-slice":
        return _sizes(inside[producer.operands[1]].arrays)
    if producer.opcode == "fusion" and len(producer.arrays) == 1:
        nested = program.inside(producer)
        return _stored(program, nested, next(entry for entry in nested.values() if entry.root))
    return _sizes(producer.arrays)


def _is_view(instruction: Instruction) -> bool:
    """Whether it is a fusion inside of one that only gives an operand another layout in place."""
    whole = "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
    return instruction.opcode == "fusion" and whole and len(instruction.operands) == 1


def _multiply_adds(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """Multiply-adds of a convolution but those at padding and holes. TPUs make spatial axes of batch axes."""
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    out = instruction.arrays[0].dims
    window = {name: text.split("x") for name, text in re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window"))}
    total = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for axis in range(len(lhs) - 2):
        options = ("size", "stride", "lhs_dilate", "rhs_dilate")
        size, stride, holes, spread = (int(window[name][axis]) if name in window else 1 for name in options)
        low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
        length = (lhs[lhs_labels.index(str(axis))] - 1) * holes + 1
        places = np.add.outer(np.arange(out[out_labels.index(str(axis))]) * stride - low, np.arange(size) * spread)
        total *= int(((places >= 0) & (places < length) & (places % holes == 0)).sum())
    return total


def _flops_of_kernel(computation: Computation, instruction: Instruction) -> float:
    for kernel, products in PRODUCTS_OF_KERNEL.items():
        if instruction.name.startswith(kernel):
            arrays = (array for name in instruction.operands for array in computation[name].arrays)
            *heads, length, dim = next(array.dims for array in arrays if array.dtype in ("bf16", "f32"))
            return products * 2.0 * math.prod(heads) * length**2 * dim
    estimate = re.search(r'"flops":\s*"?(\d+)', instruction.attributes)
    return float(estimate[1]) if estimate else 0.0


def _sizes(arrays: Iterable[Array]) -> np.ndarray:
    return np.sum([np.zeros(2), *((array.bytes, array.padded_bytes) for array in arrays)], 0)


def _in_hbm(arrays: tuple[Array, ...]) -> np.ndarray:
    return _sizes(array for array in arrays if array.in_hbm)


def _passes_on(instruction: Instruction) -> bool:
    """Whether it is a part of a collective spread over fusions, whose buffers pass through each of them unchanged."""
    return instruction.opcode in COLLECTIVES or '"AsyncCollective' in instruction.attributes
