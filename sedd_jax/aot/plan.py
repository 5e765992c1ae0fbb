"""Which mesh, microbatches and recomputation suit a topology: the step with the least serial time that fits a chip."""

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
from sedd_jax.training.experiment import make_experiment

Read = Callable[[list[str]], ConfigDict]  # overrides -> config
ROWS = 16  # of a TPU's tile in bfloat16
ASSUMED = f"""what is no slower than its neighbours, one step away in one field, is the fastest of all
fsdp leaves at least {ROWS} of the model's width to a chip; tensor is 1 or 2; microbatches are a power of two
compute, HBM and links take turns, at published peaks; evaluation and the network between slices take no time"""
# The fields of a line, and how a table shows them.
FORMS = {"overrides": "", "fits": "", "gb_left": ".2f", "ms_overlapped": ",.4g", "ms_serial": ",.4g"}
FORMS |= {"tokens_per_second": ",.0f", "hours": ".1f", "cost": ",.2f"}


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


def space(read: Read, topology: str, num_slices: int, vocab_size: int) -> dict[Choice, float]:
    """The choices that divide the batch and whose state fits, with serial seconds that no program of theirs is below.
    Raises InputError if there are none. The seconds, which do not depend on microbatches, are those of
    * the matrix products by the formula; with 'dots' attention's forward pass once more, with 'blocks' all forward
      products of a block but the last, in all blocks but one: the compiler may merge a loop of one with its forward;
    * the state, read and written once: activations, gradients and gathered weights may stay on the chip;
    * what a chip sends if each weight is gathered once and its gradient summed once in a step, with activations as in
      `least_traffic`. Sums over several slices do not count."""
    devices, found, length = report.topology_devices(topology, num_slices), {}, read([]).data.length
    made = lambda *mesh: make_experiment(read(Choice(*mesh, 1, "none").overrides()), vocab_size, devices)  # noqa: E731
    chip, first = report.known_chip(devices[0]), made(1, 1)
    model, batch, per_token = first.model, first.train.batch_size, partial(flops.flops_per_token, first.model)
    useful, products = 3 * per_token(length, float(first.head_share().mean())), per_token(0, 0.0)
    again = {"none": 0, "dots": per_token(length, 0.0) - products}
    again["blocks"] = again["dots"] + products * (4 + model.mlp_ratio) / (4 + 2 * model.mlp_ratio)
    for tensor, fsdp in itertools.product((1, 2), range(1, max(1, model.dim // ROWS) + 1)):
        if model.num_heads % tensor or model.dim % fsdp or len(devices) // num_slices % (tensor * fsdp):
            continue
        experiment = made(fsdp, tensor)
        state = experiment.abstract_state()
        options = {"batch": batch * length, "calls": 1, "gradient_dtype": model.gradient_dtype, "results": 0}
        kept, sent = (least_traffic(state.params, experiment, training=step, **options) for step in (False, True))
        sent = sent["fsdp"] - kept["fsdp"] + sent["tensor"] + (sent["data"] if num_slices == 1 else 0)
        moved = 2 * (held := report.bytes_per_chip(state)) / chip.memory_bandwidth + sent / chip.link_bandwidth
        parts = [1 << n for n in range(20) if held <= chip.memory and batch % (len(devices) // tensor << n) == 0]
        for num, (remat, more) in itertools.product(parts, again.items()):
            computed = (useful + (1 - 1 / model.num_layers) * more) * batch * length / len(devices) / chip.flops
            found[Choice(fsdp, tensor, num, remat)] = computed + moved
    if not found:
        raise InputError(f"--topology={topology}: no mesh divides train.batch_size={batch} and can hold the state")
    return found


def plan(read: Read, least: Mapping[Choice, float], entry: Callable, price: float | None, **target: Any) -> list[dict]:
    """Compiles choices in the order of `least` until one fits, then those neighbours of the best that may be faster.
    Lines, the best first. entry: (name, make) -> make(), kept. price: of a chip-hour. target: of `report.report`."""
    known: dict[Choice, dict[str, Any]] = {}
    config, topology, num_slices = read([]), target["topology"], target["num_slices"]

    def seconds(choice: Choice) -> float:
        return known[choice]["roofline"]["step_seconds_serial"] if known[choice]["fits"] else math.inf

    def measure(choice: Choice) -> dict[str, Any]:
        try:
            return report.report(read(choice.overrides()), what="train", **target)["train"]
        except TrainingError as error:
            return {"fits": False, "reason": str(error)}

    with tqdm(desc=topology, unit="choice") as bar:
        while True:
            best = min((choice for choice in known if known[choice]["fits"]), key=seconds, default=None)
            near = least.keys() - known.keys()
            if best:
                near = {choice for choice in near if choice.is_neighbour(best) and least[choice] < seconds(best)}
            if not near:
                break
            bar.total = len(known) + (len(near) if best else 1)
            choice = min(near, key=lambda choice: (least[choice], choice.microbatches, choice))
            name = "-".join(map(str, (topology.replace(":", "-"), num_slices, *choice)))
            known[choice] = entry(name, partial(measure, choice))
            bar.update()
    lines, chips = [], len(report.topology_devices(topology, num_slices))
    for choice in sorted(known, key=seconds):
        found, time = known[choice], seconds(choice)
        line = [" ".join(text for text in choice.overrides() if read([text]) != config), found["fits"]]
        if found["fits"]:
            hours, tokens = config.train.steps * time / 3600, config.train.batch_size * config.data.length
            line += [found["headroom"] / 1e9, 1e3 * found["roofline"]["step_seconds"], 1e3 * time, tokens / time]
            line += [hours, price and price * chips * hours]
        lines.append(dict(itertools.zip_longest(FORMS, line)))
    return lines
