"""The AR baseline: causality, normalisation, samples that follow the likelihood, training and resuming."""

import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from etils import epath
from jax.sharding import AxisType
from running import losses, metrics, run, saved_states, train_here, write_text

from sedd_jax import autoregressive
from sedd_jax.config import build
from sedd_jax.data import dataset
from sedd_jax.data.packing import chunks
from sedd_jax.devices import sharding
from sedd_jax.errors import InputError
from sedd_jax.sampling.sampler import Truncation
from sedd_jax.score_entropy import loss_and_grads
from sedd_jax.training.flops import train_flops_per_token
from sedd_jax.training.state import init_state, make_optimizer
from sedd_jax.training.step import make_train_step
from sedd_jax.training.trained import load_trained
from sedd_jax.transformer import Transformer

V, LENGTH = 3, 4
TINY = {"num_layers": 2, "dim": 32, "num_heads": 4, "causal": True}
# All sequences of LENGTH tokens.
EVERY = jnp.asarray(list(itertools.product(range(V), repeat=LENGTH)))


def make_params(model):
    """Random everywhere: the zero-initialised head would make every distribution flat."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), EVERY[:1], jnp.ones(1)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


MODEL = Transformer(num_states=V, **TINY)
PARAMS = make_params(MODEL)


@jax.jit
def logits_of(tokens):
    return MODEL.apply({"params": PARAMS}, tokens, jnp.zeros(len(tokens)))


def log_probs_of(tokens):
    return jax.nn.log_softmax(logits_of(tokens))


def nats(tokens):
    return np.asarray(autoregressive.cross_entropy(logits_of(tokens), tokens).sum(-1), np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_position_depends_on_tokens_at_or_after_it(dtype):
    model = Transformer(num_states=11, **TINY, dtype=dtype)
    params = make_params(model)
    tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, 11)
    run = jax.jit(lambda tokens: model.apply({"params": params}, tokens, jnp.zeros(2)))
    base = run(tokens)
    for changed in range(16):
        moved = run(tokens.at[:, changed].set((tokens[:, changed] + 1) % 11))
        assert (moved[:, : changed + 1] == base[:, : changed + 1]).all()
        assert (jnp.abs(moved[:, changed + 1 :] - base[:, changed + 1 :]).max((0, 2)) > 1e-3).all()


def test_each_conditional_and_the_joint_sum_to_one():
    log_probs = log_probs_of(EVERY)
    assert log_probs.shape == (V**LENGTH, LENGTH, V) and log_probs.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-6)
    # Each of the sums of LENGTH terms of order 1 nat is off by a few roundings of 2^-24.
    assert np.exp(-nats(EVERY)).sum() == pytest.approx(1, abs=1e-5)
    assert nats(EVERY).std() > 0.1


def test_the_noise_level_is_ignored_and_has_no_parameters():
    tokens = EVERY[:5]
    other = MODEL.apply({"params": PARAMS}, tokens, jnp.full(5, 7.0))
    assert (other == MODEL.apply({"params": PARAMS}, tokens, jnp.zeros(5))).all()
    assert PARAMS.keys() == {"embedding", "blocks", "norm", "head"}
    small = Transformer(num_states=50_257, causal=True)
    shapes = jax.eval_shape(small.init, jax.random.key(0), EVERY[:1], jnp.ones(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 162_244_945
    assert train_flops_per_token(small, 1024) < train_flops_per_token(small.clone(causal=False), 1024)


def test_cached_steps_equal_the_full_forward_pass():
    step = jax.jit(lambda *args: MODEL.apply({"params": PARAMS}, *args, method="next_logits"))
    cache = MODEL.empty_cache(len(EVERY), LENGTH)
    whole = logits_of(EVERY)
    for position in range(LENGTH):
        previous = EVERY[:, position - 1]
        logits, cache = step(previous, jnp.asarray(position), cache)
        np.testing.assert_allclose(logits, whole[:, position], atol=2e-5)


def draw(num, given=None, values=None, first_index=0, **options):
    shape = (num, LENGTH)
    clamp = (jnp.zeros(shape, bool) if given is None else given, jnp.zeros(shape, int) if values is None else values)
    step = lambda *args: MODEL.apply({"params": PARAMS}, *args, method="next_logits")  # noqa: E731
    truncation = Truncation(**options)

    @jax.jit
    def run(key):
        cache = MODEL.empty_cache(*shape)
        return autoregressive.simulate(key, step, cache, clamp, truncation=truncation, first_index=first_index).tokens

    return np.asarray(run(jax.random.key(3)))


def test_logits_that_are_none_are_known_by_their_position():
    step = lambda previous, position, cache: (jnp.where(position < 2, jnp.zeros((3, V)), jnp.nan), cache)  # noqa: E731
    clamp = jnp.zeros((3, 5), bool), jnp.zeros((3, 5), int)
    found = jax.jit(lambda: autoregressive.simulate(jax.random.key(0), step, (), clamp, truncation=Truncation()))()
    assert found.failed == 3 and (found.tokens >= 0).all() and (found.tokens < V).all()


def counts(tokens):
    return np.bincount(tokens @ V ** np.arange(LENGTH)[::-1], minlength=V**LENGTH)


def test_samples_follow_the_likelihood():
    expected = np.exp(-nats(EVERY))
    observed = counts(draw(20_000))
    assert scipy.stats.chisquare(observed, 20_000 * expected / expected.sum()).pvalue > 1e-4


def test_samples_follow_the_conditional_likelihood_of_a_prefix():
    given = jnp.tile(jnp.arange(LENGTH) < 2, (20_000, 1))
    values = jnp.tile(jnp.array([2, 1, 0, 0]), (20_000, 1))
    observed = counts(draw(20_000, given, values))
    fits = np.asarray((EVERY[:, 0] == 2) & (EVERY[:, 1] == 1))
    assert observed[~fits].sum() == 0
    expected = np.exp(-nats(EVERY))[fits]
    assert scipy.stats.chisquare(observed[fits], 20_000 * expected / expected.sum()).pvalue > 1e-4


def test_slices_of_a_batch_are_slices_of_its_samples():
    np.testing.assert_array_equal(draw(8)[5:], draw(3, first_index=5))


def test_temperature_sharpens_by_its_power():
    log_probs = log_probs_of(EVERY) / 0.5
    conditionals = jax.nn.log_softmax(log_probs)
    at_token = jnp.take_along_axis(conditionals, EVERY[..., None], -1)[..., 0].sum(-1)
    expected = np.exp(np.asarray(at_token, np.float64))
    observed = counts(draw(20_000, temperature=0.5))
    assert scipy.stats.chisquare(observed, 20_000 * expected / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.81, [0, 1, 3]), (0.93, [0, 1, 2, 3]), (1.0, range(5))]
)
def test_top_p_keeps_the_fewest_tokens_with_enough_mass(top_p, kept):
    probs = jnp.array([0.125, 0.5, 0.0625, 0.25, 0.0625 - 1e-3])
    found = np.exp(Truncation(top_p=top_p).log_probs(jnp.log(probs)))
    np.testing.assert_array_equal(np.flatnonzero(found), kept)
    kept = np.array(kept)
    np.testing.assert_allclose(found[kept], probs[kept] / probs[kept].sum(), rtol=1e-5)


def test_a_small_top_p_gives_the_most_likely_token():
    tokens = draw(2, top_p=1e-6)
    best = np.asarray(logits_of(jnp.asarray(tokens)).argmax(-1))
    np.testing.assert_array_equal(tokens, best)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_options_out_of_range_are_refused(options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(InputError, match=f"{name}={value}"):
        draw(1, **options)


def test_loss_in_chunks_is_the_exact_likelihood():
    objective = autoregressive.CrossEntropy()
    noised = objective.noised(jax.random.key(0), EVERY)
    features = MODEL.apply({"params": PARAMS}, EVERY, noised.sigma, method="features")
    head = lambda params, *rows: MODEL.apply({"params": {"head": params}}, *rows, method="log_score")  # noqa: E731
    run = jax.jit(lambda head_params: loss_and_grads(head, objective, head_params, features, noised, EVERY, rows=50))
    loss, (d_head, _) = run(PARAMS["head"])
    assert loss == pytest.approx(nats(EVERY).sum(), rel=1e-5)

    def plain(params):
        return autoregressive.cross_entropy(head(params, features, EVERY, noised.sigma), EVERY).sum()

    for found, expected in zip(*map(jax.tree.leaves, (d_head, jax.grad(plain)(PARAMS["head"]))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_any_mesh_trains_as_one_device():
    def three_losses(shape):
        mesh = jax.make_mesh(
            shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(shape)]
        )
        optimizer = make_optimizer(warmup_steps=2)
        with jax.set_mesh(mesh):
            state = init_state(jax.random.key(0), MODEL, optimizer, mesh)
            step = make_train_step(MODEL, autoregressive.CrossEntropy(), optimizer, mesh, decay=0.9)
            values = []
            for _ in range(3):
                tokens = sharding.place_batch(np.asarray(EVERY[:16], np.int32), mesh)
                state, figures = step(state, jax.random.key(1), tokens)
                values.append(float(figures["loss"]))
        return values

    one = three_losses((1, 1, 1))
    assert one[0] == pytest.approx(np.log(V), rel=1e-6) and one[2] < one[0]
    np.testing.assert_allclose(three_losses((2, 2, 2)), one, rtol=1e-5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return {"data__source": str(write_text(tmp_path_factory.mktemp("text") / "text.txt")), "objective": "ar"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("ar") / "run"
    train_here(folder, **source, train__steps=4, train__checkpoint_every=1)
    return folder


def test_resumed_is_uninterrupted(workdir, source, tmp_path):
    for steps in (1, 4):
        train_here(tmp_path, **source, train__steps=steps, train__checkpoint_every=1)
    assert saved_states(tmp_path) == saved_states(workdir)
    assert losses(tmp_path) == losses(workdir)


def test_the_run_reports_exact_figures_and_samples(workdir):
    last = metrics(workdir)[-1]
    assert last["eval_perplexity"] == pytest.approx(2 ** last["eval_bits_per_token"])
    assert "eval_diffusion_nats_per_token" not in last
    assert (workdir / "samples" / "4.txt").read_text().count("=== sample") == 2


def test_evaluate_gives_the_exact_likelihood(workdir):
    out, _ = run("evaluate", f"--workdir={workdir}", "--num_sequences=7")
    found = json.loads(out.splitlines()[-1])
    assert found["num_times"] is None and not any(name.startswith("prior") for name in found)
    trained = load_trained(epath.Path(workdir), log=pytest.fail)
    data = build(dataset.load, "data", trained.config, directory=workdir)
    rows, _ = chunks(data.valid, data.length, limit=7)
    model = trained.experiment.model
    logits = model.apply({"params": trained.params}, jnp.asarray(rows), jnp.zeros(7))
    at_token = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits), np.float64), rows[:, :, None], -1)
    each = -at_token[..., 0].mean(1)
    assert found["nats_per_token"] == pytest.approx(each.mean(), rel=1e-5)
    text = b"".join(data.tokenizer.pieces[token] for token in rows.ravel())
    # 1e-2: the sequences differ little, so their spread is a small difference of what is rounded to 1e-7.
    assert found["nats_per_token_stderr"] == pytest.approx(each.std(ddof=1) / 7**0.5, rel=1e-2)
    assert found["bits_per_byte"] == pytest.approx(each.mean() / np.log(2) * rows.size / len(text), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(each.mean()), rel=1e-4)
    assert found["bits_per_byte_stderr"] > 0 and found["perplexity_stderr"] > 0


def test_sample_continues_a_prefix_and_writes_a_file(workdir, tmp_path):
    file = tmp_path / "samples.jsonl"
    given = ("--num=3", "--prefix=Once upon é", "--temperature=0.9", "--top_p=0.8", f"--output={file}")
    out, _ = run("sample", f"--workdir={workdir}", *given)
    found = json.loads(out.splitlines()[-1])
    assert found["network_evaluations"] == 32 and found["tokens_per_second"] > 0
    assert len(found["samples"]) == 3 and all(text.startswith("Once upon é") for text in found["samples"])
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == found["samples"]


def test_flags_of_diffusion_models_are_refused(workdir):
    _, err = run("sample", f"--workdir={workdir}", "--num=1", "--template=[[3]] and", expect=2)
    assert "--template does not apply" in err.splitlines()[-1]


def test_another_objective_is_another_experiment(workdir, source):
    with pytest.raises(InputError, match="objective is 'ar' there and 'sedd' here"):
        train_here(workdir, **source | {"objective": "sedd"})
    with pytest.raises(InputError, match="objective='gan' is unknown"):
        train_here(workdir.parent / "new", **source | {"objective": "gan"})
    assert not (workdir.parent / "new").exists()
