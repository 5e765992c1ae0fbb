"""Which mesh, microbatches and recomputation suit a topology: the training step with the least serial time that fits.

Bounds from the config say what to compile first, and what need not be. What is found is as fast as all its neighbours.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from sedd_jax.aot import report
from sedd_jax.aot.estimates import least_traffic
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.training import flops
from sedd_jax.training.experiment import Experiment, make_experiment

ROWS = 16  # of a TPU's tile in bfloat16
ASSUMED = (
    "what is no slower than its neighbours, one step away in one field, is the fastest of all",
    f"fsdp leaves at least {ROWS} of the model's width to a chip; tensor is 1 or 2; microbatches are a power of two",
    "compute, HBM and links take turns, at published peaks; evaluation and the network between slices take no time",
)


class Choice(NamedTuple):
    fsdp: int
    tensor: int
    microbatches: int
    remat: str

    def overrides(self) -> list[str]:
        fields = ("mesh.data", "mesh.fsdp", "mesh.tensor", "train.microbatches", "model.remat")
        return [f"--config.{field}={value}" for field, value in zip(fields, (-1, *self), strict=True)]

    def is_neighbour(self, other: "Choice") -> bool:
        """Whether one number is at most three times the other's, or remat differs."""
        pairs = [pair for pair in zip(self, other, strict=True) if pair[0] != pair[1]]
        return len(pairs) == 1 and (self.remat != other.remat or max(pairs[0]) <= 3 * min(pairs[0]))


def bounds(experiment: Experiment, length: int, num_slices: int) -> tuple[float, dict[str, float]]:
    """(bytes of a chip, serial seconds of a step by remat) that no program of this mesh does with less of, in however
    many microbatches. The bytes are those of the state. The seconds are those of

    * the matrix products by the formula; with 'dots' attention's forward pass once more, with 'blocks' the forward
      products of a block but the last, in all blocks but one: the compiler may merge a loop of one with its forward;
    * the state, read and written once: activations, gradients and gathered weights may stay on the chip;
    * what a chip sends if each weight is gathered once and its gradient summed once in a step, with activations as in
      `least_traffic`. Sums over several slices do not count.
    """
    model, state, mesh = experiment.model, experiment.abstract_state(), experiment.mesh
    chip, tokens = report.known_chip(mesh), experiment.train.batch_size * length
    per_token, held = partial(flops.flops_per_token, model), report.bytes_per_chip(state)
    products, useful = per_token(0, 0), 3 * per_token(length, float(experiment.head_share().mean()))
    again = {"none": 0, "dots": per_token(length, 0) - products}
    again["blocks"] = again["dots"] + products * (4 + model.mlp_ratio) / (4 + 2 * model.mlp_ratio)
    options = {"batch": tokens, "calls": 1, "gradient_dtype": model.gradient_dtype, "results": 0}
    kept, sent = (least_traffic(state.params, experiment, training=training, **options) for training in (False, True))
    sent = sent["fsdp"] - kept["fsdp"] + sent["tensor"] + (sent["data"] if num_slices == 1 else 0)
    moved = 2 * held / chip.memory_bandwidth + sent / chip.link_bandwidth
    computed = lambda more: (useful + (1 - 1 / model.num_layers) * more) * tokens / mesh.size / chip.flops  # noqa: E731
    return held, {remat: computed(more) + moved for remat, more in again.items()}


