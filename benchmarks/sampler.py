"""A network call of each sampler, its draws included, beside a bare forward pass of the same batch.

python -m benchmarks.sampler [--config=configs/small.py] [--vocab_size=50257] [--batch=1] [--steps=8]
"""

import json

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from benchmarks.rounds import medians
from sedd_jax.rates import Absorbing
from sedd_jax.sampling import GRID_METHODS, METHODS
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.options import SamplingOptions

config_flags.DEFINE_config_file("config", "configs/small.py")
flags.DEFINE_integer("vocab_size", 50_257, "Tokens, without MASK.")
flags.DEFINE_integer("batch", 1, "Sequences.")
flags.DEFINE_integer("steps", 8, "Reverse steps; one more network call denoises.")
flags.DEFINE_integer("repeats", 3, "Rounds.")


def main(_):
    options = flags.FLAGS
    experiment = make_experiment(options.config, options.vocab_size)
    shape = (options.batch, options.config.data.length)
    with jax.set_mesh(experiment.mesh):
        params = experiment.init_state(jax.random.key(0)).params
        x, sigma = jnp.zeros(shape, jnp.int32), jnp.ones(options.batch)
        free = (jnp.zeros(shape, bool), x)
        forward = jax.jit(lambda params: experiment.score_fn(params)(x, sigma))
        known = [name for name in METHODS if name in GRID_METHODS or isinstance(experiment.graph, Absorbing)]
        draws = {name: experiment.sample_fn(SamplingOptions(method=name)) for name in known}
        seconds = medians(
            options.repeats,
            forward=lambda: forward(params),
            **{
                name: lambda draw=draw: draw(params, jax.random.key(1), free, options.steps, 0)
                for name, draw in draws.items()
            },
        )
        calls = {
            name: int(draw(params, jax.random.key(1), free, options.steps, 0).calls) for name, draw in draws.items()
        }
    figures = {"forward_seconds": seconds["forward"], "device": jax.devices()[0].device_kind}
    for method in draws:
        figures[f"{method}_call_over_forward"] = seconds[method] / calls[method] / seconds["forward"]
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
