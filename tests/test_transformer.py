"""The network's published sizes, and what its output may and may not depend on."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.devices import sharding
from sedd_jax.errors import InputError
from sedd_jax.rates import Absorbing
from sedd_jax.transformer import Transformer
from sedd_jax.transformer.attention import rotary
from sedd_jax.transformer.model import sinusoidal

TINY = {"num_states": 11, "num_layers": 2, "dim": 32, "num_heads": 4, "cond_dim": 16}
TOKENS = jax.random.randint(jax.random.key(0), (3, 9), 0, 11)
SIGMA = jnp.array([1e-4, 0.5, 6.0])


@pytest.fixture(scope="module")
def params():
    """Random everywhere: the zero-initialised gates and head would hide what lies behind them."""
    model = Transformer(**TINY)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS, SIGMA))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    draw = np.random.default_rng(1)
    values = [jnp.asarray(0.3 * draw.standard_normal(leaf.shape, np.float32)) for leaf in leaves]
    return jax.tree.unflatten(structure, values)


def apply(params, tokens=TOKENS, sigma=SIGMA, **options):
    return jax.jit(Transformer(**TINY | options).apply)({"params": params}, tokens, sigma)


def trace(params, remat="none"):
    """What `apply` computes, not behind a jit of its own: what its backward pass stores can be seen."""
    return Transformer(**TINY, remat=remat).apply({"params": params}, TOKENS, SIGMA)


@pytest.mark.parametrize(
    ("size", "num_states", "parameters"),
    [
        ({"num_layers": 12, "dim": 768, "num_heads": 12}, 50_258, 169_627_218),
        ({"num_layers": 12, "dim": 768, "num_heads": 12}, 50_257, 169_625_681),
        ({"num_layers": 24, "dim": 1024, "num_heads": 16}, 50_258, 424_477_010),
    ],
    ids=["small-absorbing", "small-uniform", "medium-absorbing"],
)
def test_published_sizes(size, num_states, parameters):
    model = Transformer(num_states=num_states, **size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, SIGMA)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_log_score_is_float32_and_zero_at_the_current_token(params):
    for dtype in ("float32", "bfloat16"):
        log_score = apply(params, dtype=dtype)
        assert log_score.dtype == jnp.float32 and log_score.shape == (3, 9, 11)
        assert (jnp.take_along_axis(log_score, TOKENS[..., None], -1) == 0).all()
        assert jnp.isfinite(log_score).all()


def test_untrained_network_starts_at_the_scale_of_the_absorbing_scores():
    model = Transformer(**TINY)
    log_score = untrained(model)
    expected = -jnp.log(jnp.expm1(SIGMA)) - jnp.log(10.0)
    np.testing.assert_allclose(log_score.min(-1)[0], jnp.minimum(expected[0], 0), rtol=1e-5)
    other = jnp.argmax(jnp.arange(11) != TOKENS[..., None], -1)
    found = jnp.take_along_axis(log_score, other[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, jnp.broadcast_to(expected[:, None], found.shape), rtol=1e-5)
    assert (untrained(model.clone(scale_by_sigma=False)) == 0).all()


def untrained(model):
    return jax.jit(model.apply)(nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS, SIGMA)), TOKENS, SIGMA)


def test_every_position_sees_every_other_and_where_it_stands(params):
    base = apply(params)
    for changed in (0, 8):
        moved = apply(params, TOKENS.at[:, changed].set((TOKENS[:, changed] + 1) % 11))
        assert (jnp.abs(moved - base).max((0, 2)) > 1e-4).all()
    swapped = apply(params, TOKENS[:, ::-1])[:, ::-1]
    assert jnp.abs(swapped - base).max() > 1e-2


def test_sequences_do_not_see_each_other(params):
    alone = apply(params, TOKENS[1:2], SIGMA[1:2])
    np.testing.assert_allclose(alone[0], apply(params)[1], atol=1e-5)


def test_rotary_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    rotated_q, rotated_k = (rotary(jnp.broadcast_to(a, (1, 12, 1, 16)))[0, :, 0] for a in (q, k))
    products = rotated_q @ rotated_k.T
    for distance in range(-5, 6):
        diagonal = jnp.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, jnp.broadcast_to(diagonal[0], diagonal.shape), atol=1e-4)


def test_time_features_are_cosines_then_sines():
    features = sinusoidal(jnp.array([0.3]))
    assert features.shape == (1, 256)
    np.testing.assert_allclose(features[0, [0, 128]], [np.cos(0.3), np.sin(0.3)], rtol=1e-6)
    np.testing.assert_allclose(features[0, 64], np.cos(0.3 * 10000**-0.5), rtol=1e-6)


def test_rematerialisation_changes_nothing(params):
    def loss(params, remat):
        return jnp.sum(jnp.sin(trace(params, remat)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(params, "none")
    for remat in ("blocks", "dots"):
        chex.assert_trees_all_close(plain, gradient(params, remat), rtol=1e-4, atol=1e-4)


def test_the_backward_pass_stores_each_large_thing_once(params):
    """Of both layers: a weight, the MLP's inside and the weights of attention. Not what is made of them."""
    with jax.set_mesh(sharding.make_mesh(data=1, devices=jax.devices()[:1])):
        stored = jax.eval_shape(lambda params: jax.vjp(trace, params)[1], params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(stored)]
    for shape in ((2, 32, 128), (2, 128, 32), (2, 32, 3, 32), (2, 3, 9, 128), (2, 3, 4, 9, 9)):
        assert shapes.count(shape) == 1, shape


