"""softmax(q k^T / sqrt d) v by whichever implementation suits the device.

Every position attends to every other; with causal=True to itself and those before. The softmax is taken in float32.
Shapes, but for `fused`: q, k, v and the result are [B, L, H, D], of one dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.devices.sharding import LANES, spec
from sedd_jax.errors import InputError
from sedd_jax.transformer.linear import precision

Heads = Float[Array, "b l h d"]
Projections = Float[Array, "b l 3 e"]  # q, k and v of all heads, one behind the other


def angles(length: int, head_dim: int, start: Int[Array, ""] | int = 0) -> Float[Array | np.ndarray, "l c"]:
    """Of rotary position embeddings, base 10000, for positions from `start` on and the first half of the features. By
    NumPy where it can: a constant's sines are constants, others XLA takes anew for each head of each sequence."""
    frequency = np.float32(10000) ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return (start + np.arange(length, dtype=np.float32))[:, None] * frequency


def rotary(x: Heads, start: Int[Array, ""] | int = 0) -> Heads:
    """Rotary position embedding, rotate-half layout: feature i is paired with feature i + d/2. start: the position of
    x[:, 0]."""
    angle = angles(x.shape[1], x.shape[-1], start)[:, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


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


def fused(qkv: Projections, num_heads: int, *, causal: bool = False, interpret: bool = False) -> Float[Array, "b l e"]:
    """Rotary positions and attention by our own kernels for TPUs (`kernel`), in the layout of the products beside them.
    L must be a multiple of 128. interpret: as for `splash`."""
    from sedd_jax.transformer import kernel  # as above

    batch, length, _, width = qkv.shape
    heads = jnp.moveaxis(qkv, 1, 3).reshape(batch, 3, num_heads, width // num_heads, length)

    def local(heads):
        angle = angles(length, width // num_heads).T
        return kernel.attention(heads, jnp.cos(angle), jnp.sin(angle), causal, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        given = spec(heads.shape, ("batch", None, "heads", None, None), mesh)
        made = spec(heads[:, 0].shape, ("batch", "heads", None, None), mesh)
        local = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)
    return jnp.swapaxes(local(heads).reshape(batch, width, length), 1, 2)


IMPLEMENTATIONS = {"plain": xla, "cudnn": cudnn, "splash": splash}
PLATFORMS = {"cudnn": "gpu", "splash": "tpu", "fused": "tpu"}
MOST_OF_A_HEAD = 128 * 2048  # numbers of q, as many of k and v, for `fused`


def attend(kind: str, qkv: Projections, num_heads: int, *, causal: bool) -> Float[Array, "b l e"]:
    """Attention with rotary positions by the implementation `kind`."""
    if kind == "fused":
        return fused(qkv, num_heads, causal=causal)
    q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:3], num_heads, -1), 2, 0)
    h = IMPLEMENTATIONS[kind](rotary(q), rotary(k), v, causal=causal)
    return h.reshape(*h.shape[:2], -1)


def choose(kind: str, *, platform: str, dtype: str, length: int, head_dim: int) -> str:
    """The implementation for model.attention=kind: 'auto' takes the device's own kernel where possible. platform: of
    the devices, 'cpu', 'gpu' or 'tpu'. Raises InputError for a kind that is unknown or not for them."""
    whole = length % LANES == 0
    on_chip = whole and head_dim % 32 == 0 and length * head_dim <= MOST_OF_A_HEAD
    if kind == "auto":
        kernels = {"tpu": "fused" if on_chip else "splash" if whole else "plain", "gpu": "cudnn"}
        return kernels.get(platform, "plain") if dtype == "bfloat16" else "plain"
    if kind not in IMPLEMENTATIONS | PLATFORMS:
        raise InputError(f"model.attention={kind!r} is unknown; choose 'auto', 'plain', 'cudnn', 'splash' or 'fused'")
    needed = PLATFORMS.get(kind, platform)
    if platform != needed:
        raise InputError(f"model.attention={kind!r} needs a {needed.upper()}, and there are {platform}s; give 'auto'")
    if kind in PLATFORMS and dtype != "bfloat16":
        raise InputError(f"model.attention={kind!r} needs model.dtype='bfloat16', not {dtype!r}; give 'plain' or that")
    if kind in ("splash", "fused") and not whole:
        raise InputError(f"data.length={length} must be a multiple of {LANES} for model.attention={kind!r}")
    if kind == "fused" and not on_chip:
        what = f"heads of {head_dim} (a multiple of 32) x data.length={length} must be at most {MOST_OF_A_HEAD}"
        raise InputError(f"model.attention='fused': {what}, which fit on a chip; give 'splash'")
    return kind
