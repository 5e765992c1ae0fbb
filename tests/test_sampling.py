"""With true scores the samplers reproduce the distribution, given positions stay, and one compilation serves all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy

from sedd_jax import sampling
from sedd_jax.errors import InputError
from sedd_jax.noise import Geometric, LogLinear
from sedd_jax.rates import Absorbing, Uniform

P0 = toy.data_distribution()
CASES = {
    "absorbing": (Absorbing(toy.V), LogLinear(1e-6)),
    "absorbing-geometric": (Absorbing(toy.V), Geometric(1e-4, 20.0)),
    "uniform": (Uniform(toy.V), Geometric(1e-4, 20.0)),
}
DRAWS = 20_000


def frequencies(case, steps, method, clamp=None, seed=0):
    graph, noise = CASES[case]
    score_fn = toy.exact_score_fn(graph, P0)
    run = jax.jit(
        lambda key: sampling.sample(
            key, score_fn, graph, noise, (DRAWS, toy.L), steps=steps, method=method, clamp=clamp
        )
    )
    tokens = run(jax.random.key(seed))
    assert tokens.dtype == jnp.int32 and ((tokens >= 0) & (tokens < toy.V)).all()
    return np.bincount(toy.number(np.asarray(tokens), toy.V), minlength=len(P0))


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_data_distribution(case, method):
    # 256 steps leave a bias of order 1/256 of each probability, below the 1/sqrt(DRAWS p) that the test sees.
    observed = frequencies(case, 256, method)
    assert scipy.stats.chisquare(observed, DRAWS * P0, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("case", ["absorbing-geometric", "uniform"])
def test_analytic_beats_euler_at_equal_steps(case):
    """Absorbing with the log-linear schedule is left out: there e^dsigma - 1 = dt sigma', and the two are the same."""
    distance = {method: np.abs(frequencies(case, 6, method) / DRAWS - P0).sum() / 2 for method in sampling.METHODS}
    assert distance["analytic"] < 0.9 * distance["euler"], distance


def test_one_position_is_sampled_exactly_in_a_single_analytic_step():
    """With the other position given there is nothing left to interact: the conditional comes out at any step count."""
    given = jnp.full(DRAWS, 1)
    clamp = (jnp.array([[True, False]] * DRAWS), jnp.stack([given, given], axis=1))
    conditional = P0.reshape(toy.V, toy.V)[1] / P0.reshape(toy.V, toy.V)[1].sum()
    for steps in (1, 4):
        observed = frequencies("absorbing", steps, "analytic", clamp).reshape(toy.V, toy.V)
        assert observed[0].sum() == observed[2].sum() == 0
        assert scipy.stats.chisquare(observed[1], DRAWS * conditional, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_given_positions_are_clean_at_every_network_call_and_at_the_end(case):
    graph, noise = CASES[case]
    seen = []

    def score_fn(x, sigma):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return jnp.zeros((*x.shape, graph.num_states))

    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 7))
    values = jax.random.randint(jax.random.key(1), (3, 7), 0, toy.V)
    tokens = sampling.sample(jax.random.key(2), score_fn, graph, noise, (3, 7), steps=5, clamp=(mask, values))
    jax.effects_barrier()
    assert len(seen) == 6
    for x in [*seen, np.asarray(tokens)]:
        assert (x[mask] == np.asarray(values)[mask]).all()


def test_negative_probabilities_are_clipped_and_counted():
    graph, noise = Absorbing(4), LogLinear()
    huge = lambda x, sigma: jnp.where(jnp.arange(5) == x[..., None], 0.0, 30.0)  # noqa: E731
    drawn = sampling.simulate(jax.random.key(0), huge, graph, noise, (2, 8), steps=4)
    # Every position leaves MASK in the first step, whose stay probability is far below zero; then nothing moves.
    assert drawn.clipped == pytest.approx(1 / 5)
    assert (drawn.tokens < 4).all()
    calm = lambda x, sigma: jnp.where(jnp.arange(5) == x[..., None], 0.0, -30.0)  # noqa: E731
    assert sampling.simulate(jax.random.key(0), calm, graph, noise, (2, 8), steps=4).clipped == 0


def test_one_compilation_serves_all_keys():
    graph, noise = CASES["absorbing"]
    score_fn = toy.exact_score_fn(graph, P0)
    run = jax.jit(lambda key: sampling.sample(key, score_fn, graph, noise, (4, toy.L), steps=3))
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    assert run._cache_size() == 1
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps=0"), ({"method": "ddim"}, "'ddim' is unknown")])
def test_bad_options_are_refused(options, message):
    graph, noise = CASES["absorbing"]
    with pytest.raises(InputError, match=message):
        sampling.sample(
            jax.random.key(0), lambda x, s: None, graph, noise, (1, 2), **{"steps": 2, "method": "euler"} | options
        )
