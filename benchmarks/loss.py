"""Speed and memory of the loss with its gradient by head and features: in chunks of noised positions, and plain.

    python -m benchmarks.loss [--kind=absorbing] [--batch=4] [--length=1024] [--dim=768] [--vocab_size=50257]

Reports seconds and the bytes of XLA's temporaries.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.rounds import medians
from sedd_jax import noise, rates
from sedd_jax.network import chunk_size
from sedd_jax.score_entropy import ScoreEntropy, denoising_loss, loss_and_grads
from sedd_jax.transformer import Transformer

flags.DEFINE_enum("kind", "absorbing", ["absorbing", "uniform"], "Graph.")
flags.DEFINE_integer("batch", 4, "Sequences.")
flags.DEFINE_integer("length", 1024, "Positions per sequence.")
flags.DEFINE_integer("dim", 768, "Width of the network.")
flags.DEFINE_integer("vocab_size", 50_257, "Tokens, without MASK.")
flags.DEFINE_string("dtype", "float32", "Dtype of the matrix products.")
flags.DEFINE_integer("repeats", 3, "Rounds.")


def main(_):
    options = flags.FLAGS
    graph = rates.make(options.kind, options.vocab_size)
    schedule = noise.LogLinear() if options.kind == "absorbing" else noise.Geometric()
    model = Transformer(graph.num_states, num_layers=1, dim=options.dim, dtype=options.dtype)
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, options.vocab_size, (options.batch, options.length)), jnp.int32)
    features = jnp.asarray(random.normal(size=(*tokens.shape, options.dim)), options.dtype)
    kernel = jnp.asarray(random.normal(size=(options.dim, graph.num_states)) * 0.02, jnp.float32)
    head = {"kernel": kernel, "bias": jnp.zeros(graph.num_states)}
    objective = ScoreEntropy(graph, schedule)
    noised = objective.noised(jax.random.key(0), tokens)

    def log_score(head, *rows):
        return model.apply({"params": {"head": head}}, *rows, method="log_score")

    def plain(head, features, noised, tokens):
        def loss(head, features):
            return denoising_loss(lambda x, s: log_score(head, features, x, s), graph, noised, tokens).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(head, features)

    def chunks(head, features, noised, tokens):
        return loss_and_grads(log_score, objective, head, features, noised, tokens, rows=chunk_size(tokens.size))

    inputs = (head, features, noised, tokens)
    compiled = {call.__name__: jax.jit(call).lower(*inputs).compile() for call in (plain, chunks)}
    calls = {name: lambda call=call: call(*inputs) for name, call in compiled.items()}
    temporary = {name: call.memory_analysis().temp_size_in_bytes for name, call in compiled.items()}
    seconds = medians(options.repeats, **calls)
    figures = {
        "seconds": seconds,
        "plain_over_chunks": seconds["plain"] / seconds["chunks"],
        "temporary_megabytes": {name: size / 1e6 for name, size in temporary.items()},
        "chunks_over_plain_memory": temporary["chunks"] / temporary["plain"],
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
