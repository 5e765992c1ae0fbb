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
    rate: Float[Array, " b"]


def stratified_times(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Low-discrepancy times in (0, 1]: one uniform offset, then steps of 1/num, descending up to a rotation.

    Each time is uniform by itself and every interval of length 1/num holds one of them, which removes most of the
    variance that the loss has in t (Kingma et al. 2021, appendix I.1).
    """
    return 1 - (jax.random.uniform(key) + jnp.arange(num) / num) % 1


def diffuse(key: Key[Array, ""], graph: Graph, noise: Noise, tokens: Int[Array, "b l"]) -> Noised:
    """Draws a time for each sequence (stratified over the batch) and the sequence at that time."""
    time_key, noise_key = jax.random.split(key)
    t = stratified_times(time_key, tokens.shape[0])
    sigma = noise.total(t)
    return Noised(graph.sample_transition(noise_key, tokens, sigma[:, None]), sigma, noise.rate(t))


def denoising_loss(score_fn: ScoreFn, graph: Graph, noised: Noised, tokens: Int[Array, "b l"]) -> Float[Array, " b"]:
    """sigma'(t) sum over positions of the score entropy: an unbiased draw of the diffusion part of the likelihood
    bound, in nats per sequence (summed over L)."""
    log_score = score_fn(noised.x, noised.sigma)
    return noised.rate * graph.score_entropy(log_score, noised.sigma[:, None], noised.x, tokens).sum(-1)


def dwdse(
    key: Key[Array, ""], score_fn: ScoreFn, graph: Graph, noise: Noise, tokens: Int[Array, "b l"]
) -> Float[Array, " b"]:
    """Diffusion-weighted denoising score entropy, one draw of time and noise per sequence: nats per sequence."""
    return denoising_loss(score_fn, graph, diffuse(key, graph, noise, tokens), tokens)
