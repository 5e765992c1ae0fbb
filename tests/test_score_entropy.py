"""The loss in chunks is the plain loss, and the times it is drawn at leave its mean as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.noise import Geometric, LogLinear
from sedd_jax.rates import Absorbing, Uniform
from sedd_jax.score_entropy import (
    Noised,
    ScoreEntropy,
    denoising_loss,
    diffuse,
    importance_times,
    loss_and_grads,
    stratified_times,
)

V, BATCH, LENGTH, DIM = 40, 6, 10, 8
CASES = {"absorbing": (Absorbing(V), LogLinear()), "uniform": (Uniform(V), Geometric())}


def log_score(params, features, tokens, sigma):
    """A head like the network's: linear, zero at the current token."""
    scores = features @ params["kernel"] + params["bias"] - sigma[:, None, None]
    return jnp.where(jax.nn.one_hot(tokens, scores.shape[-1]) == 1, 0, scores)


@functools.cache
def example(case):
    graph, noise = CASES[case]
    keys = jax.random.split(jax.random.key(0), 5)
    tokens = jax.random.randint(keys[0], (BATCH, LENGTH), 0, V)
    params = {
        "kernel": jax.random.normal(keys[1], (DIM, graph.num_states)),
        "bias": jnp.linspace(-1, 1, graph.num_states),
    }
    return (
        graph,
        params,
        jax.random.normal(keys[2], (BATCH, LENGTH, DIM)),
        diffuse(keys[3], graph, noise, tokens),
        tokens,
    )


@functools.partial(jax.jit, static_argnums=0)
def plain(graph, params, features, noised, tokens):
    def loss(params, features):
        score_fn = lambda x, sigma: log_score(params, features, x, sigma)  # noqa: E731
        return denoising_loss(score_fn, graph, noised, tokens).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(params, features)


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [7, 20, 60])
def test_chunks_give_the_plain_loss_and_gradient(case, rows):
    inputs, objective = example(case), ScoreEntropy(*CASES[case])
    found = jax.jit(lambda *args: loss_and_grads(log_score, objective, *args, rows=rows))(*inputs[1:])
    assert_same(found, plain(*inputs))


@pytest.mark.parametrize("masked", [0, 1, BATCH * LENGTH])
def test_no_position_is_dropped_however_many_are_noised(masked):
    graph, params, features, noised, tokens = example("absorbing")
    x = np.asarray(tokens).copy()
    x.flat[np.random.default_rng(0).permutation(x.size)[:masked]] = graph.mask
    noised = Noised(jnp.asarray(x), noised.sigma, noised.weight)
    objective = ScoreEntropy(*CASES["absorbing"])
    chunks = lambda noised: loss_and_grads(log_score, objective, params, features, noised, tokens, rows=16)  # noqa: E731
    found = jax.jit(chunks)(noised)
    assert_same(found, plain(graph, params, features, noised, tokens))
    assert (found[0] > 0) == (masked > 0)


def test_chunks_need_an_eighth_of_the_memory():
    graph, length, dim = Absorbing(4000), 256, 8
    tokens = jnp.zeros((4, length), jnp.int32)
    params = {"kernel": jnp.ones((dim, 4001)), "bias": jnp.ones(4001)}
    noised = Noised(tokens, jnp.ones(4), jnp.ones(4))
    inputs = (params, jnp.ones((4, length, dim)), noised, tokens)
    objective = ScoreEntropy(graph, LogLinear())
    chunks = jax.jit(lambda *args: loss_and_grads(log_score, objective, *args, rows=64)).lower(*inputs).compile()
    whole = jax.jit(lambda *args: plain(graph, *args)).lower(*inputs).compile()
    ratio = chunks.memory_analysis().temp_size_in_bytes / whole.memory_analysis().temp_size_in_bytes
    assert ratio <= 1 / 8


@pytest.mark.parametrize("num", [1, 2, 16, 24, 100])
def test_each_stratum_has_one_time_and_each_run_is_spread_evenly(num):
    times = np.asarray(stratified_times(jax.random.key(0), num))
    assert times.min() > 0 and times.max() <= 1
    np.testing.assert_allclose(np.diff(np.sort(times)), 1 / num, atol=1e-6)
    for parts in (part for part in (2, 4, 8) if num % part == 0 and num // part >= 4):
        means = times.reshape(parts, -1).mean(1)
        assert np.abs(means - 0.5).max() < 2 * parts / num


@pytest.mark.parametrize(("noise", "largest"), [(LogLinear(), 1), (Geometric(), 2)])
def test_importance_times_keep_every_mean(noise, largest):
    num = 1 << 14
    t, density = (np.asarray(x, np.float64) for x in importance_times(jax.random.key(0), noise, num))
    assert t.min() > 0 and t.max() <= 1
    assert (1 / density).max() <= largest + 1e-6
    for power in (0, 1, 3):
        # The error of one stratified sample is of the order of one stratum times the integrand's range.
        assert np.mean(t**power / density) == pytest.approx(1 / (power + 1), abs=4 * largest / num)
