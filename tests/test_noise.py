"""Schedules: the definitions, and float32 that stays accurate at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import noise
from sedd_jax.errors import InputError
from sedd_jax.noise import Geometric, LogLinear

TIMES = jnp.concatenate([jnp.array([1e-7, 1e-5, 1e-3]), jnp.linspace(0.01, 0.99, 50), jnp.array([0.999, 0.99999, 1.0])])
# A few float32 roundings of t and of the result; exp(9.9 t) of the geometric schedule multiplies its argument's by 10.
RTOL = 1e-6


def test_loglinear_noises_a_linear_fraction_of_the_tokens():
    t = np.asarray(TIMES, np.float64)
    noise = LogLinear(1e-3)
    np.testing.assert_allclose(noise.total(TIMES), -np.log1p(-(1 - 1e-3) * t), rtol=RTOL)
    np.testing.assert_allclose(noise.rate(TIMES), (1 - 1e-3) / (1 - (1 - 1e-3) * t), rtol=RTOL)
    assert noise.total(jnp.float32(0)) == 0


def test_geometric_interpolates_between_its_ends():
    t = np.asarray(TIMES, np.float64)
    noise = Geometric(1e-4, 20.0)
    np.testing.assert_allclose(noise.total(TIMES), 1e-4 ** (1 - t) * 20**t, rtol=4 * RTOL)
    np.testing.assert_allclose(noise.total(jnp.array([0.0, 1.0])), [1e-4, 20], rtol=4 * RTOL)


@pytest.mark.parametrize("noise", [LogLinear(), LogLinear(0.1), Geometric(), Geometric(1e-3, 5.0)])
def test_rate_is_the_derivative_of_the_total(noise):
    derivative = jax.vmap(jax.grad(noise.total))(TIMES)
    np.testing.assert_allclose(noise.rate(TIMES), derivative, rtol=2e-4)  # grad's own 1 - (1 - eps) t near t = 1


@pytest.mark.parametrize("bad", [{"eps": 0.0}, {"eps": 1.0}, {"eps": 1e-40}, {"eps": float("nan")}])
def test_loglinear_refuses(bad):
    with pytest.raises(InputError, match="noise.eps"):
        LogLinear(**bad)


@pytest.mark.parametrize("bad", [(3.0, 2.0), (0.0, 2.0), (1e-40, 2.0), (1e-4, 1001.0), (1e-4, float("nan"))])
def test_geometric_refuses_levels_out_of_order_or_of_float32(bad):
    with pytest.raises(InputError, match=f"noise.sigma_(min={bad[0]}|max={bad[1]}) must be"):
        Geometric(*bad)


def test_make_names_the_kinds():
    assert noise.make("loglinear", eps=0.1) == LogLinear(0.1)
    assert noise.make("geometric", sigma_max=3.0) == Geometric(1e-4, 3.0)
    with pytest.raises(InputError, match="'linear' is unknown"):
        noise.make("linear")
