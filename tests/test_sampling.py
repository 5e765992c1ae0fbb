"""With true scores the samplers reproduce the distribution; given positions stay; one compilation is enough."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy
from etils import epath
from running import train_here, write_text

from sedd_jax import sampling
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.network import as_network, guided
from sedd_jax.noise import Geometric, LogLinear
from sedd_jax.rates import Absorbing, Uniform
from sedd_jax.sampling.sampler import Truncation
from sedd_jax.training.trained import load_trained

P0 = toy.data_distribution()
CASES = {
    "absorbing": (Absorbing(toy.V), LogLinear(1e-6)),
    "absorbing-geometric": (Absorbing(toy.V), Geometric(1e-4, 20.0)),
    "uniform": (Uniform(toy.V), Geometric(1e-4, 20.0)),
    # Levels at which e^sigma is infinite in float32.
    "absorbing-strong": (Absorbing(toy.V), Geometric(1e-4, 100.0)),
    "uniform-strong": (Uniform(toy.V), Geometric(1e-4, 100.0)),
}
DRAWS = 8000


def frequencies(case, steps, method, clamp=None, seed=0, draws=DRAWS, score_fn_of=toy.exact_score_fn, **options):
    graph, noise = CASES[case]
    score_fn = score_fn_of(graph, P0)
    sampler = sampling.Sampler(method=method, rows=10**6, **options)
    run = jax.jit(
        lambda key, steps: sampling.simulate(
            key, score_fn, graph, noise, (draws, toy.L), steps=steps, sampler=sampler, clamp=clamp
        )
    )
    counts = []
    for number in np.atleast_1d(steps):
        tokens = run(jax.random.key(seed), int(number)).tokens
        assert tokens.dtype == jnp.int32 and ((tokens >= 0) & (tokens < toy.V)).all()
        counts.append(np.bincount(toy.number(np.asarray(tokens), toy.V), minlength=len(P0)))
    assert run._cache_size() == 1  # another number of steps does not compile again
    return counts[0] if np.isscalar(steps) else np.stack(counts)


def fits(observed, expected=P0):
    return scipy.stats.chisquare(observed, observed.sum() * expected, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(
    ("case", "method", "steps", "options"),
    [
        ("absorbing", "analytic", 128, {}),
        ("absorbing", "analytic", 128, {"grid": "cosine"}),
        ("absorbing-geometric", "euler", 128, {}),
        ("uniform", "analytic", 128, {}),
        ("uniform", "euler", 128, {}),
        ("uniform", "analytic", 128, {"score_fn_of": toy.plugin_score_fn}),
        # Second order: the bias is far below what the test sees after fewer steps.
        ("absorbing", "trapezoidal", 32, {}),
        ("uniform", "trapezoidal", 64, {}),
        # No time grid, so no bias: as many calls as there are positions are exact.
        ("absorbing", "first_hitting", toy.L, {}),
        ("absorbing-geometric", "first_hitting", 100, {}),
        ("absorbing-strong", "analytic", 160, {}),
        ("absorbing-strong", "trapezoidal", 64, {}),
        ("absorbing-strong", "first_hitting", toy.L, {}),
        ("uniform-strong", "analytic", 160, {}),
        ("uniform-strong", "trapezoidal", 96, {}),
        ("absorbing", "analytic", 64, {"corrector_steps": 1}),
        ("uniform", "analytic", 64, {"corrector_steps": 1}),
    ],
)
def test_samples_follow_the_data_distribution(case, method, steps, options):
    # n first-order steps leave a bias of order 1/n of each probability, below the 1/sqrt(DRAWS p) that the test sees.
    assert fits(frequencies(case, steps, method, **options))


LARGER = toy.data_distribution(vocab_size=4, length=4)


DRAWS_OF_LARGER = 50_000
# Their total variation from LARGER if they were exact, known to a tenth of itself: 256 outcomes.
FLOOR = np.sqrt(LARGER / (2 * np.pi * DRAWS_OF_LARGER)).sum()


def distances(case, steps, method):
    """Total variation of samples from LARGER, for each number of steps, in one compilation."""
    graph, noise = type(CASES[case][0])(4), CASES[case][1]
    # XLA folds constants of as many rows.
    score_fn, sampler = toy.exact_score_fn(graph, LARGER), sampling.Sampler(method=method, rows=50_000)
    shape = (DRAWS_OF_LARGER, 4)
    simulate = lambda key, n: sampling.simulate(key, score_fn, graph, noise, shape, steps=n, sampler=sampler)  # noqa: E731
    count = lambda key, n: jnp.bincount(toy.number(simulate(key, n).tokens, 4), length=256)  # noqa: E731
    run = jax.jit(count, compiler_options=toy.OPTIMISED)
    counts = np.stack([run(jax.random.key(0), n) for n in steps])
    return np.abs(counts / DRAWS_OF_LARGER - LARGER).sum(1) / 2


@pytest.mark.parametrize("case", ["absorbing-geometric", "uniform"])
def test_errors_fall_with_the_order_of_the_method(case):
    """A first-order method halves its error at twice the steps; the trapezoidal one has less for the same calls.

    `benchmarks.orders` shows more steps and more draws.
    """
    # Errors and noise are independent, so their squares add up; what exceeds the floor is the error.
    error = lambda *args: np.sqrt(np.maximum(distances(case, *args) ** 2 - FLOOR**2, 0))  # noqa: E731
    first, second = error((8, 16), "analytic"), error((8,), "trapezoidal")
    assert first[1] == pytest.approx(first[0] / 2, rel=0.3)
    assert second[0] < 0.95 * first[1]


def test_first_hitting_is_exact_with_a_call_per_position():
    (found,) = distances("absorbing", (4,), "first_hitting")
    assert found == pytest.approx(FLOOR, rel=0.2)


THREE = toy.data_distribution(vocab_size=toy.V, length=3)


def ordered_law(uncertainty, count):
    """What ordered unmasking of THREE draws from with exact predictions; on texts from THREE its mean calls, and the
    mean of what is left of a call's entropies without the largest, summed over calls.

    uncertainty: of a prediction [V]. count: entropies, the most certain position first -> how many a call fills.
    """
    joint, texts = THREE.reshape((toy.V,) * 3), list(itertools.product(range(toy.V), repeat=3))
    states, law, calls, spent = {(None,) * 3: 1.0}, dict.fromkeys(texts, 0.0), 0.0, 0.0
    while states:
        state, share = states.popitem()
        known = joint[tuple(slice(None) if token is None else slice(token, token + 1) for token in state)]
        calls += known.sum()
        masked = [i for i in range(3) if state[i] is None]
        predicted = {i: np.moveaxis(known, i, 0).reshape(toy.V, -1).sum(1) / known.sum() for i in masked}
        order = sorted(masked, key=lambda i: uncertainty(predicted[i]))  # noqa: B023
        entropies = [scipy.stats.entropy(predicted[i]) for i in order]
        kept = order[: count(entropies)]
        spent += known.sum() * (sum(entropies[: len(kept)]) - max(entropies[: len(kept)]))
        for tokens in itertools.product(range(toy.V), repeat=len(kept)):
            filled = dict(zip(kept, tokens, strict=True))
            new = tuple(filled.get(i, token) for i, token in enumerate(state))
            new_share = share * np.prod([predicted[i][token] for i, token in filled.items()])
            into = states if None in new else law
            into[new] = into.get(new, 0.0) + new_share
    return np.array([law[text] for text in texts]), calls, spent


BUDGET = 0.9


@pytest.mark.parametrize(
    ("method", "uncertainty", "counts"),
    [
        ("confidence", lambda p: -p.max(), {3: lambda h: 1, 2: lambda h: 2}),
        ("entropy", scipy.stats.entropy, {3: lambda h: 1 + sum(np.cumsum(h) <= BUDGET)}),
    ],
)
def test_ordered_unmasking_follows_its_law(method, uncertainty, counts):
    """One position per call is exact. A call that fills n positions with predictions of entropies h loses at most
    sum(h) - max(h) of KL(data || samples), and with 'entropy' that is at most the budget."""
    graph, noise = Absorbing(toy.V), LogLinear(1e-6)
    score_fn = toy.exact_score_fn(graph, THREE)
    sampler = sampling.Sampler(method=method, entropy_budget=BUDGET, rows=10**6)
    run = jax.jit(
        lambda steps: sampling.simulate(
            jax.random.key(0), score_fn, graph, noise, (20_000, 3), steps=steps, sampler=sampler
        )
    )
    for steps, count in counts.items():
        law, calls, spent = ordered_law(uncertainty, count)
        drawn = run(steps)
        assert fits(np.bincount(toy.number(np.asarray(drawn.tokens), toy.V), minlength=27), law)
        divergence = scipy.stats.entropy(THREE, law)
        assert divergence <= spent + 1e-9
        if method == "entropy":
            assert divergence > 0.01 and spent <= BUDGET * calls and calls < 2.6
            np.testing.assert_allclose(np.asarray(drawn.changed).max(1).mean(), calls, rtol=0.02)
        else:
            assert calls == pytest.approx(steps)
            assert divergence == pytest.approx(0, abs=1e-9) if steps == 3 else divergence > 0.01


def test_remasking_takes_the_least_certain_tokens_and_ends_with_the_calls():
    graph, length, steps = Absorbing(5), 9, 4
    logits = 2 * jax.random.normal(jax.random.key(0), (length, 6, 6))
    score_fn = lambda x, sigma: jnp.roll(logits[jnp.arange(length), x], 1, axis=1)  # noqa: E731 (of the neighbour)
    clamp = jnp.arange(length) < jnp.array([[0], [2]] * 8), jnp.full((16, length), 3)
    sampler = sampling.Sampler(method="confidence", remask=2)
    process = sampling.make_process(
        jax.random.key(1), score_fn, graph, LogLinear(), (16, length), steps=steps, sampler=sampler, clamp=clamp
    )
    assert sampling.num_events(process) == steps  # three calls fill 9 positions, and four 7
    advance, states = jax.jit(lambda *args: sampling.advance(process, *args)), [process.start()]
    for number in range(1, steps + 1):
        states.append(advance(states[-1], number))
    free = ~np.asarray(clamp[0])
    again = 0
    for number, (before, after) in enumerate(itertools.pairwise(states), start=1):
        filled = np.asarray(after.x != graph.mask) & free
        assert (filled.sum(1) == np.minimum(number * np.array([3, 2] * 8), free.sum(1))).all()
        assert (np.asarray(after.x)[~free] == 3).all()
        lost = np.asarray(before.x != graph.mask) & free & ~filled
        again += lost.sum()
        certainty = np.asarray(after.certainty)
        assert all(certainty[i][lost[i]].max(initial=0) <= certainty[i][filled[i]].min() for i in range(16))
    assert again > 0


def test_corrector_steps_reduce_the_error_of_few_steps():
    plain, corrected = (
        np.abs(frequencies("absorbing", 4, "analytic", corrector_steps=n) / DRAWS - P0).sum() / 2 for n in (0, 2)
    )
    assert corrected < 0.75 * plain


def test_first_hitting_shares_the_positions_out_over_fewer_calls():
    """In a single call, each position follows its marginal, independently of the other."""
    observed = frequencies("absorbing", 1, "first_hitting")
    square = P0.reshape(toy.V, toy.V)
    assert fits(observed, np.outer(square.sum(1), square.sum(0)).ravel())


def test_one_position_is_sampled_exactly_in_a_single_analytic_step():
    """If the other position is given, the samples follow the conditional for any number of steps."""
    given = jnp.full(DRAWS, 1)
    clamp = (jnp.array([[True, False]] * DRAWS), jnp.stack([given, given], axis=1))
    conditional = P0.reshape(toy.V, toy.V)[1] / P0.reshape(toy.V, toy.V)[1].sum()
    for observed in frequencies("absorbing", [1, 4], "analytic", clamp).reshape(2, toy.V, toy.V):
        assert observed[0].sum() == observed[2].sum() == 0
        assert fits(observed[1], conditional)


def test_guided_samples_of_one_position_follow_the_tilted_law():
    """p(x | label)^g p(x)^(1 - g), which with g = 1 is p(x | label)."""
    (graph, noise), classes = CASES["absorbing"], np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    mean = classes.mean(0)
    one, other = (as_network(toy.exact_score_fn(graph, p)) for p in (classes[0], mean))

    @jax.jit
    def run(key, weight):
        return sampling.simulate(key, guided(one, other, weight), graph, noise, (DRAWS, 1), steps=3).tokens

    for weight in (1.0, 0.0, 2.5, -0.5):
        tilted = classes[0] ** weight * mean ** (1 - weight)
        counts = np.bincount(np.asarray(run(jax.random.key(0), weight))[:, 0], minlength=3)
        assert fits(counts, tilted / tilted.sum()), (weight, counts)


@pytest.mark.parametrize("case", CASES)
def test_given_positions_are_clean_at_every_network_call_and_at_the_end(case):
    graph, noise = CASES[case]
    seen = []

    def score_fn(x, sigma):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return jnp.zeros((*x.shape, graph.num_states))

    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 7))
    values = jax.random.randint(jax.random.key(1), (3, 7), 0, toy.V)
    sample = jax.jit(
        lambda clamp: sampling.sample(jax.random.key(2), score_fn, graph, noise, (3, 7), steps=5, clamp=clamp)
    )
    tokens = sample((mask, values))
    jax.effects_barrier()
    assert len(seen) == 6
    for x in [*seen, np.asarray(tokens)]:
        assert (x[mask] == np.asarray(values)[mask]).all()


def test_negative_probabilities_are_clipped_and_counted():
    noise = LogLinear()

    @partial(jax.jit, static_argnames=("graph", "top_k"))
    def simulate(height, graph, top_k=0):
        sampler = sampling.Sampler(top_k=top_k)
        score_fn = lambda x, sigma: jnp.where(jnp.arange(5) == x[..., None], 0.0, height)  # noqa: E731
        return sampling.simulate(jax.random.key(0), score_fn, graph, noise, (2, 8), steps=4, sampler=sampler)

    drawn = simulate(30.0, Absorbing(4))
    # Every position leaves MASK in the first step, whose stay probability is far below zero; then nothing moves.
    assert drawn.clipped == pytest.approx(1 / 5)
    assert (drawn.tokens < 4).all()
    assert simulate(-30.0, Absorbing(4)).clipped == 0
    # On the uniform graph narrowing leaves no negative probability; the distribution that it narrows had some.
    assert simulate(30.0, Uniform(5), top_k=2).clipped > 0.5


@pytest.mark.parametrize("method", sampling.METHODS)
def test_scores_that_are_none_are_known_by_the_first_step(method):
    graph, noise = Absorbing(6), LogLinear()

    @jax.jit
    def simulate(level, value):
        def score_fn(x, sigma):
            score = jnp.where(sigma < level, value, -jnp.log(jnp.expm1(sigma)) - np.log(6.0))
            return jnp.where(jnp.arange(7) == x[..., None], 0, score[:, None, None])

        sampler = sampling.Sampler(method=method)
        return sampling.simulate(jax.random.key(0), score_fn, graph, noise, (3, 8), steps=8, sampler=sampler)

    late, never, always = simulate(0.5, np.nan), simulate(-1.0, np.nan), simulate(99.0, np.inf)
    assert never.failed == 0 and always.failed == 1 and late.failed > 1
    assert all((found.tokens >= 0).all() and (found.tokens <= graph.mask).all() for found in (late, never, always))
    sampling.require_sound(never.failed)
    with pytest.raises(TrainingError, match=f"sampling stopped at step {late.failed}: the scores are NaN"):
        sampling.require_sound(jnp.array([0, 99, late.failed]))


@pytest.mark.parametrize("method", sampling.METHODS)
def test_same_key_same_samples_for_any_slices_and_chunks(method):
    graph, noise = CASES["absorbing"]
    score_fn = toy.exact_score_fn(graph, P0)

    @partial(jax.jit, static_argnames=("batch", "rows"))
    def run(batch, first, rows):
        sampler = sampling.Sampler(method=method, rows=rows)
        shape = (batch, toy.L)
        return sampling.simulate(
            jax.random.key(3), score_fn, graph, noise, shape, steps=3, sampler=sampler, first_index=first
        )

    whole = run(6, 0, rows=512)
    parts = [run(2, first, rows=1).tokens for first in (0, 2, 4)]
    assert (np.concatenate(parts) == whole.tokens).all()
    assert (run(6, 6, rows=512).tokens != whole.tokens).any()
    assert (whole.changed >= 1).all() and (whole.changed <= 4).all()
    assert whole.calls == {"trapezoidal": 7, "analytic": 4, "euler": 4}.get(method, 2)


def test_a_timeless_network_is_called_only_when_a_token_has_changed():
    """With the scores of RADD's form, p(x0) / (e^sigma - 1), the cached calls give the samples of the plain ones."""
    graph, noise = CASES["absorbing"]
    logits = jax.random.normal(jax.random.key(0), (toy.V + 1, 5, graph.num_states))

    def features(x, sigma):
        return logits[x[:, 0], jnp.arange(5)[:, None]].swapaxes(0, 1) + x.sum(1)[:, None, None]

    def log_score(head, features, x, sigma):
        log_p = jax.nn.log_softmax(features.at[..., graph.mask].set(-jnp.inf))
        log_p = log_p - jnp.log(jnp.expm1(sigma))[:, None, None]
        return jnp.where(jnp.arange(graph.num_states) == x[..., None], 0, log_p)

    @partial(jax.jit, static_argnames="timeless")
    def run(timeless):
        network = sampling.Network(
            lambda x, s: jnp.take(features(x, s), jnp.arange(5), axis=1), log_score, timeless=timeless
        )
        return sampling.simulate(jax.random.key(1), network, graph, noise, (1, 5), steps=64)

    plain, cached = run(False), run(True)
    assert (plain.tokens == cached.tokens).all()
    assert plain.calls == 65 and 1 <= cached.calls <= 6


