"""softmax(q k^T / sqrt d) v by whichever implementation suits the device.

Every position attends to every other; with causal=True to itself and those before.
Shapes: q, k, v and the result are [B, L, H, D], of one dtype; the softmax is taken in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.devices.sharding import spec
from sedd_jax.errors import InputError

Heads = Float[Array, "b l h d"]

# The splash kernel's blocks of positions are multiples of this.
LANES = 128


@jax.custom_jvp
def _softmax(scores: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """The gradient needs the weights alone, where that of jax.nn's keeps their exponentials as well."""
    return jax.nn.softmax(scores)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    weights, moved = _softmax(*primals), tangents[0]
    return weights, weights * (moved - jnp.sum(weights * moved, -1, keepdims=True))


def plain(q: Heads, k: Heads, v: Heads, *, causal: bool = False) -> Heads:
    """In plain XLA, on any device. Holds the weights, [B, H, L, L].

    Heads move in front of positions first: on a CPU the batched products are then twice as fast as those of
    `jax.nn.dot_product_attention` (`python -m benchmarks.attention`), elsewhere the compiler chooses the layout anyway.
    """
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if causal:
        scores = jnp.where(jnp.tri(q.shape[2], dtype=bool), scores, -jnp.inf)
    weights = _softmax(scores).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, v), 1, 2)


def cudnn(q: Heads, k: Heads, v: Heads, *, causal: bool = False) -> Heads:
    """NVIDIA's fused kernel, for GPUs and bfloat16."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def splash(q: Heads, k: Heads, v: Heads, *, causal: bool = False, interpret: bool = False) -> Heads:
    """The Pallas kernel for TPUs that ships with JAX; L must be a multiple of 128.

    interpret: run it as plain JAX operations, anywhere and slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # half a second that only TPUs need

    length, dim = q.shape[1], q.shape[-1]
    if length % LANES:
        raise InputError(f"data.length={length} must be a multiple of {LANES} for model.attention='splash'")
    block = next(size for size in (512, 256, 128) if length % size == 0)
    blocks = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )

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
    """Causal attention of the one query at `position`: over the keys and values up to there, of all that there will
    be."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.arange(k.shape[1]) <= position, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


IMPLEMENTATIONS = {"plain": plain, "cudnn": cudnn, "splash": splash}
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


def choose(kind: str, *, platform: str, dtype: str, length: int) -> str:
    """The implementation to use where a config says `kind`: 'auto' for the device's own kernel where it can be used.

    platform: of the devices, 'cpu', 'gpu' or 'tpu'. Raises InputError for a kind that is unknown or not for them.
    """
    if kind == "auto":
        if platform == "tpu" and length % LANES == 0:
            return "splash"
        return "cudnn" if platform == "gpu" and dtype == "bfloat16" else "plain"
    if kind not in IMPLEMENTATIONS:
        raise InputError(f"model.attention={kind!r} is unknown; choose 'auto', 'plain', 'cudnn' or 'splash'")
    needed = PLATFORMS.get(kind, platform)
    if platform != needed:
        raise InputError(
            f"model.attention={kind!r} needs a {needed.upper()}, and the devices are {platform}s; give 'auto'"
        )
    if kind == "cudnn" and dtype != "bfloat16":
        raise InputError(f"model.attention='cudnn' needs model.dtype='bfloat16', not {dtype!r}")
    if kind == "splash" and length % LANES:
        raise InputError(f"data.length={length} must be a multiple of {LANES} for model.attention='splash'")
    return kind
