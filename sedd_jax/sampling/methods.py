"""The samplers: each is one way to take a step of the reverse process from t back to t_next, for both graphs.

A step is `step(reverse, state, number, t, t_next)` -> state with `number` counting steps from 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.noise import Noise
from sedd_jax.rates import Graph
from sedd_jax.sampling.reverse import Reverse, Rows, State

Time = Float[Array, ""]
Step = Callable[[Reverse, Noise, State, Int[Array, ""], Time, Time], State]


def analytic(reverse: Reverse, noise: Noise, state: State, number: Int[Array, ""], t: Time, t_next: Time) -> State:
    """Tweedie tau-leaping (theorem 4.2 of the paper): exact in each position by itself, given the others at t."""
    return _leap(reverse, state, number, 0, noise.total(t), noise.total(t) - noise.total(t_next))


def euler(reverse: Reverse, noise: Noise, state: State, number: Int[Array, ""], t: Time, t_next: Time) -> State:
    """Probabilities one_hot(x) + (t - t_next) sigma'(t) Qbar[., x] (equation 17 of the paper)."""
    weight = noise.rate(t) * (t - t_next)
    now, state = reverse.evaluate(state, noise.total(t))
    probs = lambda rows: reverse.graph.euler_probs(rows.x, rows.log_score, weight)  # noqa: E731
    return reverse.draw(reverse.event_keys(number, 0), state, number, probs, now)


# Where the theta-trapezoidal step looks for the second time: the middle, as in the midpoint rule.
THETA = 0.5


def trapezoidal(reverse: Reverse, noise: Noise, state: State, number: Int[Array, ""], t: Time, t_next: Time) -> State:
    """The theta-trapezoidal method (Ren et al., arXiv 2502.00234, algorithm 2): second order, two network calls.

    To the middle with the hazards of t, and on from there with the extrapolation a1 hazard(middle) - a2 hazard(t),
    a1 = 1 / (2 theta (1 - theta)), a2 = a1 - 1, where it is positive. Hazards are per unit of the graph's clock and a
    position moves with probability 1 - e^(-hazard), which is exact for a constant one.
    """
    graph = reverse.graph
    start, end = graph.clock(noise.total(t)), graph.clock(noise.total(t_next))
    first_part, second_part = THETA * (start - end), (1 - THETA) * (start - end)
    a1 = 1 / (2 * THETA * (1 - THETA))

    now, state = reverse.evaluate(state, noise.total(t))
    to_middle = lambda rows: _jump(graph, rows, _hazard(graph, rows), first_part)  # noqa: E731
    state = reverse.draw(reverse.event_keys(number, 0), state, number, to_middle, now)

    middle, state = reverse.evaluate(state, graph.from_clock(start - first_part))

    def to_end(rows: Rows, before: Rows):
        hazard = a1 * _hazard(graph, rows) - (a1 - 1) * _hazard(graph, before)
        return _jump(graph, rows, jnp.maximum(hazard, 0), second_part)

    return reverse.draw(reverse.event_keys(number, 1), state, number, to_end, middle, now)


METHODS: dict[str, Step] = {"analytic": analytic, "euler": euler, "trapezoidal": trapezoidal}


def correct(
    reverse: Reverse, noise: Noise, state: State, number: Int[Array, ""], index: int, t: Time, dsigma: Time
) -> State:
    """A corrector step at time t: forward by dsigma and back by the analytic step, one network call.

    The true process keeps p_t under it, so it moves samples that have strayed back towards p_t. With the absorbing
    graph that is to mask tokens again and fill them in anew, as ReMDM (arXiv 2503.00307) does.
    """
    state = reverse.renoise(reverse.event_keys(number, 2 + 2 * index), state, dsigma)
    return _leap(reverse, state, number, 3 + 2 * index, noise.total(t) + dsigma, dsigma)


def denoise(reverse: Reverse, noise: Noise, state: State, number: Int[Array, ""], t: Time) -> State:
    """The analytic step from t all the way to sigma = 0, MASK excluded."""
    sigma = noise.total(t)
    now, state = reverse.evaluate(state, sigma)
    probs = lambda rows: reverse.graph.denoise_probs(rows.x, rows.log_score, sigma)  # noqa: E731
    return reverse.draw(reverse.event_keys(number, 0), state, number, probs, now)


def first_hitting(
    reverse: Reverse, noise: Noise, state: State, number: Int[Array, ""], per_call: Int[Array, " b"]
) -> State:
    """Call `number` of the first-hitting sampler (Zheng et al., arXiv 2409.02908), for the absorbing graph.

    With scores that are normalised, when a position leaves MASK does not depend on what it becomes: all times are drawn
    beforehand, and the network is asked at those times only, about the position whose time it is. So no error comes
    from a time grid. With per_call > 1 positions at a time, the later ones are drawn as if they came with the first.
    """
    level, order = hitting_levels(reverse, noise)
    rank = jnp.argsort(order, axis=1)
    first = ((number - 1) * per_call)[:, None]
    at = jnp.take_along_axis(order, jnp.minimum(first, order.shape[1] - 1), axis=1)
    masked_fraction = jnp.take_along_axis(level, at, axis=1)[:, 0]
    # A sequence that has nothing left to draw is asked at any level: its answer is not looked at.
    sigma = -jnp.log1p(-jnp.where(masked_fraction > 0, masked_fraction, 0.5))
    now, state = reverse.evaluate(state, sigma)
    among = (rank >= first) & (rank < first + per_call[:, None])
    probs = lambda rows: reverse.graph.hazard(rows.x, rows.log_score, rows.sigma)  # noqa: E731
    return reverse.draw(reverse.event_keys(number, 0), state, number, probs, now, among=among)


def hitting_levels(reverse: Reverse, noise: Noise) -> tuple[Float[Array, "b l"], Int[Array, "b l"]]:
    """The masked fraction at which each position leaves MASK (0 for the given ones), and positions in that order."""
    length = reverse.given[0].shape[1]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,), minval=1e-7))(reverse.event_keys(0, 1))
    level = jnp.where(reverse.given[0], 0, -jnp.expm1(-noise.total(jnp.ones(()))) * uniform)
    return level, jnp.argsort(-level, axis=1)


def _leap(reverse: Reverse, state: State, number, event: int, sigma: Time, dsigma: Time) -> State:
    now, state = reverse.evaluate(state, sigma)
    probs = lambda rows: reverse.graph.analytic_probs(rows.x, rows.log_score, dsigma)  # noqa: E731
    return reverse.draw(reverse.event_keys(number, event), state, number, probs, now)


def _hazard(graph: Graph, rows: Rows) -> Float[Array, "b w n"]:
    return graph.hazard(rows.x, rows.log_score, rows.sigma)


def _jump(graph: Graph, rows: Rows, hazard: Float[Array, "b w n"], span: Time) -> Float[Array, "b w n"]:
    """Transition probabilities over a span of the clock with constant hazards; what they say of x itself is ignored."""
    here = jax.nn.one_hot(rows.x, graph.num_states, dtype=bool)
    hazard = jnp.where(here, 0, hazard)
    total = hazard.sum(-1, keepdims=True)
    # (1 - e^(-total span)) / total, which is span where total is 0.
    scaled = jnp.where(total > 0, -jnp.expm1(-total * span) / jnp.where(total > 0, total, 1), span)
    return jnp.where(here, jnp.exp(-total * span), hazard * scaled)
