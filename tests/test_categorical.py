"""Draws are exact where float32 noise is not: rare outcomes beside a common one, at GPT-2's vocabulary size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy

from sedd_jax.categorical import categorical, fine_uniform, quantile, truncated, usable

V = 50_257


def counts(key, weights, draws, chunk=1 << 16):
    """Outcomes of many draws from one row of weights, by chunks that share a compilation."""
    draw = jax.jit(
        lambda key: categorical(key, jnp.broadcast_to(weights, (chunk, len(weights)))), compiler_options=toy.OPTIMISED
    )
    total = np.zeros(len(weights), np.int64)
    for i in range(-(-draws // chunk)):
        total += np.bincount(draw(jax.random.fold_in(key, i)), minlength=len(weights))
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 10, 51, 257])
def test_frequencies_match_the_weights(n):
    weights = np.random.default_rng(n).gamma(0.3, size=n).astype(np.float32)
    observed = counts(jax.random.key(0), jnp.asarray(7 * weights), 1 << 17)
    expected = observed.sum() * weights.astype(np.float64) / weights.sum(dtype=np.float64)
    common = expected > 5
    assert abs(observed[~common].sum() - expected[~common].sum()) <= 5 * (1 + expected[~common].sum()) ** 0.5
    if common.sum() > 1:
        assert scipy.stats.chisquare(observed[common], expected[common], sum_check=False).pvalue > 1e-4


def test_zero_weight_is_never_drawn():
    weights = jnp.zeros((1000, 300)).at[:, 37].set(1e-30).at[:, 299].set(1e-30)
    assert set(np.unique(categorical(jax.random.key(1), weights))) == {37, 299}


@jax.jit
def outcomes(rows):
    """What is drawn from two rows at quantiles from the first to the last, and whether the rows are usable."""
    drawn = [quantile(jnp.full((2, 2), u), rows) for u in (0.0, 0.5, 1 - 2.0**-24)]
    return jnp.stack(drawn), jnp.stack([truncated(jax.random.key(0), row) for row in rows]), usable(rows)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 3e38])
def test_a_row_that_cannot_be_drawn_from_is_known_and_gives_some_outcome(value):
    """Such a row, and one with one such weight among sound ones; the groups are padded with 0 to 7 outcomes."""
    for n in (1, 2, 3, 10, 17, 26, 37, 50, 64, 65, 70):
        rows = np.stack([np.full(n, value), np.linspace(1, 2, n)]).astype(np.float32)
        rows[1, n // 2] = value
        *drawn, sound = map(np.asarray, outcomes(rows))
        assert all(((part >= 0) & (part < n)).all() for part in drawn), n
        assert sound.tolist() == ([n == 1, True] if value == 3e38 else [False, value == 0 and n > 1]), n


def quantile_masses(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Which outcome each quantile falls on when only one level of the draw is at work."""
    from sedd_jax.categorical import _inverse_cdf

    rows = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (len(u), len(weights)))
    return np.asarray(_inverse_cdf(jnp.asarray(u, jnp.float32), rows))


def test_every_outcome_has_its_own_mass_to_a_relative_error():
    """The masses themselves, not their frequencies: where each outcome's interval of quantiles begins and ends."""
    rng = np.random.default_rng(0)
    weights = np.concatenate([[1.0], 10.0 ** rng.uniform(-30, 0, 220)]).astype(np.float32)
    order = np.argsort(weights, kind="stable")
    exact = weights[order].astype(np.float64)
    edges = np.cumsum(exact) / exact.sum()
    for rank in range(0, 221, 10):
        lower = edges[rank - 1] if rank else 0.0
        mass = exact[rank] / exact.sum()
        inside = lower + mass * np.array([1e-3, 0.5, 1 - 1e-3])
        assert (quantile_masses(weights, inside) == order[rank]).all(), rank


def test_a_heavy_head_leaves_the_tail_its_mass():
    """One token holds 1 - 1e-3 and 50,256 share the rest: each tail token has 2e-8, below float32's 6e-8 at 1.

    `jax.random.categorical` gives this tail 0.015 of its mass, the reference's float32 noise 0.146.
    """
    draws = 1 << 15
    weights = np.full(V, 1e-3 / (V - 1), np.float32)
    weights[V // 2] = 1 - 1e-3
    observed = counts(jax.random.key(2), jnp.asarray(weights), draws, chunk=512)
    tail = np.delete(observed, V // 2)
    expected = draws * 1e-3
    assert abs(tail.sum() - expected) < 4 * expected**0.5
    # Spread evenly over the tail: by quarters of the vocabulary.
    quarters = [part.sum() for part in np.array_split(tail, 4)]
    assert scipy.stats.chisquare(quarters).pvalue > 1e-4


def test_fine_uniform_is_uniform_and_reaches_far_below_float32_steps():
    u = np.asarray(jax.jit(lambda k: fine_uniform(k, (1 << 22,)))(jax.random.key(3)))
    assert u.min() >= 0 and u.max() < 1
    assert scipy.stats.kstest(u[:100_000], "uniform").pvalue > 1e-4
    small = u[u < 2**-12] * 2**12
    assert len(np.unique(small)) > 0.99 * len(small)  # a multiple of 2^-23 would leave 2048 values
    assert scipy.stats.kstest(small, "uniform").pvalue > 1e-4
