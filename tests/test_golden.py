"""Numbers of the PyTorch implementation (tests/golden/README.md), from its weights through `interop`."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from sedd_jax.errors import InputError
from sedd_jax.interop.official import check_shapes, from_official, to_official
from sedd_jax.noise import Geometric, LogLinear
from sedd_jax.rates import Absorbing, Uniform
from sedd_jax.score_entropy import Noised, denoising_loss
from sedd_jax.training.state import make_optimizer
from sedd_jax.training.step import ema_decay
from sedd_jax.transformer import Transformer

FOLDER = pathlib.Path(__file__).parent / "golden"
KINDS = {"absorb": (Absorbing(50), LogLinear()), "uniform": (Uniform(50), Geometric())}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def under(figures, prefix):
    return {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}


def thin(value):
    """The entries that the files keep of a large tensor."""
    flat = value.ravel()
    return flat[:: max(1, len(flat) // 64)][:64]


@pytest.fixture(scope="module", params=KINDS)
def golden(request):
    graph, noise = KINDS[request.param]
    figures = load(f"model_{request.param}")
    model = Transformer(
        num_states=graph.num_states,
        num_layers=2,
        dim=64,
        num_heads=4,
        cond_dim=32,
        scale_by_sigma=request.param == "absorb",
    )
    params = jax.tree.map(jnp.asarray, from_official(under(figures, "param/")))
    return graph, noise, figures, model, params


def loss_fn(golden):
    graph, _, figures, model, _ = golden
    noised = Noised(*(jnp.asarray(figures[name]) for name in ("x", "sigma", "dsigma")))
    x0 = jnp.asarray(figures["x0"])
    return lambda params: denoising_loss(lambda x, s: model.apply({"params": params}, x, s), graph, noised, x0)


def test_schedules():
    figures = load("noise")
    t = jnp.asarray(figures["t"])
    for name, noise in {"loglinear": LogLinear(), "geometric": Geometric()}.items():
        np.testing.assert_allclose(noise.total(t), figures[f"{name}_sigma"], rtol=2e-5)
        np.testing.assert_allclose(noise.rate(t), figures[f"{name}_dsigma"], rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_score_entropy_and_reverse_rate(kind):
    graph, figures = KINDS[kind][0], load(f"graph_{kind}")
    x, x0, log_score = (jnp.asarray(figures[name]) for name in ("x", "x0", "log_score"))
    found = graph.score_entropy(log_score, jnp.asarray(figures["sigma"])[:, None], x, x0)
    np.testing.assert_allclose(found, figures["entropy_f64"], rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(graph.reverse_rate(x, log_score), figures["reverse_rate"], rtol=2e-5)


def test_log_scores(golden):
    _, _, figures, model, params = golden
    log_score = jax.jit(model.apply)({"params": params}, figures["x"][:2], figures["sigma"][:2])
    np.testing.assert_allclose(log_score, figures["log_score"], atol=1e-5)


def test_loss_and_gradients(golden):
    _, _, figures, _, params = golden
    loss = np.asarray(jax.jit(loss_fn(golden))(params))
    # The reference's uniform loss is off in float32 where sigma is small (up to 4 % here); its gradients are not.
    small = figures["sigma"] < 0.1
    np.testing.assert_allclose(loss[~small], figures["loss"][~small], rtol=2e-5)
    np.testing.assert_allclose(loss[small], figures["loss"][small], rtol=0.05)
    grads = to_official(jax.jit(jax.grad(lambda params: loss_fn(golden)(params).mean()))(params))
    for name, expected in under(figures, "grad/").items():
        norm = figures[f"norm/{name}"]
        np.testing.assert_allclose(np.linalg.norm(grads[name]), norm, rtol=1e-4)
        error = np.linalg.norm(thin(grads[name]) - expected)
        assert error <= 1e-4 * max(np.linalg.norm(expected), norm * (len(expected) / grads[name].size) ** 0.5), name


def test_five_optimiser_steps_with_averaged_weights(golden):
    _, _, figures, _, params = golden
    optimizer = make_optimizer(warmup_steps=3)
    opt_state, ema = optimizer.init(params), params
    value_and_grad = jax.jit(jax.value_and_grad(lambda params: loss_fn(golden)(params).mean()))
    update = jax.jit(optimizer.update)
    for i in range(5):
        loss, grads = value_and_grad(params)
        # The uniform loss carries the reference's float32 error, 0.2 % of the mean.
        np.testing.assert_allclose(loss, figures["train5/loss"][i], rtol=2e-5 if golden[0].num_states == 51 else 3e-3)
        np.testing.assert_allclose(optax.tree.norm(grads), figures["train5/grad_norm_preclip"][i], rtol=2e-5)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        keep = ema_decay(0.9999, i + 1)
        ema = jax.tree.map(lambda average, new, keep=keep: new + keep * (average - new), ema, params)
    for kind, tree in {"param": params, "ema": ema}.items():
        for name, value in to_official(tree).items():
            # 5 steps of at most 3e-4: an Adam step's own rounding where a gradient is near zero is a part of that.
            np.testing.assert_allclose(thin(value), figures[f"train5/{kind}/{name}"], atol=1.5e-5, err_msg=name)


@pytest.mark.parametrize("step", "abc")
def test_sampler_probabilities(golden, step):
    graph, noise, figures, _, _ = golden
    names = ("x", "t", "dt", "score", "euler_probs", "analytic_probs", "denoise_probs")
    x, t, dt, score, euler, analytic, denoise = (jnp.asarray(figures[f"step_{step}/{name}"]) for name in names)
    found = {
        "euler": (graph.euler_probs(x, jnp.log(score), dt * noise.rate(t)), euler),
        "analytic": (graph.analytic_probs(x, jnp.log(score), noise.total(t) - noise.total(t - dt)), analytic),
        "denoise": (graph.denoise_probs(x, jnp.log(score), noise.total(t)), denoise),
    }
    for name, (probs, expected) in found.items():
        # Before the clip, sums over the vocabulary exceed 1 at noise levels where random scores make no sense.
        scale = np.maximum(1, np.abs(expected).max())
        np.testing.assert_allclose(probs, expected, atol=1e-5 * scale, err_msg=name)


def test_weights_there_and_back_are_bit_exact(golden):
    weights = under(golden[2], "param/")
    back = to_official(from_official(weights))
    assert back.keys() == weights.keys()
    assert all(back[name].tobytes() == weights[name].tobytes() for name in weights)


def test_foreign_weights_are_refused(golden):
    graph, _, figures, _, _ = golden
    weights, model = under(figures, "param/"), {"num_layers": 2, "dim": 64, "num_heads": 4, "cond_dim": 32}
    check = partial(check_shapes, config=ConfigDict({"model": model}), num_states=graph.num_states)
    check(weights)
    with pytest.raises(InputError, match="norm_final"):
        check({name: value for name, value in weights.items() if "norm_final" not in name})
    with pytest.raises(InputError, match="extra"):
        check(weights | {"extra": np.zeros(1)})
