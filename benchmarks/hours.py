"""Estimated hours of the recipes: FLOPs of their matrix products over an assumed share of the published peak.

python -m benchmarks.hours [--mfu=0.4]
"""

import importlib

from absl import app, flags

from sedd_jax.config import build
from sedd_jax.devices import chips
from sedd_jax.training import flops
from sedd_jax.transformer import Transformer

RECIPES = ("text8", "lm1b", "small", "medium", "fineweb_edu")
HARDWARE = {"8 H100": (8, "NVIDIA H100"), "16 v5e": (16, "TPU v5 lite"), "32 v5e": (32, "TPU v5 lite")}

flags.DEFINE_float("mfu", 0.4, "Assumed share of the published peak.")


def main(_):
    print("| recipe | FLOPs per token | tokens per step | steps | FLOPs | " + " | ".join(HARDWARE) + " |")
    print("|---" * (5 + len(HARDWARE)) + "|")
    for name in RECIPES:
        config = importlib.import_module(f"configs.{name}").get_config()
        # The absorbing graph has one state more than there are tokens.
        states = config.data.vocab_size + 1
        model = build(Transformer, "model", config, num_states=states, parent=None, name=None)
        per_token = flops.train_flops_per_token(model, config.data.length)
        tokens = config.train.batch_size * config.data.length
        total = per_token * tokens * config.train.steps
        hours = [
            total / (count * chips.of_kind(kind).flops * flags.FLAGS.mfu) / 3600 for count, kind in HARDWARE.values()
        ]
        figures = [f"{per_token / 1e6:,.0f} M", f"{tokens:,}", f"{config.train.steps:,}", f"{total:.2g}"]
        print(f"| {name} | " + " | ".join(figures + [f"{hour:.1f} h" for hour in hours]) + " |")


if __name__ == "__main__":
    app.run(main)
