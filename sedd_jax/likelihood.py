"""A complete upper bound on -log p(x0): prior + diffusion + reconstruction (docs/mathematics.md).

-log p(x0) <= KL( p_{1|0}(.|x0) || p_base )                                    prior
            + integral over t of sigma'(t) E_{x_t} score_entropy(x_t, x0)      diffusion (theorem 3.6)
            + E_{x_d} [ -log p(x0 | x_d) ] at t = 0                            reconstruction

With the true scores the last two add up to -log p(x0), if x_1 is independent of x0."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.categorical import fine_uniform
from sedd_jax.errors import InputError, check_fields, require_finite
from sedd_jax.network import Network, as_network, sum_over_positions
from sedd_jax.noise import Noise
from sedd_jax.rates import Absorbing, Graph
from sedd_jax.score_entropy import roles, stratified_times
from sedd_jax.typing import Keys, Mask, PerSequence, PRNGKey, ScoreFn, Tokens


class Bound(NamedTuple):
    """One entry per sequence, in nats per sequence (summed over L). stderr: standard error of diffusion +
    reconstruction, from the spread over this sequence's times; these are stratified, so it is rather too large."""

    prior: PerSequence
    diffusion: PerSequence
    reconstruction: PerSequence
    stderr: PerSequence

    @property
    def total(self) -> Float[Array | np.ndarray, " b"]:
        return self.prior + self.diffusion + self.reconstruction


class Exact(NamedTuple):
    """-log p(x0) of a model that has it in closed form, one entry per sequence, in nats per sequence."""

    total: PerSequence


class Weighted(NamedTuple):
    """Estimates of -log p(x0) by random orders, one entry per sequence, in nats per sequence. total: -log of the mean
    probability over the orders, which is above -log p(x0) on average and falls with their number (Burda et al., arXiv
    1509.00519). mean: the mean of -log, which is above it."""

    total: PerSequence
    mean: PerSequence


Estimate = Bound | Exact | Weighted

ESTIMATORS = ("auto", "count", "time", "published", "orders")


def bound(
    key: PRNGKey,
    score_fn: ScoreFn | Network,
    graph: Graph,
    noise: Noise,
    tokens: Tokens,
    *,
    num_times: int,
    first_index: Int[Array, ""] | int = 0,
    estimator: str = "auto",
    given: Mask | None = None,
    never: Mask | None = None,
) -> Bound | Weighted:
    """Estimates the bound of each sequence from num_times draws, with one network call per draw. Log-scores exist only
    for some noised positions at a time (`sum_over_positions`).
    first_index: index of the first sequence in its data set. The noise of a sequence depends only on the key and its
        index, so batches of any size on any mesh give the same estimates up to rounding.
    estimator: 'time' draws noise levels, stratified in time; 'count', for the absorbing graph, how many positions are
        masked, which varies less and leaves nothing to the prior; 'auto' is 'count' where it can be. 'published' is the
        figure of SEDD's code, which is no bound: the diffusion part alone, as a mean over t in [0.001, 1]. 'orders',
        for the absorbing graph, is `Weighted`: by num_times random orders of unmasking, with L network calls for each.
    given, never: [B, L], for the absorbing graph: bounds -log p(the others | given ones), those of `never` unknown.
    Raises InputError for an estimator or a condition that the graph does not have."""
    check_estimator(estimator, graph, conditional=given is not None or never is not None)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_index + jnp.arange(len(tokens)))
    process = keys, as_network(score_fn), graph, noise, tokens, num_times
    if isinstance(graph, Absorbing) and estimator in ("auto", "count", "orders"):
        return (_by_orders if estimator == "orders" else _by_count)(*process, *roles(tokens, given, never))
    return _by_time(*process, 1e-3 if estimator == "published" else 0.0)


def check_estimator(estimator: str, graph: Graph, *, conditional: bool = False) -> None:
    """Raises InputError as `bound` does. conditional: given some tokens."""
    check_fields("eval", {"estimator": estimator}, estimator=ESTIMATORS)
    if not isinstance(graph, Absorbing) and (conditional or estimator in ("count", "orders")):
        raise InputError("a bound by count, orders or given tokens needs the absorbing graph, whose tokens are clean")
    if estimator in ("time", "published") and conditional:
        raise InputError(f"estimator={estimator!r} is of whole sequences; with given tokens choose 'count'")


