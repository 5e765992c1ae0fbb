"""FLOPs of a training step, and how many the devices can do."""

import functools
import timeit

import jax
import jax.numpy as jnp

from sedd_jax.devices import chips
from sedd_jax.transformer import Transformer


def flops_per_token(model: Transformer, length: int, head_share: float = 1.0) -> float:
    """FLOPs of the matrix products of a forward pass, per token: 2 per weight, and attention's 4 L dim per layer, or
    half of that for a causal model, whose queries have (L + 1) / 2 keys on average. Neither the embedding, a look-up,
    nor the conditioning, per sequence, counts. head_share: of positions that go through the head."""
    keys = (length + 1) // 2 if model.causal else length
    weights = model.num_layers * (4 + 2 * model.mlp_ratio) * model.dim**2 + head_share * model.dim * model.num_states
    return 2 * weights + 4 * model.num_layers * keys * model.dim


def train_flops_per_token(model: Transformer, length: int, head_share: float = 1.0) -> float:
    """Three times the forward pass. Recomputation (remat) is not counted, so MFU is a share of useful work."""
    return 3 * flops_per_token(model, length, head_share)


@functools.cache
def peak_flops() -> float:
    """FLOP/s of all devices together: published, or for one in no table (a CPU) measured by a float32 product."""
    kind = jax.devices()[0].device_kind
    if chip := chips.of_kind(kind):
        return chip.flops * jax.device_count()
    size = 1536
    product = functools.partial(jax.jit(jnp.matmul), *[jnp.ones((size, size))] * 2)
    product().block_until_ready()
    count, seconds = timeit.Timer(lambda: product().block_until_ready()).autorange()
    # Virtual CPU devices share the cores of their host.
    return 2 * size**3 * count / seconds * (jax.process_count() if kind == "cpu" else jax.device_count())
