"""The autoregressive (AR) baseline: cross-entropy, exact likelihood, and text from left to right.

p(x) = p(x_1) p(x_2 | x_1) ... p(x_L | x_1 .. x_L-1), with which the paper compares score entropy models (section 5.3).
Takes logits as arrays or functions; does not know the network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.categorical import categorical, usable
from sedd_jax.network import Network, sum_over_positions
from sedd_jax.sampling import Count, Sample
from sedd_jax.sampling.sampler import Truncation
from sedd_jax.score_entropy import Noised, roles
from sedd_jax.typing import Clamp, Mask, PerSequence, PRNGKey, Tokens


def cross_entropy(logits: Float[Array, "*shape v"], x0: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """-log p(x0) of each position, in nats."""
    at_x0 = jnp.arange(logits.shape[-1]) == x0[..., None]  # a masked sum, as in `rates.Absorbing.score_entropy`
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits, axis=-1, where=at_x0)


def nats(network: Network, tokens: Tokens, active: Mask, *, shift: int = 0) -> PerSequence:
    """-log p of the active tokens, summed over each sequence. shift: logits at a position are of the token that many
    positions later; the first ones are then not active."""
    x0, active = (jnp.roll(values, -shift, axis=1) for values in (tokens, active))
    term = lambda logits, sigma, x, x0: cross_entropy(logits, x0)  # noqa: E731
    return sum_over_positions(network, tokens, jnp.zeros(len(tokens)), active, term, x0)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy as a `score_entropy.Objective`: without noise, and with equal weights of all positions."""

    def noised(self, key: PRNGKey, tokens: Tokens, given: Mask | None = None, never: Mask | None = None) -> Noised:
        targets = None if given is None and never is None else roles(tokens, given, never)[0]
        return Noised(tokens, jnp.zeros(len(tokens)), jnp.ones(len(tokens)), targets)

    def contributes(self, x):
        return jnp.ones_like(x, bool)

    def loss(self, output, sigma, x, x0):
        return cross_entropy(output, x0)


def simulate(
    key: PRNGKey, step_fn: Callable, cache: Any, clamp: Clamp, *, truncation: Truncation, first_index: Count = 0
) -> Sample:
    """Text from left to right, one network call per position, which is a step. step_fn: (token before [B], position,
    cache) -> logits [B, V] at position, and the cache with that position added; `cache` is the initial one.
    clamp: given positions; those that are not a prefix do not influence the tokens before them.
    truncation: of each distribution; without it the tokens are exact samples of the model.
    first_index: index of the first sequence; a sequence's draws depend only on the key and its index."""
    given, values = clamp

    def step(carry, inputs):
        previous, cache = carry
        position, given, value = inputs
        logits, cache = step_fn(previous, position, cache)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        probs = jnp.exp(truncation.log_probs(logits))
        token = jnp.where(given, value, jax.vmap(categorical)(step_keys, probs))
        return (token, cache), (token, jnp.any(~given & ~usable(probs)))

    batch, length = values.shape
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first_index + jnp.arange(batch))
    start = (jnp.zeros(batch, values.dtype), cache)
    _, (tokens, failed) = jax.lax.scan(step, start, (jnp.arange(length), given.T, values.T))
    changed, first = jnp.where(given, 0, 1 + jnp.arange(length)), jnp.where(failed.any(), 1 + failed.argmax(), 0)
    return Sample(tokens.T, changed, calls=jnp.array(length), clipped=jnp.zeros(()), failed=first)
