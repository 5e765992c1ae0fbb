"""Laws of the transition rate matrices, against matrix exponentials and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import scipy.stats
import toy

from sedd_jax import rates
from sedd_jax.errors import InputError
from sedd_jax.rates import Absorbing, Uniform
from sedd_jax.sampling.sampler import Truncation

GRAPHS = [Absorbing(5), Uniform(5)]
SIGMAS = [1e-5, 1e-3, 0.1, 1.0, 5.0, 30.0]


def log_scores(graph, x, seed=0, scale=1.0):
    """Random log-scores, 0 at the current token."""
    values = scale * jax.random.normal(jax.random.key(seed), (*x.shape, graph.num_states))
    return jnp.where(jnp.arange(graph.num_states) == x[..., None], 0, values)


@pytest.mark.parametrize("graph", GRAPHS)
def test_columns_of_the_rate_matrix_sum_to_zero(graph):
    q = toy.rate_matrix(graph)
    np.testing.assert_allclose(q.sum(0), 0, atol=1e-7)
    assert (q - np.diag(np.diag(q)) >= 0).all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_reverse_rate_is_score_times_the_transposed_rate(graph):
    x = jnp.arange(graph.num_states)
    log_score = log_scores(graph, x)
    q = toy.rate_matrix(graph)
    expected = np.exp(log_score) * q[np.asarray(x)] * (1 - np.eye(graph.num_states))
    expected -= np.diag(expected.sum(1))
    np.testing.assert_allclose(graph.reverse_rate(x, log_score), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0])
def test_transitions_follow_the_matrix_exponential(graph, sigma):
    draws = 20_000
    expected = scipy.linalg.expm(sigma * toy.rate_matrix(graph))
    for x0 in range(graph.vocab_size):
        x = graph.sample_transition(jax.random.key(x0), jnp.full(draws, x0), sigma)
        counts = np.bincount(x, minlength=graph.num_states)
        possible = expected[:, x0] > 1e-12
        assert counts[~possible].sum() == 0
        assert scipy.stats.chisquare(counts[possible], draws * expected[possible, x0], sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("graph", GRAPHS)
def test_rare_transitions_happen_at_their_rate(graph):
    """At sigma = 1e-5 a float32 uniform, a multiple of 2^-23, would be off by 0.1 %, and at 1e-8 by a factor 12."""
    draws, sigma = 2**24, 1e-6
    x = jax.jit(lambda key: graph.sample_transition(key, jnp.zeros(draws, jnp.int32), sigma))(jax.random.key(0))
    expected = draws * toy.rate_matrix(graph)[1:, 0].sum() * sigma
    assert abs(int(jnp.sum(x != 0)) - expected) < 5 * expected**0.5


@pytest.mark.parametrize("graph", GRAPHS)
def test_limit_is_where_the_chain_ends(graph):
    x = graph.sample_limit(jax.random.key(0), (100, 100))
    assert x.dtype == jnp.int32
    counts = np.bincount(x.ravel(), minlength=graph.num_states)
    limit = scipy.linalg.expm(50 * toy.rate_matrix(graph))[:, 0]
    assert (counts[limit < 1e-12] == 0).all()
    assert (abs(counts - 1e4 * limit) <= 5 * (1e4 * limit * (1 - limit)) ** 0.5 + 1e-6).all()


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("sigma", [0.01, 1.0, 6.9])
def test_prior_is_the_divergence_from_the_base_distribution(graph, sigma):
    p = scipy.linalg.expm(sigma * toy.rate_matrix(graph))[:, 0]
    base = np.full(graph.num_states, 1 / graph.vocab_size)
    if isinstance(graph, Absorbing):
        base = np.append(np.exp(-sigma) * base[:-1], 1 - np.exp(-sigma))
    expected = np.sum(p[p > 0] * np.log(p[p > 0] / base[p > 0]))
    np.testing.assert_allclose(graph.prior_kl(sigma), expected, rtol=1e-5, atol=1e-6)


def score_entropy_f64(graph, log_score, sigma, x, x0):
    """The definition, term by term, with r from the closed form in float64."""
    log_score = np.asarray(log_score, np.float64)
    n, v = graph.num_states, graph.vocab_size
    total = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        if isinstance(graph, Absorbing):
            q = np.zeros(n) if x[i] != graph.mask else np.ones(n)
            r = np.where(np.arange(n) == x0[i], 1 / np.expm1(sigma), 0)
        else:
            q = np.full(n, 1 / v)
            move = -np.expm1(-sigma) / v
            p = np.full(n, move) + np.exp(-sigma) * (np.arange(n) == x0[i])
            r = p / p[x[i]]
        k = r * (np.log(np.where(r > 0, r, 1)) - 1)
        terms = np.exp(log_score[i]) - r * log_score[i] + k
        total[i] = np.sum((q * terms)[np.arange(n) != x[i]])
    return total


@pytest.mark.parametrize("vocab_size", [2, 50, 50_257, 256_000])
@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_score_entropy_in_float32_equals_the_definition_in_float64(kind, vocab_size, sigma):
    graph = rates.make(kind, vocab_size)
    x0 = jnp.array([0, 1, 1, 0])
    x = jnp.array([graph.num_states - 1, graph.num_states - 1, 1, 1])
    # An untrained network's scores: near 1 for uniform, near the flat posterior for absorbing.
    scale = -np.log(np.expm1(sigma)) - np.log(vocab_size) if kind == "absorbing" else 0.0
    log_score = jnp.where(
        jnp.arange(graph.num_states) == x[:, None], 0, scale + log_scores(graph, x, scale=0.3)
    ).astype(jnp.float32)
    expected = score_entropy_f64(graph, log_score, sigma, np.asarray(x), np.asarray(x0))
    # A sum of V float32 exponentials, each right to a few units in the last place of arguments of up to 23.
    np.testing.assert_allclose(graph.score_entropy(log_score, sigma, x, x0), expected, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_score_entropy_is_positive_and_zero_at_the_true_ratio(graph, sigma):
    n, v = graph.num_states, graph.vocab_size
    x, x0 = (a.ravel() for a in jnp.meshgrid(jnp.arange(n), jnp.arange(v), indexing="ij"))
    if isinstance(graph, Absorbing):
        x, x0 = x[x == n - 1], x0[x == n - 1]
        log_ratio = jnp.where(jnp.arange(n) == x0[:, None], -jnp.log(jnp.expm1(sigma)), -jnp.inf)
    else:
        log_stay = jnp.log1p(v / jnp.expm1(sigma))
        here, there = (jnp.where(jnp.arange(n) == x0[:, None], log_stay, 0), jnp.where(x == x0, log_stay, 0))
        log_ratio = here - there[:, None]
    log_ratio = jnp.where(jnp.arange(n) == x[:, None], 0, log_ratio)
    at_truth = graph.score_entropy(jnp.maximum(log_ratio, -80), sigma, x, x0)
    largest_ratio = float(jnp.exp(jnp.max(log_ratio)))
    np.testing.assert_allclose(at_truth, 0, atol=1e-12 * largest_ratio + 1e-30)
    off = graph.score_entropy(jnp.where(log_ratio == 0, 0.1, log_ratio + 0.1).clip(-80), sigma, x, x0)
    assert (off > 0).all()


@pytest.mark.parametrize("graph", [Absorbing(toy.V), Uniform(toy.V)])
@pytest.mark.parametrize(("sigma", "dsigma"), [(0.5, 1e-4), (0.5, 0.2), (2.0, 1.0), (3.0, 2.999)])
def test_analytic_step_with_exact_scores_is_the_exact_posterior_of_one_position(graph, sigma, dsigma):
    """p(x_{sigma - dsigma} = y | x_sigma = x) of one position: exact, as there is no other position to interact."""
    p0 = np.random.default_rng(1).dirichlet(np.ones(toy.V))
    q = toy.rate_matrix(graph)
    before = scipy.linalg.expm((sigma - dsigma) * q)[:, : toy.V] @ p0
    now = scipy.linalg.expm(sigma * q)[:, : toy.V] @ p0
    x = jnp.arange(graph.num_states)
    posterior = (scipy.linalg.expm(dsigma * q) * before) / now[:, None]  # [x, y]
    log_score = jnp.log(now[None] / now[:, None]).astype(jnp.float32)
    np.testing.assert_allclose(graph.analytic_probs(x, log_score, dsigma), posterior, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("graph", [Absorbing(toy.V), Uniform(toy.V)])
@pytest.mark.parametrize("sigma", [1e-5, 0.01, 2.0])
def test_denoising_with_exact_scores_gives_the_clean_posterior(graph, sigma):
    p0 = np.random.default_rng(1).dirichlet(np.ones(toy.V))
    transition = scipy.linalg.expm(sigma * toy.rate_matrix(graph))[:, : toy.V]
    now = transition @ p0
    log_score = jnp.log(now[None] / now[:, None]).astype(jnp.float32)
    probs = graph.denoise_probs(jnp.arange(graph.num_states), log_score, sigma)
    assert probs.shape == (graph.num_states, toy.V)
    np.testing.assert_allclose(probs, transition * p0 / now[:, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("graph", GRAPHS)
def test_euler_and_analytic_agree_to_first_order(graph):
    x = jnp.arange(graph.num_states)
    log_score = log_scores(graph, x)
    euler, analytic = graph.euler_probs(x, log_score, 1e-3), graph.analytic_probs(x, log_score, 1e-3)
    np.testing.assert_allclose(euler, analytic, atol=2e-5)  # second order: (1e-3)^2 times rates of up to 20
    np.testing.assert_allclose(euler.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("sigma", [1e-7, 1e-3, 0.6, 0.8, 20.0, 88.0])
def test_the_logarithm_of_expm1_and_its_derivative(sigma):
    np.testing.assert_allclose(rates.log_expm1(sigma), np.log(np.expm1(sigma)), rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(jax.grad(rates.log_expm1)(sigma), -1 / np.expm1(-sigma), rtol=2e-6)
    assert rates.log_expm1(sigma + 900) == np.float32(sigma + 900)


@pytest.mark.parametrize("log_score", [0.0, 20.0, -200.0, 80.0])
@pytest.mark.parametrize("log_ratio", [-200.0, -100.0, 0.0, 20.0])
def test_the_divergence_and_its_derivative_do_not_overflow(log_score, log_ratio):
    ratio = np.exp(np.float64(log_ratio))
    value, slope = jax.value_and_grad(rates.bregman)(log_score, log_ratio)
    np.testing.assert_allclose(value, np.exp(log_score) - ratio * (1 + log_score - log_ratio), rtol=2e-5, atol=1e-37)
    np.testing.assert_allclose(slope, np.exp(log_score) - ratio, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("sigma", [90.0, 1000.0])
@pytest.mark.parametrize("graph", [Absorbing(toy.V), Uniform(toy.V)])
def test_levels_beyond_float32(graph, sigma):
    """With the posterior of one position, where e^sigma overflows: the loss is 0 or tiny, every step is the limit's."""
    p0 = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(toy.V)), jnp.float32)
    x = jnp.full(2, graph.num_states - 1)
    logits = jnp.pad(jnp.log(p0), (0, graph.num_states - toy.V))
    log_score = graph.score_of_mean(jnp.tile(logits, (2, 1)), x, sigma)
    log_score = jnp.where(jnp.arange(graph.num_states) == x[:, None], 0, log_score)
    loss = graph.score_entropy(log_score, sigma, x, jnp.array([0, 1]))
    np.testing.assert_allclose(loss, 0, atol=1e-12)
    assert np.isfinite(jax.grad(lambda s: graph.score_entropy(s, sigma, x, jnp.array([0, 1])).sum())(log_score)).all()
    if isinstance(graph, Absorbing):  # On the uniform graph the scores are all 1, and the clean token is lost in them.
        np.testing.assert_allclose(graph.denoise_probs(x, log_score, sigma), [p0, p0], rtol=2e-4)
        np.testing.assert_allclose(graph.hazard(x, log_score, sigma)[:, :-1], [p0, p0], rtol=2e-4)
    probs = graph.analytic_probs(x, log_score, sigma)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=2e-4)
    # A smaller step: nothing leaves MASK yet, and a uniform token is drawn anew.
    expected = graph.base(jnp.arange(graph.num_states))
    np.testing.assert_allclose(graph.analytic_probs(x, log_score, sigma - 60), [expected, expected], atol=1e-6)


