"""Every implementation of attention computes the same, and each is chosen where it can run."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sedd_jax.devices import sharding
from sedd_jax.errors import InputError
from sedd_jax.transformer import attention

QKV = jax.random.normal(jax.random.key(0), (3, 2, 128, 2, 64))


def value_and_gradient(attend):
    weights = jnp.cos(jnp.arange(64))
    return jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(attend(*qkv) * weights)))(QKV)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-5)


@pytest.fixture(scope="module")
def expected():
    """`jax.nn`'s own attention."""
    return value_and_gradient(jax.nn.dot_product_attention)


def test_xla(expected):
    assert_same(value_and_gradient(attention.xla), expected)


def test_splash_on_one_device_and_on_a_mesh(expected):
    splash = lambda q, k, v: attention.splash(q, k, v, interpret=True)  # noqa: E731
    assert_same(value_and_gradient(splash), expected)
    mesh = jax.make_mesh((2, 1, 2), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert_same(value_and_gradient(splash), expected)


def test_causal_in_every_implementation():
    expected = value_and_gradient(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    splash = lambda q, k, v: attention.splash(q, k, v, causal=True, interpret=True)  # noqa: E731
    for found in (lambda q, k, v: attention.xla(q, k, v, causal=True), splash):
        assert_same(value_and_gradient(found), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mesh", [False, True])
def test_fused_is_attention_of_rotated_heads(causal, mesh, monkeypatch):
    """Values and gradients, over two blocks of queries, on one device and with heads and sequences on several."""
    monkeypatch.setattr("sedd_jax.transformer.kernel.SCORES", 128 * 256)
    qkv, weights = (
        jax.random.normal(jax.random.key(1), (2, 256, 3, 64)),
        jnp.cos(jnp.arange(256 * 64.0)).reshape(256, 64),
    )

    def run(attend):
        return jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(attend(qkv) * weights)))(qkv)

    expected = run(lambda qkv: attention.attend("plain", qkv, 2, causal=causal))
    context = jax.set_mesh(sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])) if mesh else nullcontext()
    with context:
        assert_same(run(lambda qkv: attention.fused(qkv, 2, causal=causal, interpret=True)), expected)


def test_cached_is_a_row_of_the_causal_one():
    q, k, v = QKV
    whole = attention.xla(q, k, v, causal=True)
    for position in (0, 1, 127):
        # What stands behind the position is not known yet, and not looked at.
        keys, values = (jnp.where(jnp.arange(128)[:, None, None] <= position, a, 7.0) for a in (k, v))
        found = attention.cached(q[:, position : position + 1], keys, values, jnp.asarray(position))
        np.testing.assert_allclose(found[:, 0], whole[:, position], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "length", "chosen"),
    [
        ("auto", "tpu", "bfloat16", 1024, "fused"),
        ("auto", "tpu", "bfloat16", 8192, "splash"),
        ("auto", "tpu", "bfloat16", 100, "plain"),
        ("auto", "gpu", "bfloat16", 100, "cudnn"),
        ("auto", "gpu", "float32", 100, "plain"),
        ("auto", "cpu", "float32", 128, "plain"),
        ("plain", "tpu", "float32", 128, "plain"),
    ],
)
def test_choice(kind, platform, dtype, length, chosen):
    assert attention.choose(kind, platform=platform, dtype=dtype, length=length, head_dim=64) == chosen


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "length", "message"),
    [
        ("flash", "tpu", "bfloat16", 128, "model.attention='flash' is unknown"),
        ("splash", "cpu", "bfloat16", 128, "model.attention='splash' needs a TPU"),
        ("cudnn", "tpu", "bfloat16", 128, "model.attention='cudnn' needs a GPU"),
        ("cudnn", "gpu", "float32", 128, "needs model.dtype='bfloat16'"),
        ("splash", "tpu", "bfloat16", 100, "data.length=100 must be a multiple of 128"),
        ("fused", "tpu", "bfloat16", 100, "data.length=100 must be a multiple of 128"),
        ("fused", "tpu", "bfloat16", 8192, "heads of 64 .* x data.length=8192 must be at most 262144"),
        ("fused", "gpu", "bfloat16", 128, "model.attention='fused' needs a TPU"),
    ],
)
def test_what_cannot_run_is_refused(kind, platform, dtype, length, message):
    with pytest.raises(InputError, match=message):
        attention.choose(kind, platform=platform, dtype=dtype, length=length, head_dim=64)
