"""Noise schedules: the total noise sigma(t) of the forward process at time t in [0, 1], and its rate sigma'(t).

The forward process is dp/dt = sigma'(t) Q p, so p_t depends on t through sigma(t) alone (Lou et al. 2023, section 3).
Schedules are frozen dataclasses of Python floats: static under `jax.jit`, pure functions of t. `total` is sigma(t),
dimensionless: e^-sigma is the probability that the noise has not hit a token. `rate` is sigma'(t), per unit of t;
`at_start` is sigma(0)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from sedd_jax.errors import check_fields


@dataclass(frozen=True)
class LogLinear:
    """1 - e^-sigma(t) = (1 - eps) t: the number of noised tokens grows linearly, and eps of them stay to the end. The
    paper's choice with eps = 1e-3 (appendix C.1), for the absorbing graph above all. sigma(0) = 0."""

    eps: float = 1e-3
    at_start: ClassVar[float] = 0.0

    def __post_init__(self):
        check_fields("noise", vars(self), eps="[1e-30, 1)")  # which float32 allows

    def _stay(self, t):
        return (1 - t) + self.eps * t  # 1 - (1 - eps) t, arranged so that nothing cancels as t -> 1

    def total(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        # log1p keeps the relative accuracy of a small sigma, the plain logarithm that of a small e^-sigma.
        return -jnp.where(t < 0.5, jnp.log1p(-(1 - self.eps) * t), jnp.log(self._stay(t)))

    def rate(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return (1 - self.eps) / self._stay(t)


@dataclass(frozen=True)
class Geometric:
    """sigma(t) = sigma_min^(1-t) sigma_max^t, commonly with the uniform graph. sigma(0) = sigma_min."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self):
        # Scores are e^-sigma: at 1000 their logarithms still have four decimals, and at 20 nothing of the data is left.
        check_fields("noise", vars(self), sigma_min="[1e-30, 1000)", sigma_max=f"({self.sigma_min}, 1000]")

    @property
    def at_start(self) -> float:
        return self.sigma_min

    def total(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self.sigma_min * jnp.exp(math.log(self.sigma_max / self.sigma_min) * t)

    def rate(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return math.log(self.sigma_max / self.sigma_min) * self.total(t)


Noise = LogLinear | Geometric


def make(kind: str, *, eps: float = 1e-3, sigma_min: float = 1e-4, sigma_max: float = 20.0) -> Noise:
    """The schedule that a config names: `loglinear` reads eps, `geometric` reads sigma_min and sigma_max."""
    check_fields("noise", {"kind": kind}, kind=("loglinear", "geometric"))
    return LogLinear(eps) if kind == "loglinear" else Geometric(sigma_min, sigma_max)