def test_make_refuses_what_it_does_not_know():
    with pytest.raises(InputError, match="'cosine' is unknown"):
        rates.make("cosine", 5)
    with pytest.raises(InputError, match="vocabulary of 1"):
        rates.make("uniform", 1)


@pytest.mark.parametrize("law", ["mean", "plugin"])
@pytest.mark.parametrize("graph", [Absorbing(toy.V), Uniform(toy.V)])
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 6.0])
def test_the_posterior_of_the_clean_token_gives_the_true_scores(graph, sigma, law):
    """Given all positions for the mean of ratios, given the others for the ratio of means."""
    p0 = toy.data_distribution().reshape(toy.V, toy.V)
    transition = scipy.linalg.expm(sigma * toy.rate_matrix(graph))[:, : toy.V]
    x = toy.sequences(graph.num_states)
    x = x[np.asarray(graph.contributes(jnp.asarray(x))).all(1)]
    first = np.einsum("bj,ij->bi", transition[x[:, 1]], p0)
    second = np.einsum("bi,ij->bj", transition[x[:, 0]], p0)
    logits = np.log(np.stack([first, second], 1) * (transition[x] if law == "mean" else 1))
    # What the head says of MASK, if there is one, is not looked at.
    logits = np.pad(logits, ((0, 0), (0, 0), (0, graph.num_states - toy.V)), constant_values=5.0).astype(np.float32)
    tokens = jnp.asarray(x, jnp.int32)
    found = getattr(graph, f"score_of_{law}")(jnp.asarray(logits), tokens, sigma)
    expected = toy.exact_score_fn(graph, toy.data_distribution())(tokens, jnp.full(len(x), sigma))
    other = np.arange(graph.num_states) != x[..., None]
    np.testing.assert_allclose(np.asarray(found)[other], np.asarray(expected)[other], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("graph", [Absorbing(toy.V), Uniform(toy.V)])
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 6.0])
def test_narrowed_scores_are_those_of_narrowed_distributions(graph, sigma):
    """Exactly so where the positions are independent; and the same scores, for any distribution, if nothing changes."""
    x = toy.sequences(graph.num_states)
    x = jnp.asarray(x[np.asarray(graph.contributes(jnp.asarray(x))).all(1)], jnp.int32)
    other = np.arange(graph.num_states) != x[..., None]
    scores = lambda p0: toy.exact_score_fn(graph, p0)(x, jnp.full(len(x), sigma))  # noqa: E731
    first, second = np.array([0.5, 0.3, 0.2]), np.array([0.15, 0.1, 0.75])
    product = np.outer(first, second).ravel()
    cases = [
        ({}, toy.data_distribution(), toy.data_distribution()),
        ({"temperature": 0.5}, product, product**2 / (product**2).sum()),
        ({"top_k": 2}, product, np.outer([5 / 8, 3 / 8, 0], [1 / 6, 0, 5 / 6]).ravel()),
        ({"top_p": 0.7}, product, np.outer([5 / 8, 3 / 8, 0], [0, 0, 1]).ravel()),
    ]
    for options, before, after in cases:
        found, clipped = graph.narrow(Truncation(**options).log_probs, x, scores(before), sigma)
        # Where MASK cannot come from, scores are 0.
        np.testing.assert_allclose(np.exp(found)[other], np.exp(scores(after))[other], rtol=1e-3, atol=1e-6)
        assert not clipped.any()


