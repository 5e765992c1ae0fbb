"""Profile of a compiled program: milliseconds by kind of instruction."""

import pathlib
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from sedd_jax.aot.costs import COLLECTIVES
from sedd_jax.aot.hlo import Instruction, Program, called

# An instruction is of the first kind that has its opcode, or one inside its fusion; the rest is element-wise.
KINDS = {
    "products": {"dot", "convolution", "custom-call"},
    "collectives": set(COLLECTIVES),
    "stores and loads": {"dynamic-slice", "dynamic-update-slice"},
    "copies": {"copy", "transpose"},
}
NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "broadcast"}


def milliseconds(text: str, call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of one call, by kind. text: the compiled program that `call` runs.

    Instructions that run at the same time count each: use one core (taskset, NPROC=1).
    """
    program, spent = Program(text, 1), Counter()
    kinds = {
        name: _kind(program, instruction)
        for computation in program.computations.values()
        for name, instruction in computation.items()
        if instruction.opcode not in ("while", "conditional", "call")  # Their events include those of their bodies.
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(call())
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for event in (event for line in plane.lines for event in line.events):
                    name = dict(event.stats).get("hlo_op", event.name)
                    if name in kinds:
                        spent[kinds[name]] += event.duration_ns / 1e6 / repeats
    return dict(spent.most_common())


def _kind(program: Program, instruction: Instruction) -> str:
    opcodes = {instruction.opcode.removesuffix("-start").removesuffix("-done")}
    if instruction.opcode == "fusion":
        opcodes = {entry.opcode for name in called(instruction) for entry in program.computations[name].values()}
    for kind, some in KINDS.items():
        if opcodes & some:
            return kind
    return "element-wise" if opcodes - NOTHING else "zeros"
