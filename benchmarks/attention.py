"""Speed of our XLA attention and of `jax.nn.dot_product_attention`, each with its gradient, on the local devices.

python -m benchmarks.attention [--batch=16] [--length=256] [--heads=4] [--head_dim=64] [--dtype=float32]
"""

import json

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.rounds import medians
from sedd_jax.transformer import attention

flags.DEFINE_integer("batch", 16, "Sequences.")
flags.DEFINE_integer("length", 256, "Positions per sequence.")
flags.DEFINE_integer("heads", 4, "Heads.")
flags.DEFINE_integer("head_dim", 64, "Width per head.")
flags.DEFINE_string("dtype", "float32", "Dtype of q, k and v.")
flags.DEFINE_integer("repeats", 10, "Rounds.")


def main(_):
    options = flags.FLAGS
    shape = (3, options.batch, options.length, options.heads, options.head_dim)
    qkv = jax.random.normal(jax.random.key(0), shape, options.dtype)

    def call(attend):
        gradient = jax.jit(jax.grad(lambda qkv: jnp.sum(attend(*qkv).astype(jnp.float32))))
        return lambda: gradient(qkv)

    seconds = medians(options.repeats, xla=call(attention.xla), jax_nn=call(jax.nn.dot_product_attention))
    figures = {"seconds": seconds, "jax_nn_over_xla": seconds["jax_nn"] / seconds["xla"]}
    print(json.dumps(figures | {"device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    app.run(main)
