"""The network: (tokens, sigma) -> log-score. A bidirectional transformer conditioned on the noise level (DiT style).

It knows nothing of rates, noise or loss. Weights carry logical axis names, which `sharding.py` maps to a mesh.
Architecture: Lou et al. 2023, appendix C.2; Peebles & Xie 2022 for adaLN-zero; Su et al. 2021 for the rotary embedding.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.attention import IMPLEMENTATIONS
from sedd_jax.errors import InputError
from sedd_jax.sharding import constrain, gather

# Uniform on +-1/sqrt(fan_in), for weights [fan_in, ...]: what torch gives a Linear layer, and the reference has.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=-1)


def _bias_init(fan_in: int) -> Callable:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def _product(x: Array, kernel: Array, out_dtype: str) -> Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)


@jax.custom_vjp
def _widening_product(x: Array, kernel: Array) -> Array:
    """bfloat16 operands, float32 result; and bfloat16 operands in the backward pass too, which would otherwise have
    the float32 gradient of the result as one, at a fraction of the speed."""
    return _product(x, kernel, "float32")


def _widening_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernel: _product(x, kernel, x.dtype), *operands)[1](gradient.astype(operands[0].dtype))


_widening_product.defvjp(lambda x, kernel: (_widening_product(x, kernel), (x, kernel)), _widening_backward)


class Linear(nn.Module):
    """x [..., in] -> [..., *features], with one matrix product however many feature axes there are.

    axes: the logical names of the weight's axes, input first.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    zero_init: bool = False
    dtype: str = "float32"
    out_dtype: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        fan_in = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        kernel_init = nn.with_logical_partitioning(zeros if self.zero_init else _kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (fan_in, *self.features), jnp.float32)
        kernel = gather(kernel.astype(self.dtype), self.axes)
        out_dtype = self.out_dtype or self.dtype
        x = x.astype(self.dtype)
        y = _product(x, kernel, out_dtype) if out_dtype == self.dtype else _widening_product(x, kernel)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(zeros if self.zero_init else _bias_init(fan_in), self.axes[1:])
            y = y + self.param("bias", bias_init, self.features, jnp.float32).astype(out_dtype)
        return y


# The backward pass computes these again from their inputs: that costs less than to store and load what they consist of,
# and takes a third off the memory of a step (931 to 604 MB in the setting of configs/baseline.py). In a scan, nothing
# need keep XLA from merging the two.
_recompute = partial(jax.checkpoint, prevent_cse=False)

gelu = _recompute(partial(jax.nn.gelu, approximate=True))


@_recompute
def _norm_and_modulate(
    x: Float[Array, "b l d"], weight: Float[Array, " d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b l d"]:
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight
    return x * (1 + scale[:, None]) + shift[:, None]


class ModulatedNorm(nn.Module):
    """Layer norm over the last axis in float32 with a learned scale and no bias, then x * (1 + scale) + shift, the
    modulation of each sequence."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
    ) -> Float[Array, "b l d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        return _norm_and_modulate(x, self.param("scale", init, (x.shape[-1],), jnp.float32), shift, scale)


def sinusoidal(sigma: Float[Array, " b"], features: int = 256, period: float = 10000.0) -> Float[Array, "b f"]:
    """Cosines, then sines, of sigma at geometrically spaced frequencies from 1 down to 1/period."""
    half = features // 2
    angles = sigma[:, None] * period ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotary(x: Float[Array, "b l h d"]) -> Float[Array, "b l h d"]:
    """Rotary position embedding, base 10000, rotate-half layout: feature i is paired with feature i + d/2."""
    length, head_dim = x.shape[1], x.shape[-1]
    frequency = 10000.0 ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each as x + gate * f(modulate(norm(x))), with shift, scale and gate from the condition."""

    num_heads: int
    mlp_ratio: int
    dropout: float
    dtype: str
    attention: str
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], condition: Float[Array, "b c"]) -> tuple[Float[Array, "b l d"], None]:
        batch, length, dim = x.shape
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        modulation = Linear((6, dim), ("cond", None, "embed"), zero_init=True, dtype=self.dtype, name="modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(modulation(condition), 1, 0)

        h = ModulatedNorm(name="norm1")(x, shift1, scale1)
        qkv = Linear((3, dim), ("embed", None, "heads"), use_bias=False, dtype=self.dtype, name="qkv")(h)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.num_heads, -1), 2, 0)
        h = IMPLEMENTATIONS[self.attention](rotary(q), rotary(k), v).reshape(batch, length, dim)
        h = Linear((dim,), ("heads", "embed"), use_bias=False, dtype=self.dtype, name="attention_out")(h)
        x = x + gate1[:, None] * drop(h)

        h = ModulatedNorm(name="norm2")(x, shift2, scale2)
        h = Linear((self.mlp_ratio * dim,), ("embed", "mlp"), dtype=self.dtype, name="mlp_in")(h)
        h = Linear((dim,), ("mlp", "embed"), dtype=self.dtype, name="mlp_out")(gelu(h))
        x = x + gate2[:, None] * drop(h)
        return constrain(x, "batch", None, None), None