@pytest.mark.parametrize(("remat", "stored"), [("dots", 1), ("blocks", 0)])
def test_remat_stores_results_of_products_or_nothing(params, remat, stored):
    kept = jax.eval_shape(lambda params: jax.vjp(lambda params: trace(params, remat), params)[1], params)
    assert [leaf.shape for leaf in jax.tree.leaves(kept)].count((2, 3, 9, 128)) == stored


def test_bfloat16_is_near_float32(params):
    # Relative 2^-8 per rounding, over two blocks with activations of order 1 to 10.
    np.testing.assert_allclose(apply(params, dtype="bfloat16"), apply(params), atol=0.4)


def test_dropout_acts_in_training_only(params):
    model = Transformer(**TINY, dropout=0.5)

    @jax.jit
    def draw(seed):
        return model.apply({"params": params}, TOKENS, SIGMA, train=True, rngs={"dropout": jax.random.key(seed)})

    assert (draw(0) == draw(0)).all() and (draw(0) != draw(1)).any()
    assert (apply(params, dropout=0.5) == apply(params)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide model.dim=32"),
        ({"dim": 12, "num_heads": 4}, "even width"),
        ({"dtype": "float8"}, "'float8' is unknown"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Transformer(**TINY | options)


def test_without_time_conditioning_the_features_do_not_depend_on_the_noise_level():
    model = Transformer(**TINY, time_conditioning=False)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS, SIGMA))
    names = {path[0].key for path, _ in jax.tree_util.tree_flatten_with_path(variables["params"])[0]}
    assert names == {"embedding", "blocks", "norm", "head"}
    features = jax.jit(lambda sigma: model.apply(variables, TOKENS, sigma, method="features"))
    np.testing.assert_array_equal(features(SIGMA), features(2 * SIGMA))


def test_the_mean_parametrisation_gives_scores_of_a_softmax(params):
    graph = Absorbing(10)
    tokens = jnp.where(TOKENS < 5, graph.mask, TOKENS)
    log_score = apply(params, tokens, parametrisation="mean", to_score=graph.score_of_mean)
    at_mask = np.asarray(tokens == graph.mask)
    total = jnp.exp(log_score[..., :10]).sum(-1) * jnp.expm1(SIGMA)[:, None]
    np.testing.assert_allclose(np.asarray(total)[at_mask], 1, rtol=1e-5)
    assert (log_score[..., 10][at_mask] == 0).all()
