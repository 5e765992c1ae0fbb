"""A compiled program, parsed from its optimised HLO text: instructions, and how often each is executed.

The text (`jax.stages.Compiled.as_text`) is that of one device. The module's objects in jaxlib give names, opcodes and
operands only: neither shapes nor attributes, such as trip counts."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Array(NamedTuple):
    """One array. layout: axes from the fastest on, the tile of the last, "S(n)" off HBM: 1,0:T(8,128)(2,1)S(1)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        return self._bytes(self.dims)

    @property
    def padded_bytes(self) -> int:
        """With the padding of the axes that are tiled: 64 features in the lanes take 128."""
        order, _, tiles = self.layout.partition(":")
        dims = [self.dims[int(axis)] for axis in order.split(",") if axis] or list(self.dims)
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        sizes = [int(size) for size in reversed(tile[1].split(","))] if tile else []
        for axis, size in enumerate(sizes[: len(dims)]):
            dims[axis] = -(-dims[axis] // size) * size
        return self._bytes(dims)

    @property
    def in_hbm(self) -> bool:
        return "S(" not in self.layout

    def _bytes(self, dims: Sequence[int]) -> int:
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or [0])[0])
        return math.prod(dims) * bits // 8


class Instruction(NamedTuple):
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
        """The text of an attribute without its braces, '' if it is absent."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^,\s]*))", self.attributes)
        return (found[1] or found[2] or "") if found else ""

    def numbers(self, name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", self.attribute(name))]


Computation = dict[str, Instruction]


class Program:
    """The computations of one HLO module, and how often each is executed per run of the whole.

    num_devices: of the module. trips: iterations of the loops whose end depends on the data, by the innermost named
    scope that they stand in. loop_of: the scope of such a loop around a computation."""

    def __init__(self, text: str, num_devices: int, *, trips: Mapping[str, int | float] | None = None):
        self.num_devices, self._trips = num_devices, trips or {}
        self.computations: dict[str, Computation] = {}
        self._executions: Counter[str] = Counter()
        self.loop_of: dict[str, str] = {}
        self.unknown_trip_counts = self.conditionals = 0
        entry, current = "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = {}
                entry = header[2] if header[1] else entry
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(found[2], bool(found[1]), found[3])
                current[instruction.name] = instruction
        self._count(entry, 1)

    def _count(self, name: str, times: int | float, loop: str = "") -> None:
        self._executions[name] += times
        computation, self.loop_of[name] = self.computations[name], loop
        for instruction in computation.values():
            trips, scope = self._trip_count(computation, instruction) if instruction.opcode == "while" else (1, "")
            self.conditionals += instruction.opcode == "conditional"
            for name in called(instruction):
                self._count(name, times * trips, scope or loop)

    def _trip_count(self, computation: Computation, loop: Instruction) -> tuple[int | float, str]:
        """Iterations of a loop, as the compiler notes or by its counter; or those of its scope, and its name."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
            return int(known[1]), ""
        condition = self.computations[loop.attribute("condition").lstrip("%")]
        body = self.computations[loop.attribute("body").lstrip("%")]
        try:
            compare = next(entry for entry in condition.values() if entry.root)
            counter, bound = (_behind_copies(condition, name) for name in compare.operands)
            index = counter.numbers("index")[0]
            start = _behind_copies(computation, computation[loop.operands[0]].operands[index])
            after = _behind_copies(body, next(entry for entry in body.values() if entry.root).operands[index])
            if after.opcode != "add":
                raise ValueError(after.opcode)
            addends = (_behind_copies(body, name) for name in after.operands)
            step = next(addend for addend in addends if addend.opcode == "constant")
            first, last, by = (int(constant.arguments) for constant in (start, bound, step))
            steps = {"LT": last - first, "LE": last - first + 1}[compare.attribute("direction")]
            return max(0, -(-steps // by)), ""
        except (KeyError, IndexError, StopIteration, ValueError):
            path = re.findall(r"[\w\-]+", (re.search(r'op_name="[^"]*', loop.attributes) or [""])[0])
            scope = next((part for part in reversed(path) if part in self._trips), "")
            self.unknown_trip_counts += not scope
            return self._trips.get(scope, 1), scope

    def executed(self) -> Iterator[tuple[str, Computation, Instruction, int | float]]:
        """(name of its computation, the computation, instruction, executions) of every executed instruction."""
        for name, times in self._executions.items():
            for instruction in self.computations[name].values():
                yield name, self.computations[name], instruction, times

    def inside(self, fusion: Instruction) -> Computation:
        """The computation of a fusion."""
        return self.computations[fusion.attribute("calls").lstrip("%")]


def _closing(text: str) -> int:
    """The index after the bracket that closes the one at text[0]."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index + 1
    return len(text)


def _instruction(name: str, root: bool, text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    found, rest = _ARRAY.findall(text[:end]), text[end:].lstrip()
    arrays = tuple(Array(kind, tuple(map(int, filter(None, dims.split(",")))), layout) for kind, dims, layout in found)
    opening = rest.index("(")
    arguments = opening + _closing(rest[opening:])
    return Instruction(name, root, arrays, rest[:opening], rest[opening + 1 : arguments - 1], rest[arguments:])


def _behind_copies(computation: Computation, name: str) -> Instruction:
    while computation[name].opcode == "copy":
        name = computation[name].operands[0]
    return computation[name]


def called(instruction: Instruction) -> Iterator[str]:
    """The computations that it executes, without those that a reduction or a sort applies to each element."""
    names = {"while": ("body", "condition"), "call": ("to_apply",)}.get(instruction.opcode, ("calls",))
    if instruction.opcode == "conditional":
        names = ("branch_computations", "true_computation", "false_computation")
    for name in names:
        yield from re.findall(r"[\w.\-]+", instruction.attribute(name))