def test_truncation_keeps_its_tokens_and_the_total_rate():
    log_score = jnp.log(jnp.array([[[0.5, 0.3, 0.15, 0.05, 1.0]]]))  # the last one is the current token
    x = jnp.array([[4]])
    total = 1.0

    def scores(**options):
        return np.exp(Absorbing(4).narrow(Truncation(**options).log_probs, x, log_score, 1.0)[0])[0, 0]

    assert scores() == pytest.approx([0.5, 0.3, 0.15, 0.05, 1])
    assert scores(top_k=2) == pytest.approx([0.625, 0.375, 0, 0, 1])
    assert scores(top_p=0.8) == pytest.approx([0.625, 0.375, 0, 0, 1])
    assert scores(top_p=0.81) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0, 1])
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    assert scores(temperature=0.5)[:4] == pytest.approx(squares / squares.sum() * total, rel=1e-5)
    assert scores(temperature=0.01, top_k=3) == pytest.approx([1, 0, 0, 0, 1], abs=1e-6)


def test_the_likeliest_token_alone_leaves_the_uniform_graph_where_each_is_that_given_the_other():
    found = frequencies("uniform", 32, "analytic", draws=2000, top_k=1).reshape(toy.V, toy.V)
    square = P0.reshape(toy.V, toy.V)
    assert ((found > 0) == (square == square.max(0)) & (square == square.max(1)[:, None])).all()


