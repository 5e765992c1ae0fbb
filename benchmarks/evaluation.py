"""Memory of an evaluation: the bound, or the AR baseline's likelihood, in chunks of positions and by whole log-scores.

    python -m benchmarks.evaluation [--config=configs/small.py] [--vocab_size=50257] [--batch=4]

Reports the bytes of XLA's temporaries on one device. Nothing is run.
"""

import json

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from sedd_jax.autoregressive import cross_entropy
from sedd_jax.score_entropy import denoising_loss
from sedd_jax.training.experiment import make_experiment

config_flags.DEFINE_config_file("config", "configs/small.py")
flags.DEFINE_integer("vocab_size", 50_257, "Tokens, without MASK.")
flags.DEFINE_integer("batch", 4, "Sequences.")


def main(_):
    options = flags.FLAGS
    experiment = make_experiment(options.config, options.vocab_size, jax.devices()[:1])

    def plain(params, key, tokens, first_index):
        score_fn = experiment.score_fn(params)
        if experiment.model.causal:
            return cross_entropy(score_fn(tokens, jnp.zeros(len(tokens))), tokens).sum(-1)

        def at(key):  # the costlier part of the bound, by the definition
            noised = experiment.objective.noised(key, tokens)
            return denoising_loss(score_fn, experiment.graph, noised, tokens)

        return jax.lax.map(at, jax.random.split(key, 2)).mean(0)

    tokens = jax.ShapeDtypeStruct((options.batch, options.config.data.length), jnp.int32)
    inputs = experiment.abstract_state().params, jax.eval_shape(lambda: jax.random.key(0)), tokens, 0
    with jax.set_mesh(experiment.mesh):
        calls = {"plain": jax.jit(plain), "chunks": experiment.bound_fn(2)}
        size = {name: call.lower(*inputs).compile().memory_analysis() for name, call in calls.items()}
    size = {name: analysis.temp_size_in_bytes for name, analysis in size.items()}
    figures = {"temporary_megabytes": {name: value / 1e6 for name, value in size.items()}}
    figures |= {"chunks_over_plain": size["chunks"] / size["plain"], "device": jax.devices()[0].device_kind}
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
