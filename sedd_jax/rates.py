"""Transition rate matrices Q of the forward process, and everything that follows from Q in closed form.

Convention: dp/dt = sigma'(t) Q p with columns of Q that sum to zero; Q[y, x] is the rate from x to y. p_{t|0}(.|x0) is
column x0 of exp(sigma(t) Q). Q is never materialised. Graphs are frozen dataclasses, static under `jax.jit`.

Shapes: tokens x are [*shape], typically [B, L]; log-scores are [*shape, N] with N = num_states, in natural log, and 0
at the current token; a noise level broadcasts against the tokens, so it is a scalar or [B, 1]. Results are float32.
Equations: Lou, Meng, Ermon, arXiv 2310.16834; derivations in docs/mathematics.md.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.categorical import fine_uniform
from sedd_jax.errors import InputError

Sigma = Float[Array, "..."] | float


def bregman(log_score: Float[Array, "..."], log_ratio: Sigma) -> Float[Array, "..."]:
    """s - r log s + K(r) with K(r) = r (log r - 1), one term of the score entropy, from log s and log r.

    Written as r (e^u - 1 - u), u = log s - log r: never negative, zero exactly at s = r, and nothing large cancels.
    """
    u = log_score - log_ratio
    return jnp.exp(log_ratio) * (jnp.expm1(u) - u)


def _one_hot(x: Int[Array, "*shape"], num_classes: int) -> Float[Array, "*shape n"]:
    return jax.nn.one_hot(x, num_classes, dtype=jnp.float32)


@runtime_checkable
class Graph(Protocol):
    """What the loss, the likelihood and the samplers need of a transition rate matrix."""

    vocab_size: int

    @property
    def num_states(self) -> int:
        """N: the vocabulary, and MASK where there is one."""

    def rate(self, x: Int[Array, "*shape"]) -> Float[Array, "*shape n"]:
        """Column Q[:, x]."""

    def reverse_rate(self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
        """Column x of the reverse rate: s_y Q[x, y] at y != x, minus their sum at x (equation 3; unit: per sigma)."""

    def sample_transition(self, key: Key[Array, ""], x0: Int[Array, "*shape"], sigma: Sigma) -> Int[Array, "*shape"]:
        """A draw of x_t from p_{t|0}(.|x0), each position by itself."""

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "*shape"]:
        """A draw from the distribution at sigma = infinity."""

    def prior_kl(self, sigma: Sigma) -> Float[Array, "..."]:
        """KL( p_{1|0}(.|x0) || p_base ) in nats per token, where sigma = sigma(1); the same for every x0."""

    def contributes(self, x: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Where the reverse process can leave x_t = x; elsewhere the score entropy is 0 whatever the score."""

    def clock(self, sigma: Sigma) -> Float[Array, "..."]:
        """A reparametrisation of sigma in which the reverse process runs at an even pace: see `hazard`."""

    def from_clock(self, clock: Float[Array, "..."]) -> Float[Array, "..."]:
        """sigma, the inverse of `clock`."""

    def hazard(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], sigma: Sigma
    ) -> Float[Array, "*shape n"]:
        """Reverse rates from x to every y != x per unit of `clock`, and 0 at x."""

    def score_entropy(
        self,
        log_score: Float[Array, "*shape n"],
        sigma: Sigma,
        x: Int[Array, "*shape"],
        x0: Int[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        """Denoising score entropy of each position, in nats per unit of sigma (definition 3.1 with the ratio of
        theorem 3.4): sum over y != x of Q[x, y] (s_y - r_y log s_y + K(r_y)), r_y = p(y|x0) / p(x|x0)."""

    def euler_probs(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], weight: Sigma
    ) -> Float[Array, "*shape n"]:
        """one_hot(x) + weight * reverse_rate(x), weight = dt sigma'(t). May be negative at x: see sampling."""
        return _one_hot(x, self.num_states) + _column(weight) * self.reverse_rate(x, log_score)

    def analytic_probs(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], dsigma: Sigma
    ) -> Float[Array, "*shape n"]:
        """[exp(-dsigma Q) s]_y exp(dsigma Q)[x, y], the Tweedie tau-leap back by dsigma (theorem 4.2).

        Rows sum to 1, but entries can be negative when s is not a true score: see sampling.
        """

    def denoise_probs(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], sigma: Sigma
    ) -> Float[Array, "*shape v"]:
        """The analytic step from sigma all the way to 0, over the vocabulary. Without MASK, rows need not sum to 1."""
        return self.analytic_probs(x, log_score, sigma)[..., : self.vocab_size]


