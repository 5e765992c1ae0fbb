"""Rotary positions and attention for TPUs in one Pallas kernel for each direction, with positions in the lanes.

q, k and v are [D, L] per head, as the products beside the kernel write and read them: nothing is transposed on the way,
heads of 64 do not fill up 128 lanes, and softmax sums along sublanes. All keys of a head are on the chip at once, so no
sum is corrected later (as in Dao et al., arXiv 2205.14135, which the backward pass follows). Grid: sequences x heads.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

QKV = Float[Array, "b 3 h d l"]
Heads = Float[Array, "b h d l"]
# Scores on the chip at once, [keys, a block of queries]: 2 MB in float32.
SCORES = 2**19


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)


def _rotate(x: Float[Array, "d l"], cos: Float[Array, "c l"], sin: Float[Array, "c l"]) -> Float[Array, "d l"]:
    first, second = jnp.split(x.astype(jnp.float32), 2)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin])


def _scaled(qkv: Any, cos: Any, sin: Any) -> tuple[Array, Array, Array]:
    """q and k as they are multiplied, and v."""
    _, dim, _ = qkv.shape
    q, k = (_rotate(qkv[i], cos[...], sin[...]) for i in (0, 1))
    return (q * dim**-0.5).astype(qkv.dtype), k.astype(qkv.dtype), qkv[2]


def _scores(q: Array, k: Array, start: int, causal: bool) -> Float[Array, "k q"]:
    """Of queries from `start` on, transposed."""
    scores = _dot(k, q, 0, 0)
    if causal:
        key, query = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        scores = jnp.where(key <= start + query, scores, -jnp.inf)
    return scores


def _blocks(length: int, causal: bool) -> list[tuple[int, slice, slice]]:
    """(start, queries, the keys that they see)."""
    size = next(size for size in (512, 256, 128) if length % size == 0 and size * length <= max(SCORES, 128 * length))
    starts = range(0, length, size)
    return [(start, slice(start, start + size), slice(0, start + size if causal else length)) for start in starts]


def _forward(qkv: Any, cos: Any, sin: Any, out: Any, normaliser: Any, *, causal: bool) -> None:
    q, k, v = _scaled(qkv, cos, sin)
    for start, queries, keys in _blocks(qkv.shape[-1], causal):
        scores = _scores(q[:, queries], k[:, keys], start, causal)
        largest = scores.max(0, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(0, keepdims=True)
        out[:, queries] = (_dot(v[:, keys], weights.astype(v.dtype), 1, 0) / total).astype(out.dtype)
        normaliser[:, queries] = largest + jnp.log(total)


def _backward(qkv: Any, cos: Any, sin: Any, normaliser: Any, d_out: Any, d_qkv: Any, dk: Any, dv: Any, *, causal: bool):
    """dk, dv: float32 sums over blocks of queries."""
    q, k, v = _scaled(qkv, cos, sin)
    dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)
    for start, queries, keys in _blocks(qkv.shape[-1], causal):
        d_block, turn_back = d_out[:, queries], (cos[:, queries], -sin[:, queries])
        weights = jnp.exp(_scores(q[:, queries], k[:, keys], start, causal) - normaliser[:, queries])
        moved = _dot(v[:, keys], d_block, 0, 0)
        d_scores = (weights * (moved - jnp.sum(weights * moved, 0, keepdims=True))).astype(q.dtype)
        dq = _dot(k[:, keys], d_scores, 1, 0) * q.shape[0] ** -0.5
        d_qkv[0, :, queries] = _rotate(dq, *turn_back).astype(q.dtype)
        dk[:, keys] += _dot(q[:, queries], d_scores, 1, 1)
        dv[:, keys] += _dot(d_block, weights.astype(v.dtype), 1, 1)
    d_qkv[1] = _rotate(dk[...], cos[...], -sin[...]).astype(q.dtype)
    d_qkv[2] = dv[...].astype(q.dtype)


def _call(kernel: Any, products: int, inputs: tuple, outputs: tuple, scratch: tuple, causal: bool, interpret: bool):
    """Runs a kernel for each sequence and head. inputs, outputs: arrays with these two axes, or tables without."""
    batch, _, heads, dim, length = inputs[0].shape
    places = {5: ((None, 3, None), lambda b, h: (b, 0, h, 0, 0)), 4: ((None, None), lambda b, h: (b, h, 0, 0))}
    places[2] = (), lambda b, h: (0, 0)

    def spec(a):
        outer, index = places[a.ndim]
        return pl.BlockSpec((*outer, *a.shape[-2:]), index)

    pairs = batch * heads * length**2
    moved = sum(a.size * a.dtype.itemsize for a in (*inputs, *outputs))
    return pl.pallas_call(
        partial(kernel, causal=causal),
        grid=(batch, heads),
        in_specs=[spec(a) for a in inputs],
        out_specs=[spec(a) for a in outputs],
        out_shape=outputs,
        scratch_shapes=scratch,
        interpret=interpret,
        name=f"attention{kernel.__name__}",
        cost_estimate=pl.CostEstimate(flops=2 * products * pairs * dim, transcendentals=pairs, bytes_accessed=moved),
    )(*inputs)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attention(qkv: QKV, cos: Any, sin: Any, causal: bool, interpret: bool) -> Heads:
    """softmax(rotary(q)^T rotary(k) / sqrt D) v of each head. cos, sin: [D/2, L], of the angles. L: a multiple of 128.
    interpret: as JAX operations, on any device and slowly."""
    return _attention_forward(qkv, cos, sin, causal, interpret)[0]


def _attention_forward(qkv, cos, sin, causal, interpret):
    batch, _, heads, dim, length = qkv.shape
    shapes = ((batch, heads, dim, length), qkv.dtype), ((batch, heads, 1, length), jnp.float32)
    outputs = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    out, normaliser = _call(_forward, 2, (qkv, cos, sin), outputs, (), causal, interpret)
    return out, (qkv, cos, sin, normaliser)


def _attention_backward(causal, interpret, kept, d_out):
    qkv = kept[0]
    scratch = (pltpu.VMEM(qkv.shape[-2:], jnp.float32),) * 2
    outputs = (jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),)
    (d_qkv,) = _call(_backward, 5, (*kept, d_out), outputs, scratch, causal, interpret)
    return d_qkv, None, None


attention.defvjp(_attention_forward, _attention_backward)
