"""The network: (tokens, sigma) -> log-score. A bidirectional transformer conditioned on the noise level (DiT style).

With causal=True it is the AR baseline: no noise level, and the logits of each token given those before it.
It knows nothing of rates, noise or loss. Weights carry logical axis names, which `devices/sharding.py` maps to a mesh.
Architecture: Lou et al. 2023, appendix C.2; Peebles & Xie 2022 for adaLN-zero; Su et al. 2021 for the rotary embedding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.devices.sharding import constrain
from sedd_jax.errors import InputError, check_fields
from sedd_jax.transformer.attention import attend, cached, rotary
from sedd_jax.transformer.linear import PRODUCT, Linear, bias_init
from sedd_jax.typing import LogScore, PerSequence, Tokens

gelu = partial(jax.nn.gelu, approximate=True)
Features = Float[Array, "b l d"]
# One vector per sequence: the noise level and the class, or a shift, scale or gate.
Condition = Float[Array, "b c"] | None
Vector = Float[Array, "b d"]
Position = Int[Array, ""] | None
Numbers = Int[Array, " b"] | None


class ModulatedNorm(nn.Module):
    """Layer norm over the last axis in float32, with a learned scale and no bias, then the modulation of each sequence,
    x * (1 + scale) + shift. Returned as a function, which the product behind it recomputes (`Linear`)."""

    @nn.compact
    def __call__(self, shift: Vector, scale: Vector) -> Callable[[Features], Features]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        weight = self.param("scale", init, (shift.shape[-1],), jnp.float32)

        def norm(x: Features) -> Features:
            x = x.astype(jnp.float32)
            x = x - x.mean(-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight
            return x * (1 + scale[:, None]) + shift[:, None]

        return norm


def modulation(linear: Callable[..., Linear], condition: Condition, count: int, batch: int, dim: int) -> list[Vector]:
    """The shift and scale of a norm and, but for the last one, the gate behind it; of `count` / 3 norms. Without a
    condition they change nothing."""
    if condition is None:
        return [jnp.full((batch, dim), i % 3 == 2, jnp.float32) for i in range(count)]
    layer = linear((count, dim), ("cond", None, "embed"), zero_init=True, name="modulation")
    return list(jnp.moveaxis(layer(condition), 1, 0))


def sinusoidal(sigma: PerSequence, features: int = 256, period: float = 10000.0) -> Float[Array, "b f"]:
    """Cosines, then sines, of sigma at geometrically spaced frequencies from 1 down to 1/period."""
    half = features // 2
    angles = sigma[:, None] * period ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Cache(NamedTuple):
    """Keys (rotated) and values of the positions that the causal network has read; zero elsewhere."""

    keys: Float[Array, "*layers b l h d"]
    values: Float[Array, "*layers b l h d"]


class Block(nn.Module):
    """Attention and MLP, each as x + gate * f(modulate(norm(x))), with shift, scale and gate from the condition.
    Without a condition there is no modulation. With a cache, x is one position and the cache holds those before it."""

    num_heads: int
    mlp_ratio: int
    dropout: float
    dtype: str
    gradient_dtype: str
    attention: str
    qkv_bias: bool
    lora: tuple[int, float]
    train: bool
    causal: bool

    @nn.compact
    def __call__(
        self, x: Features, condition: Condition, cache: Cache | None, position: Position, numbers: Numbers
    ) -> tuple[Features, Cache | None]:
        batch, length, dim = x.shape
        linear = partial(Linear, dtype=self.dtype, gradient_dtype=self.gradient_dtype)
        adapted = partial(linear, lora=self.lora)

        def drop(h: Features) -> Features:
            """Dropout by a key of each sequence, so that a batch may be computed in any parts."""
            if not self.train or not self.dropout:
                return h
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), numbers)
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, h.shape[1:]))(keys)
            return jnp.where(keep, h / (1 - self.dropout), 0)

        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(linear, condition, 6, batch, dim)
        norm = ModulatedNorm(name="norm1")(shift1, scale1)
        qkv = adapted((3, dim), ("embed", None, "heads"), use_bias=self.qkv_bias, name="qkv")(x, norm)
        if cache is None:
            h = attend(self.attention, qkv, self.num_heads, causal=self.causal)
        else:
            q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.num_heads, -1), 2, 0)
            new = Cache(rotary(k, position), v)
            cache = jax.tree.map(lambda known, one: known.at[:, position].set(one[:, 0]), cache, new)
            h = cached(rotary(q, position), *cache, position).reshape(batch, length, dim)
        h = adapted((dim,), ("heads", "embed"), use_bias=False, name="attention_out")(h)
        x = (x + gate1[:, None] * drop(h)).astype(x.dtype)

        norm = ModulatedNorm(name="norm2")(shift2, scale2)
        h = adapted((self.mlp_ratio * dim,), ("embed", "mlp"), name="mlp_in")(x, norm)
        h = adapted((dim,), ("mlp", "embed"), name="mlp_out")(h, gelu)
        x = (x + gate2[:, None] * drop(h)).astype(x.dtype)
        return constrain(x, "batch", None, None), cache


REMAT = {
    "none": lambda block: block,
    "blocks": partial(nn.remat, prevent_cse=False),
    "dots": partial(nn.remat, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT)),
}
DTYPES = ("float32", "bfloat16")
PARAMETRISATIONS = ("score", "mean", "plugin")


class Transformer(nn.Module):
    """`.apply({'params': p}, tokens, sigma)` -> log-score [B, L, N] float32, exactly 0 at the current token.

    causal: the AR baseline. It gives logits [B, L, N] float32: log p(tokens[i] | tokens[:i]) up to normalisation. The
        input at position i is token i - 1, and zeros at the first position. sigma is ignored and has no parameters.
    num_states: N, the tokens and MASK if the graph has one.
    time_conditioning: False leaves sigma and its parameters out of `features`. The absorbing graph allows it: the
        distribution of a clean token does not depend on when the others were masked (RADD, arXiv 2406.03736).
    time_input: which number is the input, 'sigma' or 't' = 1 - e^-sigma, the noised fraction.
    parametrisation: the head's output. 'score': the log-score. 'mean', 'plugin': the softmax over the clean token,
        which to_score, (logits, tokens, sigma [B, 1]) -> log-score, converts: see `rates.Graph.score_of_mean`.
    scale_by_sigma: with the parametrisation 'score', subtract log(e^sigma - 1) + log(N - 1), the scale of the absorbing
        graph's scores, so that the untrained network starts near it. None in a config: with that graph.
    num_classes: of labels, 0 for none. A table [classes + 1, cond_dim], the last row for "no class", adds to the
        condition; it begins as zeros, which change nothing.
    lora_rank, lora_alpha: of adapters beside the products of the blocks, scaled by alpha / rank; 0 for none. Training
        then leaves all else as it is: see `state.split`.
    qkv_bias: whether q, k and v have a bias. Networks have one whose modulation was folded in, see `interop`.
    dtype: of the matrix products and activations ('float32' or 'bfloat16'); parameters, norms and the log-score are
        always float32.
    residual_dtype: of the stream between the blocks, 'float32', or 'bfloat16' to move fewer bytes.
    gradient_dtype: in which devices sum the gradients of weights, 'float32', or 'bfloat16' as dtype is.
    attention: an implementation of `attention.attend`; a config may also say 'auto', see `attention.choose`.
    remat: what the backward pass recomputes: 'none', all but the inputs of 'blocks', or all but products ('dots').
    Dropout needs train=True and rngs={'dropout': key}, and numbers of the sequences if the batch is a part of one.
    """

    num_states: int
    num_layers: int = 12
    dim: int = 768
    num_heads: int = 12
    cond_dim: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.1
    causal: bool = False
    time_conditioning: bool = True
    time_input: str = "sigma"
    parametrisation: str = "score"
    to_score: Callable[..., Float[Array, "b l n"]] | None = None
    scale_by_sigma: bool | None = True
    num_classes: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    qkv_bias: bool = False
    dtype: str = "float32"
    residual_dtype: str = "float32"
    gradient_dtype: str = "float32"
    attention: str = "plain"
    remat: str = "none"

    def __post_init__(self):
        super().__post_init__()
        allowed = dict.fromkeys(("num_layers", "dim", "num_heads", "cond_dim", "mlp_ratio"), "[1, 2^31)")
        allowed |= {"dropout": "[0, 1)", "lora_rank": f"[0, {self.dim}]", "lora_alpha": "[-1e6, 1e6]"}
        allowed |= {"dtype": DTYPES, "remat": REMAT, "parametrisation": PARAMETRISATIONS, "time_input": ("sigma", "t")}
        allowed |= {"num_classes": "[0, 2^31)", "gradient_dtype": DTYPES[: 1 + (self.dtype != "float32")]}
        allowed |= {"residual_dtype": DTYPES}
        check_fields("model", vars(self), **allowed)
        if self.causal and self.num_classes:
            raise InputError(f"model.num_classes={self.num_classes} must be 0 with objective='ar'")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            what = f"model.num_heads={self.num_heads} must divide model.dim={self.dim}"
            raise InputError(f"{what} into heads of an even width")

    @property
    def lora(self) -> tuple[int, float]:
        """(rank, scale) of the adapters."""
        return self.lora_rank, self.lora_alpha / max(self.lora_rank, 1)

    def setup(self):
        axes = ("embed", "vocab")
        dtypes = {"dtype": self.dtype, "out_dtype": "float32", "gradient_dtype": self.gradient_dtype}
        self.head = Linear((self.num_states,), axes, zero_init=True, **dtypes)

    def __call__(self, tokens: Tokens, sigma: PerSequence, train: bool = False) -> LogScore:
        return self.log_score(self.features(tokens, sigma, train), tokens, sigma)

    def features(
        self, tokens: Tokens, sigma: PerSequence, train: bool = False, numbers: Numbers = None, labels: Any = None
    ) -> Features:
        """Everything but the last matrix product. With `log_score`, for a loss that never holds [B, L, N]. labels: the
        class of each sequence, or of all; None, as num_classes, for none."""
        return self._features(tokens, sigma, train, None, None, numbers, labels)[0]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """The cache that `next_logits` starts from."""
        shape = (self.num_layers, batch, length, self.num_heads, self.dim // self.num_heads)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def next_logits(
        self, previous: Int[Array, " b"], position: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "b n"], Cache]:
        """The causal network's logits at `position`, and the cache with that position added. previous: the token
        before; ignored at position 0. cache: of all positions before."""
        features, cache = self._features(previous[:, None], None, False, cache, position, None, None)
        return self.head(features)[:, 0], cache

    @nn.compact
    def _features(
        self, tokens: Tokens, sigma: Any, train: bool, cache: Cache | None, position: Any, numbers: Any, labels: Any
    ) -> tuple[Features, Cache | None]:
        condition = None
        if self.time_conditioning and not self.causal:
            level = sigma if self.time_input == "sigma" else -jnp.expm1(-sigma)
            condition = Linear((self.cond_dim,), (None, "cond"), name="sigma_in")(sinusoidal(level))
            condition = Linear((self.cond_dim,), ("cond", None), name="sigma_out")(nn.silu(condition))
            condition = nn.silu(condition)
        if self.num_classes:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, "cond"))
            classes = self.param("classes", init, (self.num_classes + 1, self.cond_dim), jnp.float32)
            label = jnp.broadcast_to(self.num_classes if labels is None else labels, len(tokens))
            condition = (0 if condition is None else condition) + nn.silu(classes[label])

        # Torch's kaiming_uniform(a=sqrt 5) on [N, dim] has fan_in = dim.
        init = nn.with_logical_partitioning(bias_init(self.dim), (None, "embed"))
        embedding = self.param("embedding", init, (self.num_states, self.dim), jnp.float32)
        # Each device looks up its columns for all sequences of its fsdp group, which then exchange them: these rows are
        # fewer than the table's, and the table's gradient stays split as the table is.
        x = constrain(embedding[constrain(tokens, "replica", None)], "replica", None, "embed")
        x = constrain(x, "batch", None, None).astype(self.residual_dtype)
        if cache is not None:
            x = jnp.where(position == 0, 0, x)
        elif self.causal:
            x = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))

        options = self.num_heads, self.mlp_ratio, self.dropout, self.dtype, self.gradient_dtype, self.attention
        blocks = nn.scan(
            REMAT[self.remat](Block),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, nn.broadcast, nn.broadcast),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(*options, self.qkv_bias, self.lora, train, self.causal, name="blocks")
        x, cache = blocks(x, condition, cache, position, jnp.arange(len(x)) if numbers is None else numbers)

        linear = partial(Linear, dtype=self.dtype, gradient_dtype=self.gradient_dtype)
        norm = jax.checkpoint(ModulatedNorm(name="norm")(*modulation(linear, condition, 2, len(x), self.dim)))
        return norm(x).astype(self.dtype), cache

    def log_score(self, features: Features, tokens: Tokens, sigma: PerSequence) -> LogScore:
        """The log-score from `features`; needs no parameters but `head`."""
        log_score = self.head(features)
        if self.causal:
            return constrain(log_score, "batch", None, "vocab")
        if self.parametrisation != "score":
            log_score = self.to_score(log_score, tokens, sigma[:, None])
        elif self.scale_by_sigma:
            scale = sigma + jax.nn.log1mexp(sigma)  # log(e^sigma - 1), which does not overflow
            log_score = log_score - (scale + jnp.log(self.num_states - 1.0))[:, None, None]
        log_score = jnp.where(jnp.arange(self.num_states) == tokens[..., None], 0, log_score)
        return constrain(log_score, "batch", None, "vocab")
