"""The bound with true scores is -log p(x0), for every x0; and what it may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sedd_jax import likelihood
from sedd_jax.devices.sharding import map_batches
from sedd_jax.errors import TrainingError
from sedd_jax.noise import Geometric, LogLinear
from sedd_jax.rates import Absorbing, Uniform
from sedd_jax.score_entropy import dwdse

GRAPHS = [Absorbing(toy.V), Uniform(toy.V)]
P0 = toy.data_distribution()
SEQUENCES = jnp.asarray(toy.sequences(toy.V), jnp.int32)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    "noise",
    [LogLinear(1e-6), Geometric(1e-4, 20.0), Geometric(1e-4, 100.0)],
    ids=["loglinear", "geometric", "strong"],
)
def test_bound_with_exact_scores_is_the_log_probability_of_every_sequence(graph, noise):
    score_fn = toy.exact_score_fn(graph, P0)
    run = jax.jit(lambda key, x, i: likelihood.bound(key, score_fn, graph, noise, x, num_times=4096, first_index=i))
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


@pytest.mark.parametrize("graph", GRAPHS)
def test_bound_with_wrong_scores_is_above(graph):
    exact = toy.exact_score_fn(graph, P0)
    wrong = lambda x, sigma: jnp.where(jax.nn.one_hot(x, graph.num_states) == 1, 0, 1.0 + exact(x, sigma))  # noqa: E731
    noise = Geometric(1e-4, 20.0)
    found = jax.jit(lambda: likelihood.bound(jax.random.key(0), wrong, graph, noise, SEQUENCES, num_times=4096))()
    assert (found.total > -np.log(P0) + 3 * found.stderr).all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_training_loss_is_the_diffusion_part(graph):
    score_fn, noise = toy.exact_score_fn(graph, P0), LogLinear(1e-3)
    x = jnp.tile(SEQUENCES, (2000, 1))
    losses = np.asarray(jax.jit(lambda: dwdse(jax.random.key(1), score_fn, graph, noise, x))()).reshape(2000, -1)
    exact = jax.jit(lambda: likelihood.bound(jax.random.key(0), score_fn, graph, noise, SEQUENCES, num_times=8192))()
    error = np.abs(losses.mean(0) - exact.diffusion)
    assert (error < 4 * (losses.std(0) / 2000**0.5 + exact.stderr)).all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_figures_do_not_depend_on_the_batch_size(graph):
    score_fn, noise = toy.exact_score_fn(graph, P0), Geometric()
    chunks = np.asarray(SEQUENCES)
    run = jax.jit(
        lambda x, i: likelihood.bound(jax.random.key(3), score_fn, graph, noise, x, num_times=8, first_index=i)
    )
    whole = map_batches(run, chunks, len(chunks))
    for batch_size in (1, 2, 4):
        parts = map_batches(run, chunks, batch_size)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_figures_of_numbers_that_are_none_are_refused(value):
    with pytest.raises(TrainingError, match="nats of 3 sequences: 1 are NaN or infinite"):
        likelihood.summarise(likelihood.Exact(np.array([1.0, value, 2.0])), length=10, tokens_per_byte=None)


def test_summary_is_consistent():
    bounds = likelihood.Bound(*(np.array(part, np.float32) for part in ([1, 1], [20, 30], [2, 2], [0.1, 0.1])))
    summary = likelihood.summarise(bounds, length=10, tokens_per_byte=0.25)
    assert summary["nats_per_token"] == pytest.approx(2.8)
    assert summary["nats_per_token_stderr"] == pytest.approx(0.5)
    assert summary["bits_per_byte"] == pytest.approx(2.8 / np.log(2) / 4)
    assert summary["perplexity"] == pytest.approx(np.exp(2.8))
    parts = [summary[f"{part}_nats_per_token"] for part in ("prior", "diffusion", "reconstruction")]
    assert sum(parts) == pytest.approx(summary["nats_per_token"])
    assert "bits_per_byte" not in likelihood.summarise(bounds, length=10, tokens_per_byte=None)