REMAT = {
    "none": lambda block: block,
    "blocks": partial(nn.remat, prevent_cse=False),
    "dots": partial(nn.remat, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


class Transformer(nn.Module):
    """`.apply({'params': p}, tokens, sigma)` -> log-score [B, L, N] float32, exactly 0 at the current token.

    num_states: N, the tokens and MASK if the graph has one.
    scale_by_sigma: subtract log(e^sigma - 1) + log(N - 1), the scale of the absorbing graph's scores, so that the
        untrained network starts near it. True for absorbing, False for uniform.
    dtype: of the matrix products and activations ('float32' or 'bfloat16'); parameters, the residual stream, norms
        and the log-score are float32 always.
    attention: a name in `attention.IMPLEMENTATIONS`; a config may also say 'auto', see `attention.choose`.
    remat: what the backward pass computes again instead of storing it: 'none', all but each block's input ('blocks'),
        or all but the products with weights ('dots').
    Training applies dropout: pass train=True and rngs={'dropout': key}.
    """

    num_states: int
    num_layers: int = 12
    dim: int = 768
    num_heads: int = 12
    cond_dim: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.1
    scale_by_sigma: bool | None = True
    dtype: str = "float32"
    attention: str = "plain"
    remat: str = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise InputError(
                f"model.num_heads={self.num_heads} must divide model.dim={self.dim} into heads of an even width"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"model.dtype={self.dtype!r} is unknown; choose 'float32' or 'bfloat16'")
        if self.remat not in REMAT:
            raise InputError(f"model.remat={self.remat!r} is unknown; choose one of {', '.join(map(repr, REMAT))}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout={self.dropout} must lie in [0, 1)")

    def setup(self):
        self.head = Linear(
            (self.num_states,), ("embed", "vocab"), zero_init=True, dtype=self.dtype, out_dtype="float32"
        )

    def __call__(
        self, tokens: Int[Array, "b l"], sigma: Float[Array, " b"], train: bool = False
    ) -> Float[Array, "b l n"]:
        return self.log_score(self.features(tokens, sigma, train), tokens, sigma)

    @nn.compact
    def features(
        self, tokens: Int[Array, "b l"], sigma: Float[Array, " b"], train: bool = False
    ) -> Float[Array, "b l d"]:
        """Everything but the last matrix product. With `log_score`, for a loss that never has the whole [B, L, N]."""
        condition = Linear((self.cond_dim,), (None, "cond"), name="sigma_in")(sinusoidal(sigma))
        condition = Linear((self.cond_dim,), ("cond", None), name="sigma_out")(nn.silu(condition))
        condition = nn.silu(condition)

        # Torch's kaiming_uniform(a=sqrt 5) on [N, dim] has fan_in = dim.
        embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(_bias_init(self.dim), (None, "embed")),
            (self.num_states, self.dim),
            jnp.float32,
        )
        # Each device looks up its columns for all sequences of its fsdp group, which then exchange them: the rows that
        # are looked up are less than the table, and the table's gradient stays split as the table is.
        x = constrain(embedding[constrain(tokens, "replica", None)], "replica", None, "embed")
        x = constrain(x, "batch", None, None)

        blocks = nn.scan(
            REMAT[self.remat](Block),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.num_heads, self.mlp_ratio, self.dropout, self.dtype, self.attention, train, name="blocks")
        x, _ = blocks(x, condition)

        modulation = Linear((2, self.dim), ("cond", None, "embed"), zero_init=True, dtype=self.dtype, name="modulation")
        shift, scale = jnp.moveaxis(modulation(condition), 1, 0)
        return ModulatedNorm(name="norm")(x, shift, scale).astype(self.dtype)

    def log_score(
        self, features: Float[Array, "b l d"], tokens: Int[Array, "b l"], sigma: Float[Array, " b"]
    ) -> Float[Array, "b l n"]:
        """The log-score from `features`; needs no parameters but `head`."""
        log_score = self.head(features)
        if self.scale_by_sigma:
            log_score = log_score - (jnp.log(jnp.expm1(sigma)) + jnp.log(self.num_states - 1.0))[:, None, None]
        log_score = jnp.where(jnp.arange(self.num_states) == tokens[..., None], 0, log_score)
        return constrain(log_score, "batch", None, "vocab")
