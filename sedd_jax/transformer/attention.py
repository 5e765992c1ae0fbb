"""softmax(q k^T / sqrt d) v by whichever implementation suits the device.

Every position attends to every other; with causal=True to itself and those before.
Shapes: q, k, v and the result are [B, L, H, D], of one dtype; the softmax is taken in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.devices.sharding import LANES, spec
from sedd_jax.errors import InputError
from sedd_jax.transformer.linear import precision

Heads = Float[Array, "b l h d"]


@jax.custom_jvp
def _softmax(scores: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """Its gradient stores the weights only; that of jax.nn's also stores their exponentials."""
    return jax.nn.softmax(scores)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    weights, moved = _softmax(*primals), tangents[0]
    return weights, weights * (moved - jnp.sum(weights * moved, -1, keepdims=True))


def xla(q: Heads, k: Heads, v: Heads, *, causal: bool = False) -> Heads:
    """Without a fused kernel, on any device. Holds the weights, [B, H, L, L].

    Heads are moved before positions: on a CPU the batched products are then twice as fast as those of
    `jax.nn.dot_product_attention` (`python -m benchmarks.attention`); elsewhere the compiler chooses the layout.
    """
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    products = {"precision": precision(v.dtype), "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, **products)
    if causal:
        scores = jnp.where(jnp.tri(q.shape[2], dtype=bool), scores, -jnp.inf)
    weights = _softmax(scores).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, v, precision=precision(v.dtype)), 1, 2)


def cudnn(q: Heads, k: Heads, v: Heads, *, causal: bool = False) -> Heads:
    """NVIDIA's fused kernel, for GPUs and bfloat16."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def splash(q: Heads, k: Heads, v: Heads, *, causal: bool = False, interpret: bool = False) -> Heads:
    """The Pallas kernel for TPUs that ships with JAX; L must be a multiple of 128, that of its blocks. interpret: run
    it as JAX operations, on any device and slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # half a second that only TPUs need

    length, dim = q.shape[1], q.shape[-1]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), block)
    blocks = splash_attention.BlockSizes(**sizes, use_fused_bwd_kernel=True)

    def local(q, k, v):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * dim**-0.5, k, v))
        one_head = (splash_attention.CausalMask if causal else splash_attention.FullMask)((length, length))
        mask = splash_attention.MultiHeadMask([one_head] * q.shape[1])
        kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v)
    # The compiler cannot split a kernel: each device runs it on its own sequences and heads.
    places = spec(q.shape, ("batch", None, "heads", None), mesh)
    return jax.shard_map(local, mesh=mesh, in_specs=(places,) * 3, out_specs=places, check_vma=False)(q, k, v)


def cached(q: Float[Array, "b 1 h d"], k: Heads, v: Heads, position: Int[Array, ""]) -> Float[Array, "b 1 h d"]:
    """Causal attention of the query at `position` over the keys and values up to there. k, v: of all positions."""
    products = {"precision": precision(v.dtype), "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, **products)
    weights = jax.nn.softmax(jnp.where(jnp.arange(k.shape[1]) <= position, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, precision=precision(v.dtype))


IMPLEMENTATIONS = {"plain": xla, "cudnn": cudnn, "splash": splash}
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


def choose(kind: str, *, platform: str, dtype: str, length: int) -> str:
    """The implementation for model.attention=kind: 'auto' takes the device's own kernel where possible. platform: of
    the devices, 'cpu', 'gpu' or 'tpu'. Raises InputError for a kind that is unknown or not for them."""
    if kind == "auto":
        fused = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "plain")
        return "plain" if dtype != "bfloat16" or (fused == "splash" and length % LANES) else fused
    if kind not in IMPLEMENTATIONS:
        raise InputError(f"model.attention={kind!r} is unknown; choose 'auto', 'plain', 'cudnn' or 'splash'")
    needed = PLATFORMS.get(kind, platform)
    if platform != needed:
        raise InputError(f"model.attention={kind!r} needs a {needed.upper()}, and there are {platform}s; give 'auto'")
    if kind in PLATFORMS and dtype != "bfloat16":
        raise InputError(f"model.attention={kind!r} needs model.dtype='bfloat16', not {dtype!r}; give 'plain' or that")
    if kind == "splash" and length % LANES:
        raise InputError(f"data.length={length} must be a multiple of {LANES} for model.attention='splash'")
    return kind
