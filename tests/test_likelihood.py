"""The bound with true scores is -log p(x0), for every x0; and what it may not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import toy

from sedd_jax import likelihood
from sedd_jax.devices.sharding import make_mesh, map_batches
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.noise import Geometric, LogLinear
from sedd_jax.rates import Absorbing, Uniform
from sedd_jax.score_entropy import ScoreEntropy, denoising_loss, diffuse

GRAPHS = [Absorbing(toy.V), Uniform(toy.V)]
P0 = toy.data_distribution()
SEQUENCES = jnp.asarray(toy.sequences(toy.V), jnp.int32)


@pytest.mark.parametrize(("graph", "estimator"), [(GRAPHS[0], "count"), (GRAPHS[0], "time"), (GRAPHS[1], "auto")])
@pytest.mark.parametrize(
    "noise",
    [LogLinear(1e-6), Geometric(1e-4, 20.0), Geometric(1e-4, 100.0)],
    ids=["loglinear", "geometric", "strong"],
)
def test_bound_with_exact_scores_is_the_log_probability_of_every_sequence(graph, estimator, noise):
    score_fn = toy.exact_score_fn(graph, P0)
    options = {"num_times": 4096, "estimator": estimator}
    run = jax.jit(lambda key, x, i: likelihood.bound(key, score_fn, graph, noise, x, first_index=i, **options))
    repeats = 8
    bounds = [run(jax.random.key(0), SEQUENCES, i * len(P0)) for i in range(repeats)]
    totals = np.stack([b.total for b in bounds]).astype(np.float64)
    # Prior and base distribution differ from the truth by what is left of the data at t = 1: below 1e-5 here.
    error = np.abs(totals.mean(0) + np.log(P0))
    stderr = np.sqrt(np.mean([np.square(b.stderr) for b in bounds], axis=0) / repeats)
    assert (error < 4 * stderr + 2e-5).all(), (error, stderr)
    assert (stderr < 0.2).all()
    # The stated standard error covers the spread that repetitions show (stratified times make it err upwards).
    assert (totals.std(0, ddof=1) < 2 * np.sqrt(repeats) * stderr).all()


def test_bound_of_the_plugin_law():
    """With exact predictions that of the exact scores, with wrong ones above -log p in the mean over the data."""
    graph, noise, options = GRAPHS[1], LogLinear(1e-6), {"num_times": 1024}
    fns = toy.exact_score_fn(graph, P0), toy.plugin_score_fn(graph, P0), toy.plugin_score_fn(graph, P0, error=2.0)
    run = jax.jit(lambda: [likelihood.bound(jax.random.key(0), f, graph, noise, SEQUENCES, **options) for f in fns])
    exact, plugin, wrong = run()
    np.testing.assert_allclose(plugin.total, exact.total, rtol=1e-4, atol=1e-5)
    assert P0 @ (wrong.total + np.log(P0)) > 0.1 + 4 * np.sqrt(P0**2 @ wrong.stderr**2)


@pytest.mark.parametrize("graph", GRAPHS)
def test_bound_with_wrong_scores_is_above(graph):
    exact = toy.exact_score_fn(graph, P0)
    wrong = lambda x, sigma: jnp.where(jax.nn.one_hot(x, graph.num_states) == 1, 0, 1.0 + exact(x, sigma))  # noqa: E731
    noise = Geometric(1e-4, 20.0)
    found = jax.jit(lambda: likelihood.bound(jax.random.key(0), wrong, graph, noise, SEQUENCES, num_times=4096))()
    assert (found.total > -np.log(P0) + 3 * found.stderr).all()


def enumerated_bound(score_fn, x, targets, hidden=()):
    """The mean over every number and every set of masked targets, in float64; hidden positions are always masked."""
    graph, sigma, positions = GRAPHS[0], jnp.full(len(x), 0.7), np.arange(x.shape[1])
    total = np.zeros(len(x))
    for k in range(1, len(targets) + 1):
        for chosen in (sets := list(itertools.combinations(targets, k))):
            noised = jnp.where(np.isin(positions, [*chosen, *hidden]), graph.mask, x)
            costs = graph.score_entropy(score_fn(noised, sigma), sigma[:, None], noised, x)
            total += np.expm1(0.7) * np.asarray(costs, np.float64)[:, list(chosen)].sum(-1) / (k * len(sets))
    return total


P3 = toy.data_distribution(length=3)
TRIPLES = jnp.asarray(list(itertools.product(range(toy.V), repeat=3)), jnp.int32)
# (targets, hidden) of three positions.
ROLES = [((0, 1, 2), ()), ((1, 2), ()), ((0,), (1, 2)), ((1,), (2,)), ((2,), ())]


def conditional(targets, hidden):
    """-log p(targets | the others but hidden) of every triple, by enumeration."""
    table = P3.reshape((toy.V,) * 3)
    with_targets = table.sum(hidden, keepdims=True)
    ratio = with_targets / with_targets.sum(targets, keepdims=True)
    return -np.log(np.broadcast_to(ratio, table.shape)).ravel()


def masks(positions):
    return jnp.broadcast_to(jnp.isin(jnp.arange(3), jnp.asarray(positions, jnp.int32)), TRIPLES.shape)


@pytest.mark.parametrize(("targets", "hidden"), ROLES)
def test_bound_by_counts_with_exact_scores_is_the_conditional_probability(targets, hidden):
    """Of every triple, by enumeration of counts and sets; so the chain rule holds. And the estimate agrees."""
    graph, noise = GRAPHS[0], LogLinear(1e-6)
    score_fn = toy.exact_score_fn(graph, P3)
    expected = conditional(targets, hidden)
    np.testing.assert_allclose(enumerated_bound(score_fn, TRIPLES, targets, hidden), expected, atol=3e-6)
    given = masks([i for i in range(3) if i not in targets + hidden])
    roles = {"given": given, "never": masks(hidden)}
    found = jax.jit(
        lambda: likelihood.bound(jax.random.key(0), score_fn, graph, noise, TRIPLES, num_times=2048, **roles)
    )()
    assert (abs(found.total - expected) < 4 * found.stderr + 1e-4).all()
    roles |= {"num_times": 2, "estimator": "orders"}
    weighted = jax.jit(lambda: likelihood.bound(jax.random.key(0), score_fn, graph, noise, TRIPLES, **roles))()
    # With exact scores every order has the same probability.
    np.testing.assert_allclose(weighted.total, expected, atol=1e-4)
    np.testing.assert_allclose(weighted.mean, expected, atol=1e-4)


def test_training_given_tokens_minimises_the_bound_of_the_others():
    """With exact scores its loss is -log p(targets | given) on average, whatever is unknown."""
    objective, score_fn = ScoreEntropy(GRAPHS[0], LogLinear(1e-6)), toy.exact_score_fn(GRAPHS[0], P3)
    repeats = 3000
    x = jnp.tile(TRIPLES, (repeats, 1))

    @jax.jit
    def losses(key, given, never):
        noised = objective.noised(key, x, given, never)
        costs = objective.loss(score_fn(noised.x, noised.sigma), noised.sigma[:, None], noised.x, x)
        return noised, (noised.weight[:, None] * costs * noised.targets).sum(-1)

    for targets, hidden in [((1, 2), ()), ((0,), (1, 2)), ((1,), (2,))]:
        known = [i for i in range(3) if i not in targets + hidden]
        roles = (jnp.tile(masks(positions), (repeats, 1)) for positions in (known, hidden))
        noised, found = losses(jax.random.key(0), *roles)
        assert (noised.x[:, known] == x[:, known]).all() and (noised.x[:, hidden] == toy.V).all()
        found = np.asarray(found, np.float64).reshape(repeats, -1)
        assert (abs(found.mean(0) - conditional(targets, hidden)) < 5 * found.std(0) / repeats**0.5).all()


def wrong_score(x, sigma):
    """Log-scores of a network that depends on the order in which tokens become known."""
    known = jnp.where(x == toy.V, 7, x)
    logits = jnp.sin(known.sum(-1)[:, None, None] * 1.3 + jnp.arange(3)[:, None] * 2.1 + jnp.arange(toy.V) * 0.9)
    log_pi = jax.nn.log_softmax(logits)
    scores = log_pi - jnp.log(jnp.expm1(sigma))[:, None, None]
    return jnp.concatenate([scores, jnp.zeros((*x.shape, 1))], -1)


def test_likelihood_by_orders_lies_between_the_bound_and_the_truth():
    """By enumeration of all orders, and of all tuples of them; the estimates agree."""
    graph, noise, sigma = GRAPHS[0], LogLinear(1e-6), jnp.full(len(TRIPLES), 0.7)
    costs = []
    for order in itertools.permutations(range(3)):
        x, cost = jnp.full_like(TRIPLES, graph.mask), 0.0
        for i in order:
            log_pi = wrong_score(x, sigma)[:, i, : toy.V] + np.log(np.expm1(0.7))
            cost -= np.take_along_axis(np.asarray(log_pi, np.float64), np.asarray(TRIPLES[:, i : i + 1]), -1)[:, 0]
            x = x.at[:, i].set(TRIPLES[:, i])
        costs.append(cost)
    costs = np.stack(costs)
    truth = -np.log(np.exp(-costs).mean(0))
    means = [costs.mean(0)]
    for num in (2, 3):
        tuples = np.stack([costs[list(chosen)] for chosen in itertools.product(range(6), repeat=num)])
        means.append((-np.log(np.exp(-tuples).mean(1))).mean(0))
    assert (means[0] > means[1] - 1e-9).all() and (means[1] > means[2] - 1e-9).all() and (means[2] > truth - 1e-9).all()
    assert (means[0] - truth).max() > 0.01
    np.testing.assert_allclose(enumerated_bound(wrong_score, TRIPLES, (0, 1, 2)), means[0], atol=3e-6)
    repeats = 500
    x = jnp.tile(TRIPLES, (repeats, 1))
    options = {"num_times": 3, "estimator": "orders"}
    found = jax.jit(lambda: likelihood.bound(jax.random.key(1), wrong_score, graph, noise, x, **options))()
    for value, expected in ((found.total, means[2]), (found.mean, means[0])):
        value = np.asarray(value, np.float64).reshape(repeats, -1)
        assert (abs(value.mean(0) - expected) < 4.5 * value.std(0) / repeats**0.5 + 1e-5).all()


def test_conditions_that_a_graph_does_not_have_are_refused():
    run = lambda graph, **options: likelihood.bound(  # noqa: E731
        jax.random.key(0), wrong_score, graph, LogLinear(), TRIPLES, num_times=2, **options
    )
    for options in ({"given": masks([0])}, {"never": masks([0])}, {"estimator": "count"}, {"estimator": "orders"}):
        with pytest.raises(InputError, match="needs the absorbing graph"):
            run(GRAPHS[1], **options)
    with pytest.raises(InputError, match="estimator='time' is of whole sequences"):
        run(GRAPHS[0], estimator="time", given=masks([0]))
    with pytest.raises(InputError, match="'elbo' is unknown"):
        run(GRAPHS[0], estimator="elbo")


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_training_loss_is_the_diffusion_part(graph):
    score_fn, noise = toy.exact_score_fn(graph, P0), LogLinear(1e-3)
    x = jnp.tile(SEQUENCES, (2000, 1))
    loss = lambda: denoising_loss(score_fn, graph, diffuse(jax.random.key(1), graph, noise, x), x)  # noqa: E731
    losses = np.asarray(jax.jit(loss)()).reshape(2000, -1)
    options = {"num_times": 8192, "estimator": "time"}
    exact = jax.jit(lambda: likelihood.bound(jax.random.key(0), score_fn, graph, noise, SEQUENCES, **options))()
    error = np.abs(losses.mean(0) - exact.diffusion)
    assert (error < 4 * (losses.std(0) / 2000**0.5 + exact.stderr)).all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_figures_do_not_depend_on_the_batch_size(graph):
    score_fn, noise = toy.exact_score_fn(graph, P0), Geometric()
    chunks = np.asarray(SEQUENCES)
    run = jax.jit(
        lambda x, i: likelihood.bound(jax.random.key(3), score_fn, graph, noise, x, num_times=8, first_index=i)
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    whole = map_batches(run, chunks, len(chunks), mesh=mesh)
    for batch_size in (1, 2, 4):
        parts = map_batches(run, chunks, batch_size, mesh=mesh)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_figures_of_numbers_that_are_none_are_refused(value):
    with pytest.raises(TrainingError, match="nats of 3 sequences: 1 are NaN or infinite"):
        likelihood.summarise(likelihood.Exact(np.array([1.0, value, 2.0])), length=10, tokens_per_byte=None)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
def test_error_of_neighbours_that_resemble_each_other_is_right(correlation):
    """An AR(1) series, whose mean has a known error."""
    num, repeats, warm = 2000, 100, 100
    noise = np.random.default_rng(0).normal(size=(repeats, num + warm))
    series = scipy.signal.lfilter([1], [1, -correlation], noise)[:, warm:]
    lags = np.arange(1, num)
    variance = (1 + 2 * np.sum((1 - lags / num) * correlation**lags)) / (1 - correlation**2) / num
    plain, found = np.mean([likelihood.standard_errors(row) for row in series], 0) / variance**0.5
    assert found == pytest.approx(1, abs=0.15)
    assert plain == pytest.approx(((1 - correlation) / (1 + correlation)) ** 0.5, abs=0.03)


def test_summary_is_consistent():
    bounds = likelihood.Bound(*(np.array(part, np.float32) for part in ([1, 1], [20, 30], [2, 2], [0.1, 0.1])))
    summary = likelihood.summarise(bounds, length=10, tokens_per_byte=0.25)
    assert summary["nats_per_token"] == pytest.approx(2.8)
    assert summary["nats_per_token_stderr"] == summary["nats_per_token_stderr_plain"] == pytest.approx(0.5)
    assert summary["monte_carlo_nats_per_token_stderr"] == pytest.approx(0.01 / 2**0.5)
    assert summary["bits_per_byte"] == pytest.approx(2.8 / np.log(2) / 4)
    assert summary["perplexity"] == pytest.approx(np.exp(2.8))
    parts = [summary[f"{part}_nats_per_token"] for part in ("prior", "diffusion", "reconstruction")]
    assert sum(parts) == pytest.approx(summary["nats_per_token"])
    assert "bits_per_byte" not in likelihood.summarise(bounds, length=10, tokens_per_byte=None)
