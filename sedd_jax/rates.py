"""Transition rate matrices Q of the forward process, and everything that follows from Q in closed form.

Convention: dp/dt = sigma'(t) Q p with columns of Q that sum to zero; Q[y, x] is the rate from x to y. p_{t|0}(.|x0) is
column x0 of exp(sigma(t) Q). Both graphs are Q = b 1^T - I: at rate 1 a token is replaced by a draw from the base
distribution b. Hence exp(sigma Q) = e^-sigma I + (1 - e^-sigma) b 1^T, and Q is never materialised.

Shapes: tokens x are [*shape], typically [B, L]; log-scores are [*shape, N] with N = num_states, in natural log, and 0
at the current token; a noise level broadcasts against the tokens, so it is a scalar or [B, 1]. Results are float32.
Equations: Lou, Meng, Ermon, arXiv 2310.16834; derivations in docs/mathematics.md."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sedd_jax.categorical import fine_uniform
from sedd_jax.errors import InputError, check_fields
from sedd_jax.typing import PRNGKey

Sigma = Float[Array, "..."] | float
X = Int[Array, "*shape"]
PerPosition = Float[Array, "*shape"]  # one number per position
PerState = Float[Array, "*shape n"]  # one per position and state
Narrowed = tuple[PerState, Bool[Array, "*shape"]]


def bregman(log_score: Float[Array, "..."], log_ratio: Sigma) -> Float[Array, "..."]:
    """s - r log s + K(r) with K(r) = r (log r - 1), one term of the score entropy, from log s and log r. Written as r
    (e^u - 1 - u), u = log s - log r: never negative, zero exactly at s = r, and nothing large cancels."""
    u = log_score - log_ratio
    small = jnp.minimum(u, 40.0)  # where u is large this is s, however small r: e^u by itself would overflow
    return jnp.exp(log_ratio + jnp.maximum(u - 40.0, 0)) * (jnp.expm1(small) - small)


def log_expm1(sigma: Sigma) -> Float[Array, "..."]:
    """log(e^sigma - 1) without overflow; e^sigma is infinite in float32 from sigma = 88.8 on."""
    return jnp.asarray(sigma, jnp.float32) + jax.nn.log1mexp(jnp.asarray(sigma, jnp.float32))


@dataclass(frozen=True)
class Graph(abc.ABC):
    """What the loss, the likelihood and the samplers need of Q. Frozen, so static under `jax.jit`. vocab_size: V, the
    tokens of the tokenizer, without MASK, and rows of padding that a model's tables may have."""

    vocab_size: int
    has_mask: ClassVar[bool]

    @property
    def num_states(self) -> int:
        """N: the vocabulary, and MASK if there is one."""
        return self.vocab_size + self.has_mask

    @abc.abstractmethod
    def base(self, x: X) -> PerPosition:
        """b[x], the probability of x in the limit sigma = infinity."""

    @abc.abstractmethod
    def sample_limit(self, key: PRNGKey, shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Samples [*shape] from b."""

    @abc.abstractmethod
    def prior_kl(self, sigma: Sigma) -> Float[Array, "..."]:
        """KL( p_{1|0}(.|x0) || p_base ) in nats per token, where sigma = sigma(1); the same for every x0."""

    @abc.abstractmethod
    def score_of_mean(self, logits: PerState, x: X, sigma: Sigma) -> PerState:
        """Log-scores from softmax(logits), the distribution of the clean token; the logit of MASK is ignored. Exact:
        s_y is the mean of p(y|x0) / p(x|x0) over p(x0 | x_t). Valid only where the graph `contributes`."""

    def score_of_plugin(self, logits: PerState, x: X, sigma: Sigma) -> PerState:
        """Log-scores from softmax(logits), put in the place of the clean token in p(y|x0) / p(x|x0) (UDLM, Duo). Exact
        if softmax(logits) is p(x0 | the other positions of x_t): s_y is the ratio of the means of p(y|x0) and p(x|x0)
        over it. At MASK x_t itself tells nothing, so that this is `score_of_mean`."""
        return self.score_of_mean(logits, x, sigma)

    @abc.abstractmethod
    def narrow(self, log_probs: Callable[[PerState], PerState], x: X, log_score: PerState, sigma: Sigma) -> Narrowed:
        """Log-scores after narrowing p(x0 | the other positions of x_t), by log_probs: logits -> log-probabilities. And
        whether more than 1 % of it was negative, which only an inexact score's is."""

    @abc.abstractmethod
    def score_entropy(self, log_score: PerState, sigma: Sigma, x: X, x0: X) -> PerPosition:
        """Denoising score entropy of each position, in nats per unit of sigma (definition 3.1 with the ratio of
        theorem 3.4): sum over y != x of Q[x, y] (s_y - r_y log s_y + K(r_y)), r_y = p(y|x0) / p(x|x0)."""

    def contributes(self, x: X) -> Bool[Array, "*shape"]:
        """Where the reverse process can leave x_t = x; elsewhere the score entropy is 0 whatever the score."""
        return self.base(x) > 0

    def rate(self, x: X) -> PerState:
        """Column Q[:, x]."""
        return self.base(jnp.arange(self.num_states)) - self._is(x)

    def reverse_rate(self, x: X, log_score: PerState) -> PerState:
        """Column x of the reverse rate: s_y Q[x, y] at y != x, minus their sum at x (equation 3; unit: per sigma)."""
        current = self._is(x)
        moves = self.contributes(x)[..., None] & ~current
        leaving = jnp.where(moves, self.base(x)[..., None] * jnp.exp(log_score), 0)
        return jnp.where(current, -leaving.sum(-1, keepdims=True), leaving)

    def sample_transition(self, key: PRNGKey, x0: X, sigma: Sigma) -> X:
        """A sample of x_t from p_{t|0}(.|x0), each position independently."""
        move_key, token_key = jax.random.split(key)
        move = fine_uniform(move_key, x0.shape) < -jnp.expm1(-sigma)
        return jnp.where(move, self.sample_limit(token_key, x0.shape), x0)

    def clock(self, sigma: Sigma) -> Float[Array, "..."]:
        """A reparametrisation of sigma in which the reverse process runs at an even pace: see `hazard`."""
        return jnp.asarray(sigma, jnp.float32)

    def from_clock(self, clock: Float[Array, "..."]) -> Float[Array, "..."]:
        """sigma, the inverse of `clock`."""
        return clock

    def hazard(self, x: X, log_score: PerState, sigma: Sigma) -> PerState:
        """Reverse rates from x to every y != x per unit of `clock`, and 0 at x."""
        return jnp.maximum(self.reverse_rate(x, log_score), 0)

    def euler_probs(self, x: X, log_score: PerState, weight: Sigma) -> PerState:
        """one_hot(x) + weight * reverse_rate(x), weight = dt sigma'(t). May be negative at x: see sampling."""
        return self._is(x) + _column(weight) * self.reverse_rate(x, log_score)

    def analytic_probs(self, x: X, log_score: PerState, dsigma: Sigma) -> PerState:
        """[exp(-dsigma Q) s]_y exp(dsigma Q)[x, y], the Tweedie tau-leap back by dsigma (theorem 4.2). Rows sum to 1,
        but entries can be negative when s is not a true score: see sampling."""
        # Far above 16, e^dsigma only scales the row in float32. At 64 it does not overflow yet.
        dsigma, here = jnp.minimum(_column(dsigma), 64.0), self._is(x)
        score = jnp.where(here, 1, jnp.exp(log_score))
        # exp(-dsigma Q) s = e^dsigma s + (1 - e^dsigma) b sum(s), as s plus a correction that is small with dsigma.
        mean = self.base(jnp.arange(self.num_states)) * score.sum(-1, keepdims=True)
        staggered = score + jnp.expm1(dsigma) * (score - mean)
        return staggered * (jnp.exp(-dsigma) * here - jnp.expm1(-dsigma) * self.base(x)[..., None])

    def denoise_probs(self, x: X, log_score: PerState, sigma: Sigma) -> Float[Array, "*shape v"]:
        """The analytic step from sigma all the way to 0, over the vocabulary. Without MASK, rows need not sum to 1."""
        return self.analytic_probs(x, log_score, sigma)[..., : self.vocab_size]

    def _is(self, x: X) -> Bool[Array, "*shape n"]:
        return jnp.arange(self.num_states) == x[..., None]


@dataclass(frozen=True)
class Absorbing(Graph):
    """Every token moves to MASK = vocab_size at rate 1 and stays there. N = V + 1."""

    has_mask = True

    @property
    def mask(self) -> int:
        return self.vocab_size

    def base(self, x: X) -> PerPosition:
        return (x == self.mask).astype(jnp.float32)

    def sample_limit(self, key: PRNGKey, shape: tuple[int, ...]) -> Int[Array, "..."]:
        return jnp.full(shape, self.mask, jnp.int32)

    def sample_transition(self, key: PRNGKey, x0: X, sigma: Sigma) -> X:
        # As for every graph, but the limit needs no randomness and so no key of its own.
        return jnp.where(fine_uniform(key, x0.shape) < -jnp.expm1(-sigma), self.mask, x0)

    def prior_kl(self, sigma: Sigma) -> Float[Array, "..."]:
        # The limit has no mass on tokens, so the base distribution keeps e = e^-sigma for them, spread evenly.
        return jnp.exp(-sigma) * jnp.log(float(self.vocab_size))

    def clock(self, sigma: Sigma) -> Float[Array, "..."]:
        # The logarithm of the masked fraction: with s = p(x0 = y) / (e^sigma - 1) the hazard is p(x0 = y).
        return jax.nn.log1mexp(jnp.asarray(sigma, jnp.float32))

    def from_clock(self, clock: Float[Array, "..."]) -> Float[Array, "..."]:
        return -jax.nn.log1mexp(-clock)

    def hazard(self, x: X, log_score: PerState, sigma: Sigma) -> PerState:
        return super().hazard(x, log_score + log_expm1(_column(sigma)), sigma)

    def analytic_probs(self, x: X, log_score: PerState, dsigma: Sigma) -> PerState:
        # At MASK s_y (e^dsigma - 1) for tokens, and the rest stays; a token stays: an Euler step, one pass less.
        return self.euler_probs(x, log_score + log_expm1(_column(dsigma)), 1.0)

    def score_of_mean(self, logits: PerState, x: X, sigma: Sigma) -> PerState:
        # At MASK only x0 = y gives a ratio: e^-sigma / (1 - e^-sigma). `hazard` is the inverse.
        is_token = jnp.arange(self.num_states) != self.mask
        return jax.nn.log_softmax(jnp.where(is_token, logits, -jnp.inf)) - log_expm1(_column(sigma))

    def narrow(self, log_probs: Callable[[PerState], PerState], x: X, log_score: PerState, sigma: Sigma) -> Narrowed:
        # It is the score, normalised, whose sum stays: positions leave MASK at the same rate.
        before = jnp.where(self._is(x), -jnp.inf, log_score)
        total = jax.nn.logsumexp(before, axis=-1, keepdims=True)
        return jnp.where(self._is(x), log_score, log_probs(before) + total), jnp.zeros_like(x, bool)

    def score_entropy(self, log_score: PerState, sigma: Sigma, x: X, x0: X) -> PerPosition:
        # Only r at y = x0 is not zero: p(x0|x0) / p(MASK|x0) = e^-sigma / (1 - e^-sigma).
        at_x0, is_token = self._is(x0), jnp.arange(self.num_states) != self.mask
        others = jnp.sum(jnp.exp(log_score), axis=-1, where=is_token & ~at_x0)
        # A masked sum is fused with the other one; the gradient of a look-up would be one more [..., N] to write.
        log_score_at_x0 = jnp.sum(log_score, axis=-1, where=at_x0)
        return jnp.where(self.contributes(x), others + bregman(log_score_at_x0, -log_expm1(sigma)), 0)


@dataclass(frozen=True)
class Uniform(Graph):
    """Every token is replaced at rate 1 by a uniform draw over the vocabulary (itself included). N = V."""

    has_mask = False

    def base(self, x: X) -> PerPosition:
        return jnp.full(x.shape, 1 / self.vocab_size, jnp.float32)

    def sample_limit(self, key: PRNGKey, shape: tuple[int, ...]) -> Int[Array, "..."]:
        return jax.random.randint(key, shape, 0, self.vocab_size, jnp.int32)

    def prior_kl(self, sigma: Sigma) -> Float[Array, "..."]:
        # With e = e^-sigma the stay and move probabilities are (1 + (V-1) e) / V and (1 - e) / V.
        others, e = self.vocab_size - 1, jnp.exp(-sigma)
        return ((1 + others * e) * jnp.log1p(others * e) + others * (1 - e) * jnp.log1p(-e)) / self.vocab_size

    def score_of_mean(self, logits: PerState, x: X, sigma: Sigma) -> PerState:
        # The ratio is 1 + c where x0 = y, 1 / (1 + c) where x0 = x, and 1 elsewhere; no difference is taken.
        probs, c = jax.nn.softmax(logits), self.vocab_size / jnp.expm1(_column(sigma))
        at_x = jnp.sum(probs, axis=-1, keepdims=True, where=self._is(x))
        elsewhere = jnp.sum(probs, axis=-1, keepdims=True, where=~self._is(x))
        return jnp.log(elsewhere + at_x / (1 + c) + c * probs)

    def plugin_of_score(self, log_score: PerState, x: X, sigma: Sigma) -> PerState:
        """p(x0 | the other positions of x_t), the inverse of `score_of_plugin`: exp(-sigma Q) s, normalised. It sums to
        1. An inexact score's may be negative. A log-score in float32 knows it to e^sigma 1e-7 / N."""
        moved = jnp.where(self._is(x), 0, jnp.expm1(log_score))  # s - 1
        mean = moved.mean(-1, keepdims=True)
        return (1 + jnp.exp(jnp.minimum(_column(sigma), 64.0)) * (moved - mean) / (1 + mean)) / self.vocab_size

    def narrow(self, log_probs: Callable[[PerState], PerState], x: X, log_score: PerState, sigma: Sigma) -> Narrowed:
        # The nearest distribution first: max(p - excess, 0) with the excess that leaves a sum of 1. Clipped at 0 and
        # divided by its sum, it would drown in the errors of its many unlikely tokens.
        probs = self.plugin_of_score(log_score, x, sigma)
        sums = jnp.cumsum(jnp.sort(probs, axis=-1, descending=True), axis=-1)
        excess = jnp.max((sums - 1) / (1 + jnp.arange(self.vocab_size)), axis=-1, keepdims=True)
        narrowed = log_probs(jnp.log(jnp.maximum(probs - excess, 0)))
        return self.score_of_plugin(narrowed, x, sigma), jnp.minimum(probs, 0).sum(-1) < -0.01

    def score_of_plugin(self, logits: PerState, x: X, sigma: Sigma) -> PerState:
        sigma = _column(sigma)
        # N p(y), whose two parts are positive.
        log_p = jnp.log(self.vocab_size * jnp.exp(-sigma) * jax.nn.softmax(logits) - jnp.expm1(-sigma))
        return log_p - jnp.sum(log_p, axis=-1, keepdims=True, where=self._is(x))

    def score_entropy(self, log_score: PerState, sigma: Sigma, x: X, x0: X) -> PerPosition:
        # With a and b the move and stay probabilities, log b/a = log(1 + V / (e^sigma - 1)). Where x = x0, r = a/b at
        # every y; elsewhere r = b/a at y = x0 and 1 at the others. The term at y = x is left out.
        log_stay = jnp.log1p(self.vocab_size / jnp.expm1(sigma))[..., None]
        log_ratio = jnp.where((x == x0)[..., None], -log_stay, jnp.where(self._is(x0), log_stay, 0))
        return jnp.sum(bregman(log_score, log_ratio), axis=-1, where=~self._is(x)) / self.vocab_size


def _column(sigma: Sigma) -> Float[Array, "... 1"]:
    return jnp.asarray(sigma, jnp.float32)[..., None]


GRAPHS = {"absorbing": Absorbing, "uniform": Uniform}


def make(kind: str, vocab_size: int, padding: int = 0) -> Graph:
    """The graph that a config names. vocab_size: tokens of the tokenizer, without MASK. padding: rows beyond them."""
    if vocab_size < 2:
        raise InputError(f"a vocabulary of {vocab_size} tokens is too small; a graph needs at least 2")
    check_fields("graph", locals(), kind=GRAPHS, padding="[0, 2^16)")
    return GRAPHS[kind](vocab_size + padding)
