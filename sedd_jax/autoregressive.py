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
from sedd_jax.sampling.truncation import Truncation
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


def generate(
    key: Key[Array, ""],
    step_fn: StepFn,
    cache: Any,
    clamp: tuple[Bool[Array, "b l"], Int[Array, "b l"]],
    *,
    truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
    first_index: Int[Array, ""] | int = 0,
) -> Int[Array, "b l"]:
    """Tokens from left to right, one network call per position.

    cache: what step_fn starts with. clamp: (mask of what is given, values); of given positions that are not a prefix,
        what comes before them does not know. truncation: of each distribution; without it the tokens are exact draws
        from the model.
    first_index: number of the first sequence; a sequence's draws depend on the key and its number alone.
    """
    given, values = clamp

    def step(carry, inputs):
        previous, cache = carry
        position, given, value = inputs
        logits, cache = step_fn(previous, position, cache)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        drawn = jax.vmap(categorical)(step_keys, jnp.exp(truncation.log_probs(logits)))
        token = jnp.where(given, value, drawn)
        return (token, cache), token

    batch, length = values.shape
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first_index + jnp.arange(batch))
    start = (jnp.zeros(batch, values.dtype), cache)
    _, tokens = jax.lax.scan(step, start, (jnp.arange(length), given.T, values.T))
    return tokens.T