def unmasking_rate(precision, steps):
    """The share of positions that have left MASK after `steps` of 1024 steps, relative to its true value.

    The posterior is flat over GPT-2's vocabulary: each token has 1 / 50257 of a small probability to move.
    """
    graph, noise = Absorbing(50_257), LogLinear(1e-6)

    def score_fn(x, sigma):
        return jnp.broadcast_to(
            -jnp.log(50_257.0) - jnp.log(jnp.expm1(sigma))[:, None, None], (*x.shape, graph.num_states)
        )

    process = sampling.make_process(
        jax.random.key(0), score_fn, graph, noise, (16, 16), steps=1024, sampler=sampling.Sampler(precision=precision)
    )
    state = jax.jit(
        lambda state: jax.lax.fori_loop(
            1, steps + 1, lambda number, state: sampling.advance(process, state, number), state
        ),
        compiler_options=toy.OPTIMISED,
    )(process.start())
    return np.mean(state.x != graph.mask) / (steps / 1024)


def test_exact_draws_unmask_at_the_true_rate_and_reference_draws_do_not():
    steps = 32
    exact, reference = unmasking_rate("exact", steps), unmasking_rate("reference", steps)
    error = (1024 / steps / 256) ** 0.5
    assert exact == pytest.approx(1, abs=4 * error)
    assert reference == pytest.approx(0.146, abs=4 * 0.146**0.5 * error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"method": "ddim"}, "'ddim' is unknown"),
        ({"grid": "quadratic"}, "'quadratic' is unknown"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-40}, "temperature=1e-40"),
        ({"temperature": 1e40}, "temperature=1e\\+40"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_p": 1e-50}, "top_p=1e-50"),
        ({"corrector_size": float("nan")}, "corrector_size=nan"),
        ({"steps": 2**31}, "steps=2147483648"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"precision": "float8"}, "'float8' is unknown"),
        ({"corrector_steps": -1}, "corrector_steps=-1"),
        ({"corrector_size": 0.0}, "corrector_size=0.0"),
        ({"method": "first_hitting", "corrector_steps": 1}, "first_hitting"),
        ({"method": "entropy", "corrector_steps": 1}, "'entropy' has no time grid"),
        ({"entropy_budget": -1.0}, "entropy_budget=-1.0"),
        ({"entropy_budget": float("nan")}, "entropy_budget=nan"),
        ({"method": "confidence", "remask": -1}, "remask=-1"),
        ({"method": "entropy", "remask": 1}, "needs method='confidence'"),
    ],
)
def test_bad_options_are_refused(options, message):
    graph, noise = CASES["absorbing"]
    with pytest.raises(InputError, match=message):
        sampling.sample(
            jax.random.key(0), lambda x, s: None, graph, noise, (1, 2), **{"steps": 2, "method": "euler"} | options
        )


