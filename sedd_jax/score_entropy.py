"""The training loss: denoising score entropy integrated over the noise levels (DWDSE, equation 10).

`loss_and_grads` computes any `Objective` in chunks; score entropy is one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sedd_jax.network import for_chunks, pick, put
from sedd_jax.noise import Noise
from sedd_jax.rates import Graph, PerPosition, PerState, Sigma, X
from sedd_jax.typing import Features, Mask, PerSequence, PRNGKey, Scalar, ScoreFn, Tokens


class Noised(NamedTuple):
    """Sequences x at random noise levels sigma. weight: sigma'(t) / density of t. targets: where a loss is, or None."""

    x: Tokens
    sigma: PerSequence
    weight: PerSequence
    targets: Mask | None = None


def roles(tokens: Tokens, given: Mask | None, never: Mask | None) -> tuple[Mask, Mask]:
    """Which positions are asked for, and which are masked throughout. given, never: see `likelihood.bound`."""
    none = jnp.zeros_like(tokens, bool)
    given, never = (none if mask is None else jnp.asarray(mask) for mask in (given, never))
    return ~(given | never), never & ~given


@runtime_checkable
class Objective(Protocol):
    """What training minimises: the mean over sequences of weight * sum over positions of `loss`."""

    def noised(self, key: PRNGKey, tokens: Tokens, given: Mask | None = None, never: Mask | None = None) -> Noised:
        """Samples the network's inputs for a batch, and their weights. given, never: see `typing.Batch`."""

    def contributes(self, x: X) -> Bool[Array, "*shape"]:
        """Where the loss can differ from 0."""

    def loss(self, output: PerState, sigma: Sigma, x: X, x0: X) -> PerPosition:
        """The loss of each position. output: of the network's head there."""


@dataclass(frozen=True)
class ScoreEntropy:
    """Denoising score entropy as an `Objective`."""

    graph: Graph
    noise: Noise

    def noised(self, key: PRNGKey, tokens: Tokens, given: Mask | None = None, never: Mask | None = None) -> Noised:
        noised = diffuse(key, self.graph, self.noise, tokens)
        if given is None and never is None:
            return noised
        targets, hidden = roles(tokens, given, never)
        x = jnp.where(targets, noised.x, tokens)
        return noised._replace(x=jnp.where(hidden, self.graph.mask, x), targets=targets)

    def contributes(self, x):
        return self.graph.contributes(x)

    def loss(self, output, sigma, x, x0):
        return self.graph.score_entropy(output, sigma, x, x0)


def stratified_times(key: PRNGKey, num: int) -> Float[Array, " num"]:
    """Low-discrepancy times in (0, 1]: each is uniform, and every interval of length 1/num holds one, which removes
    most of the variance of the loss in t (Kingma et al. 2021, appendix I.1). They are ordered in strides of about the
    golden ratio, so that any contiguous part (the share of one device) is spread evenly too."""
    stride = next(s for s in range(round(0.618 * num), 2 * num + 2) if math.gcd(s, num) == 1)
    return 1 - (jax.random.uniform(key) + np.arange(num) * stride % num / num) % 1


def importance_times(key: PRNGKey, noise: Noise, num: int) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
    """Stratified times and their density q, half uniform in t, half uniform in the noised fraction 1 - e^-sigma.
    Dividing by q leaves every mean over t unchanged. With the log-linear schedule q = 1. With the geometric one, half
    of all uniform times have a loss near zero; q samples where the loss is, and the weight 1 / q is at most 2."""
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


def diffuse(key: PRNGKey, graph: Graph, noise: Noise, tokens: Tokens) -> Noised:
    """Samples a time for each sequence (`importance_times` over the batch) and the sequence at that time."""
    time_key, noise_key = jax.random.split(key)
    t, density = importance_times(time_key, noise, tokens.shape[0])
    sigma = noise.total(t)
    return Noised(graph.sample_transition(noise_key, tokens, sigma[:, None]), sigma, noise.rate(t) / density)


def denoising_loss(score_fn: ScoreFn, graph: Graph, noised: Noised, tokens: Tokens) -> PerSequence:
    """The weight times the sum over positions of the score entropy: an unbiased estimate of the diffusion part of the
    likelihood bound, in nats per sequence (summed over L)."""
    log_score = score_fn(noised.x, noised.sigma)
    return noised.weight * graph.score_entropy(log_score, noised.sigma[:, None], noised.x, tokens).sum(-1)


def loss_and_grads(
    head: Callable, objective: Objective, params: Any, features: Features, noised: Noised, tokens: Tokens, *, rows: int
) -> tuple[Scalar, tuple[Any, Features]]:
    """The sum over sequences of the weighted loss and its gradients by params and features, without [B, L, N]. For
    score entropy the loss is `denoising_loss`. It is a sum over positions with known weights, so each chunk's gradient
    is taken in the same pass: nothing is stored and nothing is computed twice.
    head: (params, features [R, 1, D], tokens [R, 1], sigma [R]) -> [R, 1, N], the last layer of the network.
    rows: positions per chunk, R. Only targets where `objective.contributes` are computed, however many they are."""

    def chunk_loss(params, features, x, x0, sigma, weight):
        loss = objective.loss(head(params, features, x, sigma), sigma[:, None], x, x0)
        return jnp.sum(weight * loss[:, 0])

    def add(index, carry):
        loss, d_params, d_features = carry
        sequence = index // features.shape[1]
        here = (pick(values, index)[:, None] for values in (features, noised.x, tokens))
        levels = noised.sigma.at[sequence].get(mode="clip"), noised.weight.at[sequence].get(mode="fill", fill_value=0)
        value, (d_chunk, d_rows) = jax.value_and_grad(chunk_loss, argnums=(0, 1))(params, *here, *levels)
        return loss + value, jax.tree.map(jnp.add, d_params, d_chunk), put(d_features, index, d_rows[:, 0])

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(features))
    active = objective.contributes(noised.x) & (True if noised.targets is None else noised.targets)
    loss, d_params, d_features = for_chunks(active, rows, add, zero)
    return loss, (d_params, d_features)