def test_inexact_scores_are_narrowed_from_the_nearest_distribution():
    graph, x = Uniform(40), jnp.arange(40)
    log_score = jnp.where(jnp.eye(40, dtype=bool), 0, jnp.asarray(log_scores(graph, x)))
    found, clipped = graph.narrow(jax.nn.log_softmax, x, log_score, 1.0)
    assert clipped.all()
    before, after = (np.asarray(graph.plugin_of_score(values, x, 1.0), np.float64) for values in (log_score, found))
    np.testing.assert_allclose(before.sum(-1), 1, rtol=1e-4)
    for row, nearest in zip(before, after, strict=True):
        excess = scipy.optimize.brentq(lambda excess: np.maximum(row - excess, 0).sum() - 1, -1, row.max())  # noqa: B023
        np.testing.assert_allclose(nearest, np.maximum(row - excess, 0), atol=1e-5)


@pytest.mark.parametrize("sigma", [1e-4, 0.3, 9.0])
def test_score_entropy_of_the_mean_parametrisation_is_a_weighted_cross_entropy(sigma):
    graph = Absorbing(6)
    logits = 3 * jax.random.normal(jax.random.key(0), (50, 7))
    x0 = jax.random.randint(jax.random.key(1), (50,), 0, 6)
    x = jnp.full(50, graph.mask)
    found = graph.score_entropy(graph.score_of_mean(logits, x, sigma), sigma, x, x0)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :6]), x0[:, None], 1)[:, 0] / np.expm1(sigma)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5 / np.expm1(sigma))


