"""Ahead-of-time compilation for TPU topologies: python -m sedd_jax.compile --config=configs/small.py --topology=v5e:4x4

Compiles the training step and the sampler ahead of time, on a machine without accelerators, and reports memory per
chip, FLOPs, collectives against the least possible, and the least time of a step (docs/tpu.md). Needs libtpu:
pip install 'sedd_jax[aot]'. The report goes to stderr, one JSON line to stdout. Exit code 1: does not fit a chip.

--plan --topology=v5e:4x4,v6e:16x16 --price=v5e:1.2,v6e:2.7 searches mesh, microbatches and remat for each of these, and
prints what to append to a command, the fastest first. What is compiled is kept, and the same command continues.
"""

import hashlib
import importlib.metadata
import pathlib
import re
import sys
from typing import Any

import jax
from absl import flags
from etils import epath

from sedd_jax import cli
from sedd_jax import config as configuration
from sedd_jax.aot import plan
from sedd_jax.aot import report as aot
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.evaluation import results

cli.define_path("config", "Experiment, a file such as configs/tiny.py; --config.a.b=value sets a field.")
flags.DEFINE_string("topology", None, "TPU version and shape of a slice, such as v5e:16x16 or v5p:4x8x8.")
flags.DEFINE_integer("num_slices", 1, "Slices of that shape.", lower_bound=1)
flags.DEFINE_integer("vocab_size", None, "Tokens, without MASK; by default data.vocab_size of the config.")
flags.DEFINE_enum("what", "train", aot.TARGETS, "Which programs to compile.")
flags.DEFINE_boolean("plan", False, "Searches mesh, microbatches and remat for the training step on --topology=A,B,...")
flags.DEFINE_list("price", [], "With --plan: prices of a chip-hour, such as v5e:1.2,v6e:2.7.")
cli.define_path("output", "With --plan: directory of what is compiled; by default in ~/.cache/sedd_jax/plans.")

COLUMNS = {
    "append": lambda line: line["overrides"] or "nothing",
    "GB left": lambda line: "does not fit" if line["serial"] is None else f"{line['headroom'] / 1e9:.2f}",
    "ms, overlapped": lambda line: line["serial"] and f"{1e3 * line['overlapped']:,.4g}" or "",
    "ms, serial": lambda line: line["serial"] and f"{1e3 * line['serial']:,.4g}" or "",
    "tokens/s": results.number("tokens_per_second", ",.0f"),
    "hours": results.number("hours", ".1f"),
    "cost": results.number("cost", ",.2f"),
}


def make_plan(topologies: list[str], vocab_size: int) -> dict[str, Any]:
    values, prices = flags.FLAGS, {}
    versions = [topology.partition(":")[0] for topology in topologies]
    for text in values.price:
        version, _, price = text.partition(":")
        if version not in versions or not re.fullmatch(r"\d+(\.\d+)?", price):
            raise InputError(f"--price={text}: give VERSION:PRICE of a chip-hour, for {', '.join(versions)}")
        prices[version] = float(price)
    read = lambda overrides: cli.read_config(cli.required("config"), [*cli.OVERRIDES, *overrides])  # noqa: E731
    target = {"num_slices": values.num_slices, "vocab_size": vocab_size}
    least = {topology: plan.space(read, topology, **target) for topology in topologies}
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    setting = {"code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]}
    setting |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    setting |= {"vocab_size": vocab_size} | configuration.flatten(read([]))
    digest = hashlib.sha256(repr(setting).encode()).hexdigest()[:16]
    output, found = epath.Path(values.output or f"~/.cache/sedd_jax/plans/{digest}").expanduser(), []
    with results.hold(output, setting) as held:
        for topology in topologies:
            price = prices.get(topology.partition(":")[0])
            found.append(plan.plan(read, least[topology], held.entry, price, topology=topology, **target))
    for each in found:
        say(f"{each['topology']}, {each['chips']} chips: compiled {len(each['choices'])} of {each['searched']} choices")
        say(results.markdown(each["choices"], COLUMNS))
    for line in (*plan.ASSUMED,):
        say(f"assumed: {line}")
    if not any(line["serial"] for each in found for line in each["choices"]):
        raise TrainingError("no choice fits a chip; take more chips, or a smaller batch")
    return {"plans": found, "assumed": plan.ASSUMED, "output": str(output)}


def main() -> dict[str, Any]:
    values, config = flags.FLAGS, cli.config()
    # The cache can store a program for another platform, but not load it.
    jax.config.update("jax_enable_compilation_cache", False)
    vocab_size = values.vocab_size or config.data.vocab_size or cli.required("vocab_size")
    if values.plan:
        if values["what"].present:
            raise InputError(f"--plan is of the training step; leave --what={values.what} out")
        return make_plan(list(dict.fromkeys(cli.required("topology").split(","))), vocab_size)
    for name in filter(lambda name: values[name].present, ("price", "output")):
        raise InputError(f"--{name} belongs to --plan, which is missing")
    target = {"topology": cli.required("topology"), "num_slices": values.num_slices, "what": values.what}
    result = aot.report(config, vocab_size=vocab_size, **target)
    aot.describe(result, lambda text: print(text, file=sys.stderr, flush=True))
    return result


if __name__ == "__main__":
    cli.run(main)