def space(
    read: Callable[[list[str]], ConfigDict], topology: str, num_slices: int, vocab_size: int
) -> dict[Choice, float]:
    """What can be chosen, and the bounds of its serial seconds. read: overrides -> config. Raises InputError if nothing
    divides the batch and holds the state."""
    devices, found = report.topology_devices(topology, num_slices), {}
    made = lambda *mesh: make_experiment(read(Choice(*mesh, 1, "none").overrides()), vocab_size, devices)  # noqa: E731
    first, length = made(1, 1), read([]).data.length
    model, batch, memory = first.model, first.train.batch_size, report.known_chip(first.mesh).memory
    for tensor, fsdp in itertools.product((1, 2), range(1, max(1, model.dim // ROWS) + 1)):
        if model.num_heads % tensor or model.dim % fsdp or len(devices) // num_slices % (tensor * fsdp):
            continue
        (held, least), shards = bounds(made(fsdp, tensor), length, num_slices), len(devices) // tensor
        turns = [1 << power for power in range(batch.bit_length()) if batch % (shards << power) == 0]
        pairs = itertools.product(turns, least) if held <= memory else ()
        found |= {Choice(fsdp, tensor, num, remat): least[remat] for num, remat in pairs}
    if not found:
        raise InputError(f"--topology={topology}: no mesh divides train.batch_size={batch} and holds the state")
    return found


def search(least: Mapping[Choice, float], compiled: Callable[[Choice], dict[str, Any]], name: str) -> dict[Choice, Any]:
    """Compiles choices in the order of `least` until one fits; then the neighbours of the best that may be faster.
    compiled: its "serial" is None for what does not fit. Returns the figures of all that it gave, the best first."""
    known: dict[Choice, dict[str, Any]] = {}
    with tqdm(desc=name, unit="choice") as bar:
        while True:
            known = dict(sorted(known.items(), key=lambda item: item[1]["serial"] or math.inf))
            best = next((choice for choice in known if known[choice]["serial"]), None)
            near = [choice for choice in least.keys() - known.keys() if not best or choice.is_neighbour(best)]
            near = [choice for choice in near if not best or least[choice] < known[best]["serial"]]
            if not near:
                return known
            bar.total = len(known) + (len(near) if best else 1)
            choice = min(near, key=lambda choice: (least[choice], choice.microbatches, choice))
            known[choice] = compiled(choice)
            bar.update()


def plan(
    read: Callable[[list[str]], ConfigDict], least: Mapping[Choice, float], entry: Callable, price: float, **target: Any
) -> dict[str, Any]:
    """The figures of one topology for the final line; `choices` are those that were compiled, the best first. read,
    least: see `space`. entry: (name, make) -> what make() gives, kept under the name. price: of a chip-hour, or None.
    target: of `report.report`."""

    def measure(choice: Choice) -> dict[str, Any]:
        try:
            found = report.report(read(choice.overrides()), what="train", **target)["train"]
        except TrainingError as error:
            return {"serial": None, "overlapped": None, "headroom": None, "reason": str(error)}
        seconds = found["roofline"]["step_seconds_serial"] if found["fits"] else None
        return {"serial": seconds, "overlapped": found["roofline"]["step_seconds"], "headroom": found["headroom"]}

    topology, num_slices, config = target["topology"], target["num_slices"], read([])
    name = lambda choice: "-".join(map(str, (topology.replace(":", "-"), num_slices, *choice)))  # noqa: E731
    known = search(least, lambda choice: entry(name(choice), partial(measure, choice)), topology)
    devices, lines = report.topology_devices(topology, num_slices), []
    chips = len({(getattr(device, "slice_index", 0), *device.coords) for device in devices})
    for choice, found in known.items():
        line = {"overrides": " ".join(text for text in choice.overrides() if read([text]) != config), **found}
        tokens, hours = config.train.batch_size * config.data.length, config.train.steps / 3600 * (found["serial"] or 0)
        line |= {"tokens_per_second": found["serial"] and tokens / found["serial"], "hours": found["serial"] and hours}
        lines.append(line | {"cost": found["serial"] and price and price * chips * hours})
    best = next(iter(known.values()))["serial"] or math.inf
    unknown = sum(bound < best for choice, bound in least.items() if choice not in known)
    return {"topology": topology, "num_slices": num_slices, "chips": chips, "searched": len(least), "open": unknown} | {
        "choices": lines
    }
