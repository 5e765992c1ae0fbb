"""What a compiled program computes and moves, read from its optimised HLO text and multiplied by loop trip counts.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs: of twelve scanned blocks, one. Here
each computation is counted as often as it is executed. All figures are those of one device.

Read from the text (`jax.stages.Compiled.as_text`), since JAX has no other way in. The inside of a custom call (a Pallas
kernel) is not in the text: those of PRODUCTS_OF_KERNEL are known, of others counts what their author estimated, if any.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Attention kernels by the beginning of their name: how many products of L x L x D each head takes. The backward one is
# the fused one: scores again, and the gradients of weights, values, queries and keys.
PRODUCTS_OF_KERNEL = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
# These name or rearrange values without touching them, or stand for the computations they call.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")


class Array(NamedTuple):
    """One array of a shape. space: the memory it lives in; 0 is HBM."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or [0])[0])
        return math.prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    name: str
    root: bool
    arrays: tuple[Array, ...]
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, name: str) -> str:
        """The text of an attribute without its braces, '' where it is not there."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^,\s]*))", self.attributes)
        return (found[1] or found[2] or "") if found else ""

    def numbers(self, name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", self.attribute(name))]


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """One collective of the program. bytes: what a device sends in one execution, at the least, see `_sent`."""

    kind: str
    bytes: float
    executions: int
    dtype: str
    op_name: str


def _closing(text: str) -> int:
    """The index behind the bracket that closes the one at text[0]."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index + 1
    return len(text)