def _levels(keys: Keys, index: Any, targets: Mask) -> tuple[Float[Array, "b l"], Int[Array, "b l"]]:
    """The masked fraction at which each target turns to MASK, and its rank among them in ascending order."""
    uniform = jax.vmap(lambda key: fine_uniform(jax.random.fold_in(key, 1 + index), targets.shape[1:]))(keys)
    levels = jnp.where(targets, uniform, jnp.inf)
    return levels, jnp.argsort(jnp.argsort(levels))


def _by_count(
    keys: Keys, network: Network, graph: Absorbing, noise: Noise, tokens: Tokens, num: int, targets: Mask, hidden: Mask
) -> Bound:
    """With n targets: the mean over k = 1..n of (n / k) E[ sum over the k masked ones of (e^sigma - 1) score_entropy ].
    docs/mathematics.md, section 6. Positions turn to MASK at uniform levels; the first k of them, and the level of the
    k-th, have just the law of k masked positions and their noise."""
    count, shares = targets.sum(-1), jax.vmap(lambda k: stratified_times(jax.random.fold_in(k, 0), num))(keys)

    @jax.named_scope("diffusion")
    def draw(index):
        levels, rank = _levels(keys, index, targets)
        k = jnp.clip(jnp.ceil(shares[:, index] * count), 1, count).astype(jnp.int32)
        masked = (rank < k[:, None]) & targets
        level = jnp.max(jnp.where(masked, levels, 0), axis=-1)
        # What is beyond the noise of training is as good as its end.
        sigma = jnp.minimum(-jnp.log1p(-level), noise.total(jnp.ones(())))
        x = jnp.where(masked | hidden, graph.mask, tokens)
        total = sum_over_positions(network, x, sigma, masked, graph.score_entropy, tokens)
        return count / jnp.maximum(k, 1) * jnp.expm1(sigma) * total

    (mean, variance), nothing = _mean_and_variance(draw, num), jnp.zeros(len(tokens))
    return Bound(prior=nothing, diffusion=mean, reconstruction=nothing, stderr=jnp.sqrt(variance))


def _by_orders(
    keys: Keys, network: Network, graph: Absorbing, noise: Noise, tokens: Tokens, num: int, targets: Mask, hidden: Mask
) -> Weighted:
    """By p(x) = E over orders of the product of p(token | tokens before it): the law of first-hitting with L calls."""

    def draw(index):
        levels, rank = _levels(keys, index, targets)

        def reveal(i, carry):
            x, total = carry
            leaves = (rank == tokens.shape[1] - 1 - i) & targets
            level = jnp.max(jnp.where(leaves, levels, 0), axis=-1)
            sigma = jnp.minimum(-jnp.log1p(-level), noise.total(jnp.ones(())))
            total += sum_over_positions(network, x, sigma, leaves, partial(_denoising_cost, graph), tokens)
            return jnp.where(leaves, tokens, x), total

        masked = jnp.where(targets | hidden, graph.mask, tokens)
        return jax.lax.fori_loop(0, tokens.shape[1], reveal, (masked, jnp.zeros(len(tokens))))[1]

    costs = jax.lax.map(draw, jnp.arange(num))
    return Weighted(total=-jax.nn.logsumexp(-costs, axis=0, b=1 / num), mean=costs.mean(0))


def _denoising_cost(graph: Graph, log_score: Any, sigma: Any, x: Any, x0: Any) -> Float[Array, "r 1"]:
    """-log of the probability that the last denoising step gives to the token."""
    # The sampler never draws a probability clipped at zero. A finite cost keeps one such token from hiding others.
    probs = jnp.maximum(graph.denoise_probs(x, log_score, sigma), jnp.finfo(jnp.float32).tiny)
    return jnp.log(probs.sum(-1)) - jnp.log(jnp.take_along_axis(probs, x0[..., None], axis=-1)[..., 0])


