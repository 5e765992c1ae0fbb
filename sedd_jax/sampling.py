"""Text by running the Markov chain backwards, all positions in parallel, with any positions given.

One `lax.scan` over the reverse steps, one network call each. Nothing here knows of training or of the network.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.categorical import categorical
from sedd_jax.errors import InputError
from sedd_jax.noise import Noise
from sedd_jax.rates import Graph
from sedd_jax.score_entropy import ScoreFn

METHODS = ("analytic", "euler")

# Where the reverse process stops and the final denoising step takes over.
END_TIME = 1e-5

# Given positions: (mask [B, L] of what is given, values [B, L]).
Clamp = tuple[Bool[Array, "b l"], Int[Array, "b l"]]


class Sample(NamedTuple):
    tokens: Int[Array, "b l"]
    # Fraction of the (position, step) pairs whose transition had a negative probability, which was clipped at zero.
    clipped: Float[Array, ""]


def check_options(method: str, steps: int) -> None:
    """Raises InputError for an unknown method or steps < 1."""
    if method not in METHODS:
        raise InputError(f"sampling method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if steps < 1:
        raise InputError(f"sampling steps={steps} must be at least 1")


def _draw(key: Key[Array, ""], probs: Float[Array, "b l n"]) -> tuple[Int[Array, "b l"], Float[Array, ""]]:
    """A draw from each row of probs clipped at zero and renormalised, and the fraction of rows that were clipped."""
    negative = jnp.any(probs < 0, axis=-1)
    return categorical(key, jnp.maximum(probs, 0)), jnp.mean(negative.astype(jnp.float32))


def simulate(
    key: Key[Array, ""],
    score_fn: ScoreFn,
    graph: Graph,
    noise: Noise,
    shape: tuple[int, int],
    *,
    steps: int,
    method: str = "analytic",
    clamp: Clamp | None = None,
) -> Sample:
    """Samples `shape` = (B, L) tokens in steps + 1 network calls: steps from t = 1 to END_TIME, then the denoising.

    method: 'analytic' (Tweedie tau-leaping, theorem 4.2) or 'euler' (equation 17); docs/mathematics.md has both. With
        the absorbing graph and the log-linear schedule the two are the same step.
    clamp: the given positions are set before every network call and at the end.
    Raises InputError for an unknown method or steps < 1.
    """
    check_options(method, steps)

    def given(x):
        return x if clamp is None else jnp.where(clamp[0], clamp[1], x)

    def log_score(x, t):
        return score_fn(x, jnp.full(shape[0], noise.total(t)))

    def step(x, inputs):
        step_key, t, t_next = inputs
        if method == "analytic":
            probs = graph.analytic_probs(x, log_score(x, t), noise.total(t) - noise.total(t_next))
        else:
            probs = graph.euler_probs(x, log_score(x, t), noise.rate(t) * (t - t_next))
        x, clipped = _draw(step_key, probs)
        return given(x), clipped

    limit_key, denoise_key, steps_key = jax.random.split(key, 3)
    times = jnp.linspace(1.0, END_TIME, steps + 1)
    x = given(graph.sample_limit(limit_key, shape))
    x, clipped = jax.lax.scan(step, x, (jax.random.split(steps_key, steps), times[:-1], times[1:]))
    probs = graph.denoise_probs(x, log_score(x, times[-1]), noise.total(times[-1]))
    x, clipped_last = _draw(denoise_key, probs)
    return Sample(given(x), (clipped.sum() + clipped_last) / (steps + 1))


def sample(
    key: Key[Array, ""],
    score_fn: ScoreFn,
    graph: Graph,
    noise: Noise,
    shape: tuple[int, int],
    *,
    steps: int,
    method: str = "analytic",
    clamp: Clamp | None = None,
) -> Int[Array, "b l"]:
    """The tokens of `simulate`, which see."""
    return simulate(key, score_fn, graph, noise, shape, steps=steps, method=method, clamp=clamp).tokens