def _arrays(shape: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(Array(dtype, tuple(map(int, dims.split(","))) if dims else (), int(space[1]) if space else 0))
    return tuple(arrays)


class Program:
    """The computations of one HLO module, and how often each is executed per run of the whole.

    data_trips: how often a loop runs whose end depends on the data.
    """

    def __init__(self, text: str, num_devices: int, *, data_trips: int = 1):
        self._num_devices, self._data_trips = num_devices, data_trips
        self._computations: dict[str, Computation] = {}
        self._executions: Counter[str] = Counter()
        self.data_dependent_loops = 0
        self.unknown_trip_counts = 0
        entry, current = "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self._computations[header[2]] = {}
                entry = header[2] if header[1] else entry
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(found[2], bool(found[1]), found[3])
                current[instruction.name] = instruction
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self._executions[name] += times
        computation = self._computations[name]
        for instruction in computation.values():
            trips = self._trip_count(computation, instruction) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                self._count(called, times * trips)

    def _trip_count(self, computation: Computation, loop: Instruction) -> int:
        """How often a loop runs: as the compiler notes it, or from the counter, its start, its step and its bound."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
            return int(known[1])
        condition = self._computations[loop.attribute("condition").lstrip("%")]
        body = self._computations[loop.attribute("body").lstrip("%")]
        try:
            compare = next(entry for entry in condition.values() if entry.root)
            counter, bound = (_behind_copies(condition, name) for name in compare.operands)
            if bound.opcode == "get-tuple-element":
                self.data_dependent_loops += 1
                return self._data_trips
            index = counter.numbers("index")[0]
            start = _behind_copies(computation, computation[loop.operands[0]].operands[index])
            after = _behind_copies(body, next(entry for entry in body.values() if entry.root).operands[index])
            if after.opcode != "add":
                raise ValueError(after.opcode)
            addends = (_behind_copies(body, name) for name in after.operands)
            step = next(addend for addend in addends if addend.opcode == "constant")
            first, last, by = (int(constant.arguments) for constant in (start, bound, step))
            steps = {"LT": last - first, "LE": last - first + 1}[compare.attribute("direction")]
            return max(0, -(-steps // by))
        except (KeyError, IndexError, StopIteration, ValueError):
            self.unknown_trip_counts += 1
            return 1

    def _executed(self) -> Iterator[tuple[str, Computation, Instruction, int]]:
        for name, times in self._executions.items():
            for instruction in self._computations[name].values():
                yield name, self._computations[name], instruction, times

    def flops(self, *, loops_once: bool = False) -> float:
        """Of matrix products and convolutions (which is what matrix products become on a TPU), 2 per multiply-add.

        loops_once: as XLA's cost analysis counts.
        """
        total = 0.0
        for _, computation, instruction, executions in self._executed():
            times = 1 if loops_once else executions
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

    def collectives(self) -> list[Collective]:
        """Every collective, asynchronous ones once, in the order of the text.

        A TPU program may spread one collective over several fusions that compute something else meanwhile; they share
        its channel and carry a chain number, and it is counted at the one that is executed least often.
        """
        found: dict[tuple, Collective] = {}
        for name, computation, instruction, times in self._executed():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            operands = [array for operand in instruction.operands for array in computation[operand].arrays]
            size, group = sum(array.bytes for array in operands), self._group_size(instruction)
            op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
            entry = Collective(kind, _sent(kind, size, group), times, operands[0].dtype, op_name[1] if op_name else "")
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            key = (instruction.attribute("channel_id"), chain[1]) if chain else (name, instruction.name)
            if key not in found or times < found[key].executions:
                found[key] = entry
        return [entry for entry in found.values() if entry.bytes]

    def _group_size(self, instruction: Instruction) -> int:
        """Devices per group, of the three ways to write groups: {{0,1},{2,3}}, [2,2]<=[4] and named mesh axes."""
        text = instruction.attributes
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
            return int(iota[1])
        if mesh := re.search(r"replica_groups=[\w@]*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
            split = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in split)
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
            return listed[1].count(",") + 1
        return self._num_devices

    def memory_traffic(self) -> float:
        """Bytes that go to and from HBM: operands and results of every instruction that is not within a fusion.

        Of an operand that a fusion only slices, the slice counts, and of a result that it updates in place, the update
        (as XLA's cost analysis has it). What a TPU program keeps in its on-chip memory does not count.
        """
        fused = {name for body in self._computations.values() for i in body.values() for name in _inner(i)}
        total = 0.0
        for name, computation, instruction, times in self._executed():
            # The second half of an asynchronous instruction has the arrays of the first.
            if name in fused or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
                continue
            inner = self._computations[next(iter(_inner(instruction)))] if instruction.opcode == "fusion" else None
            operands = [computation[operand].arrays for operand in instruction.operands if operand in computation]
            total += times * (_read(instruction, operands, inner) + _written(instruction, operands, inner))
        return total


def _instruction(name: str, root: bool, text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    arguments = opening + _closing(rest[opening:])
    return Instruction(name, root, _arrays(shape), rest[:opening], rest[opening + 1 : arguments - 1], rest[arguments:])


def _behind_copies(computation: Computation, name: str) -> Instruction:
    while computation[name].opcode == "copy":
        name = computation[name].operands[0]
    return computation[name]


def _called(instruction: Instruction) -> Iterator[str]:
    """The computations that it executes. What a reduction or a sort applies to each element is not worth a count."""
    names = {"while": ("body", "condition"), "call": ("to_apply",)}.get(instruction.opcode, ("calls",))
    if instruction.opcode == "conditional":
        names = ("branch_computations", "true_computation", "false_computation")
    for name in names:
        yield from re.findall(r"[\w.\-]+", instruction.attribute(name))


def _inner(instruction: Instruction) -> Iterator[str]:
    return _called(instruction) if instruction.opcode == "fusion" else iter(())


def _sent(kind: str, size: int, group: int) -> float:
    """Bytes that each device of a group has to send, at the least, where its operands have `size` bytes.

    A ring reaches these: an all-gather passes on all parts but one, a reduce-scatter likewise, an all-reduce is both.
    """
    share = (group - 1) / group
    times = {
        "all-gather": group - 1.0,
        "all-reduce": 2 * share,
        "reduce-scatter": share,
        "all-to-all": share,
        "ragged-all-to-all": share,
    }
    return size * times.get(kind, 1.0)


def _multiply_adds(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """Of a convolution, without those that meet padding or the holes of a dilation.

    A TPU program writes a matrix product's batch axes as spatial axes of which each output sees one input.
    """
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    out = instruction.arrays[0].dims
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window")))
    total = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for axis in range(len(lhs) - 2):

        def option(name: str, default: str, axis: int = axis) -> str:
            return window[name].split("x")[axis] if name in window else default

        size, stride = int(option("size", "1")), int(option("stride", "1"))
        low = int(option("pad", "0_0").split("_")[0])
        holes, spread = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
        length = (lhs[lhs_labels.index(str(axis))] - 1) * holes + 1
        places = (
            position * stride + offset * spread - low
            for position in range(out[out_labels.index(str(axis))])
            for offset in range(size)
        )
        total *= sum(0 <= place < length and place % holes == 0 for place in places)
    return total


def _flops_of_kernel(computation: Computation, instruction: Instruction) -> float:
    for kernel, products in PRODUCTS_OF_KERNEL.items():
        if instruction.name.startswith(kernel):
            arrays = (array for name in instruction.operands for array in computation[name].arrays)
            *heads, length, dim = next(array.dims for array in arrays if array.dtype in ("bf16", "f32"))
            return products * 2.0 * math.prod(heads) * length**2 * dim
    estimate = re.search(r'"flops":\s*"?(\d+)', instruction.attributes)
    return float(estimate[1]) if estimate else 0.0


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.space == 0)


def _read(instruction: Instruction, operands: list[tuple[Array, ...]], inner: Computation | None) -> int:
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return _in_hbm(instruction.arrays)
    if instruction.opcode == "dynamic-update-slice":
        return _in_hbm(operands[1])
    total = sum(map(_in_hbm, operands))
    for parameter in (inner or {}).values():
        if parameter.opcode != "parameter" or not _in_hbm(parameter.arrays):
            continue
        users = [user for user in inner.values() if parameter.name in user.operands]
        if users and all(user.opcode in ("dynamic-slice", "slice") for user in users):
            total += sum(array.bytes for user in users for array in user.arrays) - _in_hbm(parameter.arrays)
        elif users and all(_updates(user, parameter.name) for user in users):
            total -= _in_hbm(parameter.arrays)
    return total


def _written(instruction: Instruction, operands: list[tuple[Array, ...]], inner: Computation | None) -> int:
    if instruction.opcode == "dynamic-update-slice":
        return _in_hbm(operands[1])
    total = _in_hbm(instruction.arrays)
    if instruction.opcode.endswith("-start"):  # Its result has the operands in it.
        return max(0, total - sum(map(_in_hbm, operands)))
    for update in (inner or {}).values():
        if update.opcode == "dynamic-update-slice" and update.arrays[0] in instruction.arrays:
            total += inner[update.operands[1]].arrays[0].bytes - _in_hbm(update.arrays)
    return total


def _updates(user: Instruction, name: str) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name