@pytest.mark.parametrize("method", ["first_hitting", "confidence", "entropy"])
def test_methods_that_fill_masks_are_refused_where_tokens_change_more_than_once(method):
    graph, noise = CASES["uniform"]
    with pytest.raises(InputError, match=f"'{method}' needs the absorbing graph"):
        sampling.sample(jax.random.key(0), lambda x, s: None, graph, noise, (1, 2), steps=2, method=method)


@pytest.mark.parametrize(
    ("options", "shares"),
    [({"top_p": 1e-30}, [0, 1]), ({"temperature": 1e-30}, [0, 1]), ({"temperature": 1e30}, [0.5, 0.5])],
)
def test_the_most_that_truncation_allows(options, shares):
    log_score = jnp.array([[[-50.0, -49.0, -jnp.inf, 0.0]]])
    found = Absorbing(3).narrow(Truncation(**options).log_probs, jnp.array([[3]]), log_score, 1.0)[0][0, 0]
    np.testing.assert_allclose(np.exp(found), [*np.multiply(shares, np.exp(-49) + np.exp(-50)), 0, 1], rtol=1e-4)


@pytest.mark.parametrize(("graph", "law"), [("absorbing", "mean"), ("uniform", "plugin")])
def test_a_timeless_network_is_trained_and_called_only_when_a_token_has_changed(graph, law, tmp_path):
    text = write_text(tmp_path / "text.txt")
    fields = {"parametrisation": law, "time_conditioning": False, "qkv_bias": True}
    fields = {f"model__{name}": value for name, value in fields.items()}
    final = train_here(tmp_path / "run", data__source=str(text), train__steps=2, graph__kind=graph, **fields)
    assert 0 < final["eval_bits_per_byte"] < 50
    trained = load_trained(epath.Path(tmp_path / "run"), log=pytest.fail)
    sample_fn = trained.experiment.sample_fn(trained.experiment.sampling)
    given = jnp.arange(32) >= 3
    clamp = jnp.tile(given, (2, 1)), jnp.zeros((2, 32), jnp.int32)
    with jax.set_mesh(trained.experiment.mesh):
        drawn = sample_fn(trained.params, jax.random.key(0), clamp, 256, 0)
    # Six holes; on the uniform graph a token may change more than once, and ends change seldom.
    assert drawn.calls <= (6 + 1 if graph == "absorbing" else 128)
    assert (drawn.tokens[:, 3:] == 0).all() and (drawn.tokens < 256).all()