def _by_time(keys: Keys, network: Network, graph: Graph, noise: Noise, tokens: Tokens, num: int, start: float) -> Bound:
    """The prior, the diffusion as an integral over time, and the reconstruction; with a `start`, diffusion alone."""
    batch, length = tokens.shape
    times = start + (1 - start) * jax.vmap(lambda k: stratified_times(jax.random.fold_in(k, 0), num))(keys)

    def corrupt(draw, sigma):
        return jax.vmap(graph.sample_transition)(jax.vmap(jax.random.fold_in, (0, None))(keys, draw), tokens, sigma)

    @jax.named_scope("diffusion")
    def diffusion_at(index):
        sigma = noise.total(times[:, index])
        x = corrupt(1 + index, sigma)
        total = sum_over_positions(network, x, sigma, graph.contributes(x), graph.score_entropy, tokens)
        return noise.rate(times[:, index]) * total

    @jax.named_scope("reconstruction")
    def reconstruction_at(index):
        sigma = jnp.full(batch, noise.at_start)
        x = corrupt(1 + num + index, sigma)
        # Everywhere: a position that cannot change may be wrong.
        return sum_over_positions(network, x, sigma, jnp.ones_like(x, bool), partial(_denoising_cost, graph), tokens)

    (diffusion, variance), reconstruction = _mean_and_variance(diffusion_at, num), jnp.zeros(batch)
    if noise.at_start > 0 and not start:
        # Few tokens are noised at sigma(0), so this part needs far fewer samples than the integral.
        reconstruction, its_variance = _mean_and_variance(reconstruction_at, max(2, num // 8))
        variance += its_variance
    prior = jnp.full(batch, 0.0 if start else length * graph.prior_kl(noise.total(jnp.ones(()))))
    return Bound(prior, diffusion, reconstruction, stderr=jnp.sqrt(variance))


def _mean_and_variance(draw: Callable, num: int) -> tuple[PerSequence, PerSequence]:
    """The mean of `num` samples and the variance of that mean; NaN for a single sample."""
    draws = jax.lax.map(draw, jnp.arange(num))
    return draws.mean(0), jnp.var(draws, 0, ddof=1) / num


def standard_errors(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Of the mean of values of neighbouring chunks: as if they were independent, and by batch means. Chunks of one
    document resemble each other. The means of blocks of b neighbours do less, the more b grows: b doubles from 1 while
    at least 20 blocks are left, and the largest error counts (NaN for a single value)."""
    if len(values) < 2:
        return float("nan"), float("nan")
    sizes = [1 << k for k in range(32) if k == 0 or len(values) >> k >= 20]
    blocks = [values[: len(values) // size * size].reshape(-1, size).mean(1) for size in sizes]
    errors = [float(means.std(ddof=1) / len(means) ** 0.5) for means in blocks]
    return errors[0], max(errors)


def summarise(bounds: Estimate, length: float | int, tokens_per_byte: float | None) -> dict[str, float]:
    """The figures that papers quote, each with its standard error by `standard_errors` (NaN for a single sequence). Two
    more errors of nats per token: `_plain`, as if sequences were independent; `monte_carlo`, of the draws alone.
    length: tokens asked for in a sequence, on average. tokens_per_byte: None where the raw length is not known.
    Raises TrainingError if they are not finite."""
    nats = np.asarray(require_finite(bounds.total, f"nats of {len(bounds.total)} sequences"), np.float64) / length
    mean, (plain, stderr) = nats.mean(), standard_errors(nats)
    figures = {"nats_per_token": (mean, stderr), "bits_per_token": (mean / np.log(2), stderr / np.log(2))}
    if tokens_per_byte is not None:
        figures["bits_per_byte"] = tuple(value / np.log(2) * tokens_per_byte for value in (mean, stderr))
    figures["perplexity"] = (np.exp(mean), np.exp(mean) * stderr)
    summary = {}
    for name, (value, error) in figures.items():
        summary |= {name: float(value), f"{name}_stderr": float(error)}
    summary["nats_per_token_stderr_plain"] = plain
    if isinstance(bounds, Bound):
        draws = np.square(np.asarray(bounds.stderr, np.float64) / length)
        summary["monte_carlo_nats_per_token_stderr"] = float(np.sqrt(draws.sum()) / len(nats))
        for part in ("prior", "diffusion", "reconstruction"):
            summary[f"{part}_nats_per_token"] = float(np.mean(getattr(bounds, part), dtype=np.float64) / length)
    return summary
