"""The training loss: denoising score entropy integrated over the noise levels (DWDSE, equation 10).

What is done in chunks here is done to any `Objective`, of which score entropy is one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.noise import Noise
from sedd_jax.rates import Graph

# (tokens [B, L], sigma [B]) -> log-score [B, L, N], float32, 0 at the current token.
ScoreFn = Callable[[Int[Array, "b l"], Float[Array, " b"]], Float[Array, "b l n"]]


class Noised(NamedTuple):
    """Sequences at random noise levels: what the loss is a function of, next to the clean sequences."""

    x: Int[Array, "b l"]
    sigma: Float[Array, " b"]
    weight: Float[Array, " b"]  # sigma'(t) / density of t


@runtime_checkable
class Objective(Protocol):
    """What training minimises: the mean over sequences of weight * sum over positions of `loss`."""

    def noised(self, key: Key[Array, ""], tokens: Int[Array, "b l"]) -> Noised:
        """What the network is given of the sequences, and their weights: a draw."""
        ...

    def contributes(self, x: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Where the loss is not 0 whatever the network says."""
        ...

    def loss(
        self,
        output: Float[Array, "*shape n"],
        sigma: Float[Array, "..."],
        x: Int[Array, "*shape"],
        x0: Int[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        """Of each position, from what the network's head says there."""
        ...


@dataclass(frozen=True)
class ScoreEntropy:
    """The objective of this file."""

    graph: Graph
    noise: Noise

    def noised(self, key: Key[Array, ""], tokens: Int[Array, "b l"]) -> Noised:
        return diffuse(key, self.graph, self.noise, tokens)

    def contributes(self, x: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        return self.graph.contributes(x)

    def loss(
        self,
        output: Float[Array, "*shape n"],
        sigma: Float[Array, "..."],
        x: Int[Array, "*shape"],
        x0: Int[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        return self.graph.score_entropy(output, sigma, x, x0)


def stratified_times(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Low-discrepancy times in (0, 1]: one uniform offset, then every multiple of 1/num.

    Each time is uniform by itself and every interval of length 1/num holds one of them, which removes most of the
    variance that the loss has in t (Kingma et al. 2021, appendix I.1). They come in strides of about the golden ratio,
    so that any run of them (the share of one device) is spread evenly too.
    """
    stride = next(s for s in range(round(0.618 * num), 2 * num + 2) if math.gcd(s, num) == 1)
    return 1 - (jax.random.uniform(key) + np.arange(num) * stride % num / num) % 1


def importance_times(key: Key[Array, ""], noise: Noise, num: int) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
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
    """The weight times the sum over positions of the score entropy: an unbiased draw of the diffusion part of the
    likelihood bound, in nats per sequence (summed over L)."""
    log_score = score_fn(noised.x, noised.sigma)
    return noised.weight * graph.score_entropy(log_score, noised.sigma[:, None], noised.x, tokens).sum(-1)


def loss_and_grads(
    head: Callable[..., Float[Array, "r 1 n"]],
    objective: Objective,
    params: Any,
    features: Float[Array, "b l d"],
    noised: Noised,
    tokens: Int[Array, "b l"],
    *,
    rows: int,
) -> tuple[Float[Array, ""], tuple[Any, Float[Array, "b l d"]]]:
    """The sum over sequences of the weighted loss (for score entropy `denoising_loss`) and its gradient by params and
    features, without [B, L, N].

    head: (params, features [R, 1, D], tokens [R, 1], sigma [R]) -> [R, 1, N], the last part of the network.
    rows: positions at a time, R. Only positions that `objective.contributes` are looked at, however many they are.

    The loss is a sum over positions with weights that are known beforehand, so each chunk's gradient is taken at once,
    in the same pass: nothing is stored and nothing is computed twice.
    """
    batch, length, dim = features.shape
    flat = features.reshape(-1, dim)
    active = objective.contributes(noised.x).ravel()
    # The numbers of the active positions, then a number that is out of range.
    order = jnp.nonzero(active, size=-(-active.size // rows) * rows, fill_value=active.size)[0]

    def chunk_loss(params, rows_features, x, x0, sigma, weight):
        loss = objective.loss(head(params, rows_features[:, None], x, sigma), sigma[:, None], x, x0)
        return jnp.sum(weight * loss[:, 0])

    def add_chunk(i, carry):
        loss, d_params, d_features = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * rows, rows)
        sequence = at // length
        value, (d_chunk, d_rows) = jax.value_and_grad(chunk_loss, argnums=(0, 1))(
            params,
            flat.at[at].get(mode="clip"),
            noised.x.ravel().at[at].get(mode="clip")[:, None],
            tokens.ravel().at[at].get(mode="clip")[:, None],
            noised.sigma.at[sequence].get(mode="clip"),
            noised.weight.at[sequence].get(mode="fill", fill_value=0),
        )
        return loss + value, jax.tree.map(jnp.add, d_params, d_chunk), d_features.at[at].set(d_rows, mode="drop")

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(flat))
    loss, d_params, d_features = jax.lax.fori_loop(0, -(-active.sum() // rows), add_chunk, zero)
    return loss, (d_params, d_features.reshape(features.shape))


def dwdse(
    key: Key[Array, ""], score_fn: ScoreFn, graph: Graph, noise: Noise, tokens: Int[Array, "b l"]
) -> Float[Array, " b"]:
    """Diffusion-weighted denoising score entropy, one draw of time and noise per sequence: nats per sequence."""
    return denoising_loss(score_fn, graph, diffuse(key, graph, noise, tokens), tokens)
