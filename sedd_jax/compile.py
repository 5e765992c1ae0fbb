"""Ahead-of-time compilation for TPU topologies: python -m sedd_jax.compile --config=configs/small.py --topology=v5e:4x4

Compiles the training step and the sampler ahead of time, on a machine without accelerators, and reports memory per
chip, FLOPs, collectives against the least possible, and the least time of a step (docs/tpu.md). Needs libtpu:
pip install 'sedd_jax[aot]'. The report goes to stderr, one JSON line to stdout. Exit code 1: does not fit a chip.
"""

import sys
from typing import Any

import jax
from absl import flags

from sedd_jax import cli
from sedd_jax.aot import report as aot

cli.define_path("config", "Experiment, a file such as configs/tiny.py; --config.a.b=value sets a field.")
flags.DEFINE_string("topology", None, "TPU version and shape of a slice, such as v5e:16x16 or v5p:4x8x8.")
flags.DEFINE_integer("num_slices", 1, "Slices of that shape.", lower_bound=1)
flags.DEFINE_integer("vocab_size", None, "Tokens, without MASK; by default data.vocab_size of the config.")
flags.DEFINE_enum("what", "train", aot.TARGETS, "Which programs to compile.")


def main() -> dict[str, Any]:
    values, config = flags.FLAGS, cli.config()
    # The cache can store a program for another platform, but not load it.
    jax.config.update("jax_enable_compilation_cache", False)
    vocab_size = values.vocab_size or config.data.vocab_size or cli.required("vocab_size")
    target = {"topology": cli.required("topology"), "num_slices": values.num_slices, "what": values.what}
    result = aot.report(config, vocab_size=vocab_size, **target)
    aot.describe(result, lambda text: print(text, file=sys.stderr, flush=True))
    return result


if __name__ == "__main__":
    cli.run(main)
