"""The training loss: denoising score entropy integrated over the noise levels (DWDSE, equation 10)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sedd_jax.noise import Noise
from sedd_jax.rates import Graph

# (tokens [B, L], sigma [B]) -> log-score [B, L, N], float32, 0 at the current token.
ScoreFn = Callable[[Int[Array, "b l"], Float[Array, " b"]], Float[Array, "b l n"]]


class Noised(NamedTuple):
    """Sequences at random noise levels: what the loss is a function of, next to the clean sequences."""

    x: Int[Array, "b l"]
    sigma: Float[Array, " b"]
    weight: Float[Array, " b"]  # sigma'(t) / density of t


def stratified_times(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Low-discrepancy times in (0, 1]: one uniform offset, then steps of 1/num, descending up to a rotation.

    Each time is uniform by itself and every interval of length 1/num holds one of them, which removes most of the
    variance that the loss has in t (Kingma et al. 2021, appendix I.1).
    """
    return 1 - (jax.random.uniform(key) + jnp.arange(num) / num) % 1


def importance_times(
    key: Key[Array, ""], noise: Noise, num: int
) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
    """Stratified times whose density is half uniform in t, half uniform in the noised part 1 - e^-sigma of the tokens.

    Returns the times and their density q; dividing by q keeps every mean over t as it is. With the log-linear schedule
    q is 1 everywhere. With the geometric one, half of all uniform times have less than 5 % of their tokens noised and
    a loss near zero; this density spends them where the loss is, and never exceeds a weight 1 / q of 2.
    """
    noised = lambda t: -jnp.expm1(-noise.total(t))  # noqa: E731
    start, stop = noised(jnp.zeros(())), noised(jnp.ones(()))
    u = stratified_times(key, num)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        below = (middle + (noised(middle) - start) / (stop - start)) / 2 < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    _, t = jax.lax.fori_loop(0, 24, halve, (jnp.zeros(num), jnp.ones(num)))
    return t, (1 + jnp.exp(-noise.total(t)) * noise.rate(t) / (stop - start)) / 2


def diffuse(key: Key[Array, ""], graph: Graph, noise: Noise, tokens: Int[Array, "b l"]) -> Noised:
    """Draws a time for each sequence (`importance_times` over the batch) and the sequence at that time."""
    time_key, noise_key = jax.random.split(key)
    t, density = importance_times(time_key, noise, tokens.shape[0])
    sigma = noise.total(t)
    x = graph.sample_transition(noise_key, tokens, sigma[:, None])
    return Noised(x, sigma, noise.rate(t) / density)


def denoising_loss(score_fn: ScoreFn, graph: Graph, noised: Noised, tokens: Int[Array, "b l"]) -> Float[Array, " b"]:
    """The weight times the sum over positions of the score entropy: an unbiased draw of the diffusion part of the likelihood
    bound, in nats per sequence (summed over L)."""
    log_score = score_fn(noised.x, noised.sigma)
    return noised.weight * graph.score_entropy(log_score, noised.sigma[:, None], noised.x, tokens).sum(-1)


def dwdse(
    key: Key[Array, ""], score_fn: ScoreFn, graph: Graph, noise: Noise, tokens: Int[Array, "b l"]
) -> Float[Array, " b"]:
    """Diffusion-weighted denoising score entropy, one draw of time and noise per sequence: nats per sequence."""
    return denoising_loss(score_fn, graph, diffuse(key, graph, noise, tokens), tokens)
