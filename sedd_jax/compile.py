"""Ahead-of-time compilation for TPU topologies: python -m sedd_jax.compile --config=configs/small.py --topology=v5e:4x4

Compiles the training step and the sampler ahead of time, on a machine without accelerators, and reports memory per
chip, FLOPs, collectives against the least possible, and the least time of a step (docs/tpu.md). Needs libtpu:
pip install 'sedd_jax[aot]'. The report goes to stderr, one JSON line to stdout. Exit code 1: does not fit a chip.

--plan --topology=v5e:4x4,v6e:16x16 --price=v5e:1.2,v6e:2.7 searches mesh, microbatches and remat for each of these, and
prints what to append to a command, the fastest first. What is compiled is kept, and the same command continues."""

import hashlib
import importlib.metadata
import pathlib
import sys
from typing import Any

import jax
from absl import flags

from sedd_jax import cli
from sedd_jax.aot import plan, report as aot
from sedd_jax.config import flatten
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
cli.define_path("output", "With --plan: directory of what is compiled, for the same command to continue.")


def make_plan(topologies: list[str], **target: Any) -> dict[str, Any]:
    output, price = cli.path("output"), dict(text.partition(":")[::2] for text in flags.FLAGS.price)
    versions = {topology: topology.partition(":")[0] for topology in topologies}
    for version, text in price.items():
        if version not in versions.values() or not text.replace(".", "", 1).isdecimal():
            raise InputError(f"--price={version}:{text}: give a price of each version in --topology, such as v5e:1.2")
    read = lambda overrides: cli.read_config(cli.required("config"), [*cli.OVERRIDES, *overrides])  # noqa: E731
    least = {topology: plan.space(read, topology, **target) for topology in topologies}
    code = b"".join(file.read_bytes() for file in sorted(pathlib.Path(__file__).parent.rglob("*.py")))
    setting = {"version": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}}
    setting |= {"code": hashlib.sha256(code).hexdigest(), **target, **flatten(read([]))}
    columns = {name: results.number(name, form) for name, form in plan.FORMS.items()}
    plans = {}
    with results.hold(output, setting) as held:
        for topology, version in versions.items():
            per_hour = float(price[version]) if version in price else None
            plans[topology] = plan.plan(read, least[topology], held.entry, per_hour, topology=topology, **target)
            table = results.markdown(plans[topology], columns)
            say(f"{topology}: compiled {len(plans[topology])} of {len(least[topology])} choices\n{table}")
    say(f"assumed: {plan.ASSUMED}")
    if not any(line["fits"] for lines in plans.values() for line in lines):
        raise TrainingError("nothing fits a chip; take more chips or a smaller batch")
    return {"plans": plans, "assumed": plan.ASSUMED.splitlines()}


def main() -> dict[str, Any]:
    values, config = flags.FLAGS, cli.config()
    jax.config.update("jax_enable_compilation_cache", False)  # it can store a program for another platform, not load it
    vocab_size = values.vocab_size or config.data.vocab_size or cli.required("vocab_size")
    if values.plan:
        if values["what"].present:
            raise InputError(f"--plan is of the training step; leave --what={values.what} out")
        topologies = cli.required("topology").split(",")
        return make_plan(topologies, num_slices=values.num_slices, vocab_size=vocab_size)
    for name in filter(lambda name: values[name].present, ("price", "output")):
        raise InputError(f"--{name} belongs to --plan, which is missing")
    target = {"topology": cli.required("topology"), "num_slices": values.num_slices, "what": values.what}
    result = aot.report(config, vocab_size=vocab_size, **target)
    aot.describe(result, lambda text: print(text, file=sys.stderr, flush=True))
    return result


if __name__ == "__main__":
    cli.run(main)
