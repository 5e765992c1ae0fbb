"""A complete upper bound on -log p(x0): prior + diffusion + reconstruction (docs/mathematics.md).

-log p(x0) <= KL( p_{1|0}(.|x0) || p_base )                                    prior
            + integral over t of sigma'(t) E_{x_t} score_entropy(x_t, x0)      diffusion (theorem 3.6)
            + E_{x_d} [ -log p(x0 | x_d) ] at t = 0                            reconstruction

With the true scores the last two add up to -log p(x0), if x_1 is independent of x0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.errors import require_finite
from sedd_jax.network import Network, as_network, sum_over_positions
from sedd_jax.noise import Noise
from sedd_jax.rates import Graph
from sedd_jax.score_entropy import stratified_times
from sedd_jax.typing import PerSequence, PRNGKey, ScoreFn, Tokens


class Bound(NamedTuple):
    """One entry per sequence, in nats per sequence (summed over L)."""

    prior: PerSequence
    diffusion: PerSequence
    reconstruction: PerSequence
    # Standard error of the estimates diffusion + reconstruction, from the spread over the times of this sequence. The
    # times are stratified, so it is rather too large.
    stderr: PerSequence

    @property
    def total(self) -> Float[Array | np.ndarray, " b"]:
        return self.prior + self.diffusion + self.reconstruction


class Exact(NamedTuple):
    """-log p(x0) of a model that has it in closed form, one entry per sequence, in nats per sequence."""

    total: PerSequence


def bound(
    key: PRNGKey,
    score_fn: ScoreFn | Network,
    graph: Graph,
    noise: Noise,
    tokens: Tokens,
    *,
    num_times: int,
    first_index: Int[Array, ""] | int = 0,
) -> Bound:
    """Estimates the bound of each sequence from num_times stratified times, with one network call per time.

    Log-scores exist only for some noised positions at a time (`sum_over_positions`).
    first_index: index of the first sequence in its data set. The noise of a sequence depends only on the key and its
        index, so batches of any size on any mesh give the same estimates up to rounding.
    """
    batch, length = tokens.shape
    network = as_network(score_fn)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first_index + jnp.arange(batch))
    times = jax.vmap(lambda k: stratified_times(jax.random.fold_in(k, 0), num_times))(keys)

    def corrupt(draw, sigma):
        transition = lambda k, x0, s: graph.sample_transition(jax.random.fold_in(k, draw), x0, s)  # noqa: E731
        return jax.vmap(transition)(keys, tokens, sigma)

    def diffusion_at(index):
        sigma = noise.total(times[:, index])
        x = corrupt(1 + index, sigma)
        total = sum_over_positions(network, x, sigma, graph.contributes(x), graph.score_entropy, tokens)
        return noise.rate(times[:, index]) * total

    def reconstruction_at(index):
        def term(log_score, sigma, x, x0):
            probs = graph.denoise_probs(x, log_score, sigma)
            # The sampler never draws a probability clipped at zero. A finite cost keeps one such token from hiding
            # others.
            probs = jnp.maximum(probs, jnp.finfo(jnp.float32).tiny)
            right = jnp.take_along_axis(probs, x0[..., None], axis=-1)[..., 0]
            return jnp.log(probs.sum(-1)) - jnp.log(right)

        sigma = jnp.full(batch, noise.at_start)
        x = corrupt(1 + num_times + index, sigma)
        # Everywhere: a position that cannot change may be wrong.
        return sum_over_positions(network, x, sigma, jnp.ones_like(x, bool), term, tokens)

    parts = [_mean_and_variance(diffusion_at, num_times)]
    if noise.at_start > 0:
        # Few tokens are noised at sigma(0), so this part needs far fewer samples than the integral.
        parts.append(_mean_and_variance(reconstruction_at, max(2, num_times // 8)))
    else:
        parts.append((jnp.zeros(batch), jnp.zeros(batch)))
    (diffusion, diffusion_variance), (reconstruction, reconstruction_variance) = parts
    return Bound(
        prior=jnp.full(batch, length * graph.prior_kl(noise.total(jnp.ones(())))),
        diffusion=diffusion,
        reconstruction=reconstruction,
        stderr=jnp.sqrt(diffusion_variance + reconstruction_variance),
    )


def _mean_and_variance(draw: Callable, num: int) -> tuple[PerSequence, PerSequence]:
    """The mean of `num` samples and the variance of that mean; NaN for a single sample."""
    draws = jax.lax.map(draw, jnp.arange(num))
    return draws.mean(0), jnp.var(draws, 0, ddof=1) / num


def summarise(bounds: Bound | Exact, length: int, tokens_per_byte: float | None) -> dict[str, float]:
    """The figures that papers quote, each with its standard error over sequences (NaN for a single one).

    tokens_per_byte: of the text that the sequences were cut from; None where the raw length is not known.
    Raises TrainingError if they are not finite.
    """
    nats = np.asarray(require_finite(bounds.total, f"nats of {len(bounds.total)} sequences"), np.float64) / length
    mean, stderr = nats.mean(), nats.std(ddof=1) / len(nats) ** 0.5 if len(nats) > 1 else np.nan
    perplexity = np.exp(mean)
    figures = {"nats_per_token": (mean, stderr), "bits_per_token": (mean / np.log(2), stderr / np.log(2))}
    if tokens_per_byte is not None:
        figures["bits_per_byte"] = tuple(value / np.log(2) * tokens_per_byte for value in (mean, stderr))
    figures["perplexity"] = (perplexity, perplexity * stderr)
    summary = {}
    for name, (value, error) in figures.items():
        summary |= {name: float(value), f"{name}_stderr": float(error)}
    for part in () if isinstance(bounds, Exact) else ("prior", "diffusion", "reconstruction"):
        summary[f"{part}_nats_per_token"] = float(np.mean(getattr(bounds, part), dtype=np.float64) / length)
    return summary
