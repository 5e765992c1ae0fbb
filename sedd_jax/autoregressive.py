"""The autoregressive twin: cross-entropy, exact likelihood, and text one token after another.

p(x) = p(x_1) p(x_2 | x_1) ... p(x_L | x_1 .. x_L-1): what score entropy models are compared with (section 5.3 of the
paper). Takes logits as arrays or functions; does not know the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.categorical import categorical
from sedd_jax.errors import InputError
from sedd_jax.score_entropy import Noised

# (token before [B], position, cache) -> logits [B, V] at position, and the cache with that position known.
StepFn = Callable[[Int[Array, " b"], Int[Array, ""], Any], tuple[Float[Array, "b v"], Any]]


def cross_entropy(logits: Float[Array, "*shape v"], x0: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """-log p(x0) of each position, in nats."""
    # A masked sum, as in `rates.Absorbing.score_entropy`.
    at_x0 = jnp.arange(logits.shape[-1]) == x0[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits, axis=-1, where=at_x0)


@dataclass(frozen=True)
class CrossEntropy:
    """The `score_entropy.Objective` of the twin: there is no noise, and every position counts alike."""

    def noised(self, key: Key[Array, ""], tokens: Int[Array, "b l"]) -> Noised:
        return Noised(tokens, jnp.zeros(len(tokens)), jnp.ones(len(tokens)))

    def contributes(self, x: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        return jnp.ones_like(x, bool)

    def loss(
        self,
        output: Float[Array, "*shape v"],
        sigma: Float[Array, "..."],
        x: Int[Array, "*shape"],
        x0: Int[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        return cross_entropy(output, x0)


def check_options(temperature: float, top_p: float) -> None:
    """Raises InputError unless temperature > 0 and 0 < top_p <= 1."""
    if not 0 < temperature < float("inf"):
        raise InputError(f"sampling temperature={temperature} must be positive; 1 is the model's own distribution")
    if not 0 < top_p <= 1:
        raise InputError(f"sampling top_p={top_p} must lie in (0, 1]; 1 is the model's own distribution")


def nucleus(probs: Float[Array, "*batch v"], top_p: float) -> Float[Array, "*batch v"]:
    """Probabilities with all but the most likely outcomes set to 0: as few as together have top_p or more, and those
    that are as likely as the last of them (Holtzman et al. 2019). Not normalised again."""
    falling = -jnp.sort(-probs, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(falling, axis=-1, where=before < top_p, initial=jnp.inf, keepdims=True)
    return jnp.where(probs >= least, probs, 0)


def generate(
    key: Key[Array, ""],
    step_fn: StepFn,
    cache: Any,
    clamp: tuple[Bool[Array, "b l"], Int[Array, "b l"]],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Int[Array, "b l"]:
    """Tokens from left to right, one network call per position.

    cache: what step_fn starts with. clamp: (mask of what is given, values); of given positions that are not a prefix,
        what comes before them does not know. temperature: logits are divided by it; top_p: see `nucleus`, applied after
        the temperature. At 1 and 1 the tokens are exact draws from the model.
    Raises InputError for options out of range.
    """
    check_options(temperature, top_p)
    given, values = clamp

    def step(carry, inputs):
        previous, cache = carry
        position, given, value = inputs
        logits, cache = step_fn(previous, position, cache)
        probs = jax.nn.softmax(logits / temperature)
        drawn = categorical(jax.random.fold_in(key, position), nucleus(probs, top_p) if top_p < 1 else probs)
        token = jnp.where(given, value, drawn)
        return (token, cache), token

    batch, length = values.shape
    start = (jnp.zeros(batch, values.dtype), cache)
    _, tokens = jax.lax.scan(step, start, (jnp.arange(length), given.T, values.T))
    return tokens.T