@dataclass(frozen=True)
class Absorbing(Graph):
    """Every token moves to MASK = vocab_size at rate 1 and stays there. N = V + 1."""

    vocab_size: int

    @property
    def num_states(self) -> int:
        return self.vocab_size + 1

    @property
    def mask(self) -> int:
        return self.vocab_size

    def rate(self, x: Int[Array, "*shape"]) -> Float[Array, "*shape n"]:
        return _one_hot(jnp.full_like(x, self.mask), self.num_states) - _one_hot(x, self.num_states)

    def reverse_rate(self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
        masked = (x == self.mask)[..., None]
        is_token = jnp.arange(self.num_states) != self.mask
        leaving = jnp.where(masked & is_token, jnp.exp(log_score), 0)
        return leaving - jnp.where(masked & ~is_token, leaving.sum(-1, keepdims=True), 0)

    def sample_transition(self, key: Key[Array, ""], x0: Int[Array, "*shape"], sigma: Sigma) -> Int[Array, "*shape"]:
        move = fine_uniform(key, x0.shape) < -jnp.expm1(-sigma)
        return jnp.where(move, self.mask, x0)

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "*shape"]:
        return jnp.full(shape, self.mask, jnp.int32)

    def prior_kl(self, sigma: Sigma) -> Float[Array, "..."]:
        # The limit has no mass on tokens, so the base distribution keeps e = e^-sigma for them, spread evenly.
        return jnp.exp(-sigma) * jnp.log(float(self.vocab_size))

    def contributes(self, x: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        return x == self.mask

    def clock(self, sigma: Sigma) -> Float[Array, "..."]:
        # The logarithm of the masked fraction: with s = p(x0 = y) / (e^sigma - 1) the hazard is p(x0 = y).
        return jax.nn.log1mexp(jnp.asarray(sigma, jnp.float32))

    def from_clock(self, clock: Float[Array, "..."]) -> Float[Array, "..."]:
        return -jax.nn.log1mexp(-clock)

    def hazard(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], sigma: Sigma
    ) -> Float[Array, "*shape n"]:
        return jnp.maximum(self.reverse_rate(x, log_score), 0) * jnp.expm1(_column(sigma))

    def score_entropy(
        self,
        log_score: Float[Array, "*shape n"],
        sigma: Sigma,
        x: Int[Array, "*shape"],
        x0: Int[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        # Only r at y = x0 is not zero: p(x0|x0) / p(MASK|x0) = e^-sigma / (1 - e^-sigma).
        log_ratio = -jnp.log(jnp.expm1(sigma))
        at_x0 = jnp.arange(self.num_states) == x0[..., None]
        other = ~at_x0 & (jnp.arange(self.num_states) != self.mask)
        others = jnp.sum(jnp.exp(log_score), axis=-1, where=other)
        # A masked sum is fused with the other one; the gradient of a look-up would be one more [..., N] to write.
        log_score_at_x0 = jnp.sum(log_score, axis=-1, where=at_x0)
        return jnp.where(self.contributes(x), others + bregman(log_score_at_x0, log_ratio), 0)

    def analytic_probs(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], dsigma: Sigma
    ) -> Float[Array, "*shape n"]:
        # At MASK: s_y (e^dsigma - 1) for tokens, the rest stays; a token stays for ever. That is the Euler step with
        # e^dsigma - 1 in the place of dsigma.
        return self.euler_probs(x, log_score, jnp.expm1(dsigma))


@dataclass(frozen=True)
class Uniform(Graph):
    """Every token is replaced at rate 1 by a uniform draw over the vocabulary (itself included). N = V."""

    vocab_size: int

    @property
    def num_states(self) -> int:
        return self.vocab_size

    def rate(self, x: Int[Array, "*shape"]) -> Float[Array, "*shape n"]:
        return 1 / self.vocab_size - _one_hot(x, self.num_states)

    def reverse_rate(self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
        current = jnp.arange(self.num_states) == x[..., None]
        leaving = jnp.where(current, 0, jnp.exp(log_score) / self.vocab_size)
        return jnp.where(current, -leaving.sum(-1, keepdims=True), leaving)

    def sample_transition(self, key: Key[Array, ""], x0: Int[Array, "*shape"], sigma: Sigma) -> Int[Array, "*shape"]:
        move_key, token_key = jax.random.split(key)
        move = fine_uniform(move_key, x0.shape) < -jnp.expm1(-sigma)
        return jnp.where(move, jax.random.randint(token_key, x0.shape, 0, self.vocab_size, x0.dtype), x0)

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "*shape"]:
        return jax.random.randint(key, shape, 0, self.vocab_size, jnp.int32)

    def prior_kl(self, sigma: Sigma) -> Float[Array, "..."]:
        # With e = e^-sigma the stay and move probabilities are (1 + (V-1) e) / V and (1 - e) / V.
        others = self.vocab_size - 1
        e = jnp.exp(-sigma)
        return ((1 + others * e) * jnp.log1p(others * e) + others * (1 - e) * jnp.log1p(-e)) / self.vocab_size

    def contributes(self, x: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        return jnp.ones_like(x, bool)

    def clock(self, sigma: Sigma) -> Float[Array, "..."]:
        return jnp.asarray(sigma, jnp.float32)

    def from_clock(self, clock: Float[Array, "..."]) -> Float[Array, "..."]:
        return clock

    def hazard(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], sigma: Sigma
    ) -> Float[Array, "*shape n"]:
        return jnp.maximum(self.reverse_rate(x, log_score), 0)

    def score_entropy(
        self,
        log_score: Float[Array, "*shape n"],
        sigma: Sigma,
        x: Int[Array, "*shape"],
        x0: Int[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        # With a and b the move and stay probabilities, log b/a = log(1 + V / (e^sigma - 1)). Where x = x0, r = a/b at
        # every y; elsewhere r = b/a at y = x0 and 1 at the others. The term at y = x is left out.
        log_stay = jnp.log1p(self.vocab_size / jnp.expm1(sigma))[..., None]
        at_x0 = jnp.arange(self.num_states) == x0[..., None]
        log_ratio = jnp.where((x == x0)[..., None], -log_stay, jnp.where(at_x0, log_stay, 0))
        other = jnp.arange(self.num_states) != x[..., None]
        return jnp.sum(bregman(log_score, log_ratio), axis=-1, where=other) / self.vocab_size

    def analytic_probs(
        self, x: Int[Array, "*shape"], log_score: Float[Array, "*shape n"], dsigma: Sigma
    ) -> Float[Array, "*shape n"]:
        # exp(-dsigma Q) s = e^dsigma s + (1 - e^dsigma) mean(s), as s plus a correction that is small with dsigma.
        score = jnp.exp(log_score)
        dsigma = _column(dsigma)
        staggered = score + jnp.expm1(dsigma) * (score - score.mean(-1, keepdims=True))
        return staggered * (jnp.exp(-dsigma) * _one_hot(x, self.num_states) - jnp.expm1(-dsigma) / self.vocab_size)


def _column(sigma: Sigma) -> Float[Array, "... 1"]:
    return jnp.asarray(sigma, jnp.float32)[..., None]


def make(kind: str, vocab_size: int) -> Graph:
    """The graph that a config names. vocab_size: tokens of the tokenizer, without MASK."""
    if vocab_size < 2:
        raise InputError(f"a vocabulary of {vocab_size} tokens is too small; a graph needs at least 2")
    if kind == "absorbing":
        return Absorbing(vocab_size)
    if kind == "uniform":
        return Uniform(vocab_size)
    raise InputError(f"graph.kind={kind!r} is unknown; choose 'absorbing' or 'uniform'")
