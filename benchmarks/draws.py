"""Whole draws: network calls and seconds of each sampler, for networks with and without time conditioning.

    python -m benchmarks.draws [--config=configs/small.py] [--vocab_size=50257] [--batch=1] [--steps=16,64,256]

Without time conditioning, a call is left out if no token of the batch has changed since the last one. The weights are
random and the head is zero, so the scores are normalised, and with the absorbing graph the times at which tokens appear
follow the schedule, as they do with a trained model whose scores are. `entropy`, whose calls depend on the model, is
not here.
"""

import json

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from benchmarks.rounds import medians
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.options import SamplingOptions

METHODS = ["analytic", "euler", "trapezoidal", "first_hitting", "confidence"]

config_flags.DEFINE_config_file("config", "configs/small.py")
flags.DEFINE_integer("vocab_size", 50_257, "Tokens, without MASK.")
flags.DEFINE_integer("batch", 1, "Sequences.")
flags.DEFINE_multi_enum("method", METHODS, METHODS, "A sampler; may be repeated.")
flags.DEFINE_list("steps", ["16", "64", "256"], "Reverse steps, or the most calls of samplers without a time grid.")
flags.DEFINE_integer("repeats", 3, "Rounds.")


def main(_):
    options, draws, calls = flags.FLAGS, {}, {}
    config, shape = options.config, (options.batch, options.config.data.length)
    free = (jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))

    def add(name, sample_fn, params, steps):
        def draw():
            calls[name] = sample_fn(params, jax.random.key(1), free, steps, 0).calls
            return calls[name]

        draws[name] = draw

    for timed in (True, False):
        config.model.time_conditioning = timed
        experiment = make_experiment(config, options.vocab_size)
        with jax.set_mesh(experiment.mesh):
            params = experiment.init_state(jax.random.key(0)).params
        for method in options.method:
            sample_fn = experiment.sample_fn(SamplingOptions(method=method))
            for steps in options.steps:
                kind = "with" if timed else "without"
                add(f"{method}, {steps} steps, {kind} time", sample_fn, params, int(steps))
    with jax.set_mesh(experiment.mesh):
        seconds = medians(options.repeats, **draws)
    figures = {name: {"calls": int(calls[name]), "seconds": round(seconds[name], 2)} for name in draws}
    print(json.dumps(figures | {"device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    app.run(main)