@pytest.mark.parametrize(("sigma", "earlier"), [(1e-3, 0.0), (0.3, 0.1), (6.0, 1.0)])
def test_the_plugin_law_is_the_loss_and_the_posterior_of_udlm_and_duo(sigma, earlier):
    """Schiff et al., arXiv 2412.10193, in float64; alpha = e^-sigma."""
    graph, n = Uniform(7), 7
    logits = 2 * np.random.default_rng(0).normal(size=(n * n, n))
    x, x0 = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    rows, alpha, alpha_s = np.arange(n * n), np.exp(-sigma), np.exp(-earlier)
    theta = scipy.special.softmax(logits, -1)
    bar, bar_theta = (n * alpha * p + 1 - alpha for p in (np.eye(n)[x0], theta))
    here, here_theta = bar[rows, x, None], bar_theta[rows, x, None]
    logs = bar / here * np.log(here_theta * bar / (bar_theta * here))
    # Per unit of sigma: alpha' = -alpha sigma'.
    loss = -(n / here - n / here_theta - logs.sum(-1, keepdims=True))[:, 0] / n
    log_score = graph.score_of_plugin(jnp.asarray(logits, jnp.float32), jnp.asarray(x), sigma)
    found = graph.score_entropy(log_score, sigma, jnp.asarray(x), jnp.asarray(x0))
    np.testing.assert_allclose(found, loss, rtol=1e-4, atol=1e-6)
    ratio, now = alpha / alpha_s, np.eye(n)[x]
    posterior = n * alpha * theta * now + (ratio - alpha) * now + (alpha_s - alpha) * theta
    posterior = (posterior + (1 - ratio) * (1 - alpha_s) / n) / here_theta
    np.testing.assert_allclose(graph.analytic_probs(jnp.asarray(x), log_score, sigma - earlier), posterior, rtol=1e-4)


@pytest.mark.parametrize("graph", GRAPHS)
def test_steps_do_not_depend_on_the_log_score_at_the_current_token(graph):
    x = jnp.arange(graph.num_states)
    log_score = log_scores(graph, x)
    other = log_score + 7.0 * jnp.eye(graph.num_states)
    for step in (graph.analytic_probs, graph.euler_probs, graph.denoise_probs):
        np.testing.assert_array_equal(step(x, log_score, 0.3), step(x, other, 0.3))
