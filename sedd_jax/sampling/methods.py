"""The samplers: each takes a step of the reverse process from t back to t_next, for both graphs.

A step is `step(process, state, number, t, t_next)` -> state with `number` counting steps from 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.rates import Graph
from sedd_jax.sampling.process import Positions, Process, State
from sedd_jax.typing import Tokens

Time = Float[Array, ""]
Step = Callable[[Process, State, Int[Array, ""], Time, Time], State]


def analytic(process: Process, state: State, number: Int[Array, ""], t: Time, t_next: Time) -> State:
    """Tweedie tau-leaping (theorem 4.2 of the paper): exact in each position by itself, given the others at t."""
    sigma, sigma_next = process.noise.total(t), process.noise.total(t_next)
    return _leap(process, state, number, 0, sigma, sigma - sigma_next)


def euler(process: Process, state: State, number: Int[Array, ""], t: Time, t_next: Time) -> State:
    """Probabilities one_hot(x) + (t - t_next) sigma'(t) Qbar[., x] (equation 17 of the paper)."""
    weight = process.noise.rate(t) * (t - t_next)
    now, state = process.evaluate(state, process.noise.total(t))
    probs = lambda positions: process.graph.euler_probs(positions.x, positions.log_score, weight)  # noqa: E731
    return process.draw(process.event_keys(number, 0), state, number, probs, now)


# Where the theta-trapezoidal step evaluates again: in the middle, as in the midpoint rule.
THETA = 0.5


def trapezoidal(process: Process, state: State, number: Int[Array, ""], t: Time, t_next: Time) -> State:
    """The theta-trapezoidal method (Ren et al., arXiv 2502.00234, algorithm 2), two network calls.

    Second order where the extrapolation below is positive; where it is cut off at 0 a small first-order error is left.

    To the middle with the hazards of t, and on from there with the extrapolation a1 hazard(middle) - a2 hazard(t),
    a1 = 1 / (2 theta (1 - theta)), a2 = a1 - 1, where it is positive. Hazards are per unit of the graph's clock and a
    position moves with probability 1 - e^(-hazard), which is exact for a constant one.
    """
    graph = process.graph
    start, end = graph.clock(process.noise.total(t)), graph.clock(process.noise.total(t_next))
    first_part, second_part = THETA * (start - end), (1 - THETA) * (start - end)
    a1 = 1 / (2 * THETA * (1 - THETA))

    now, state = process.evaluate(state, process.noise.total(t))
    to_middle = lambda positions: _jump(graph, positions, _hazard(graph, positions), first_part)  # noqa: E731
    state = process.draw(process.event_keys(number, 0), state, number, to_middle, now)

    middle, state = process.evaluate(state, graph.from_clock(start - first_part))

    def to_end(positions: Positions, before: Positions):
        hazard = a1 * _hazard(graph, positions) - (a1 - 1) * _hazard(graph, before)
        return _jump(graph, positions, jnp.maximum(hazard, 0), second_part)

    return process.draw(process.event_keys(number, 1), state, number, to_end, middle, now)


STEPS: dict[str, Step] = {"analytic": analytic, "euler": euler, "trapezoidal": trapezoidal}


def correct(process: Process, state: State, number: Int[Array, ""], index: int, t: Time, dsigma: Time) -> State:
    """A corrector step at time t: forward by dsigma and back by the analytic step, one network call.

    With the true scores it leaves p_t invariant, so it moves samples with errors back towards p_t. With the absorbing
    graph it masks tokens again and fills them in anew, as ReMDM (arXiv 2503.00307) does.
    """
    state = process.renoise(process.event_keys(number, 2 + 2 * index), state, dsigma)
    return _leap(process, state, number, 3 + 2 * index, process.noise.total(t) + dsigma, dsigma)


def denoise(process: Process, state: State, number: Int[Array, ""], t: Time) -> State:
    """The analytic step from t all the way to sigma = 0, MASK excluded."""
    sigma = process.noise.total(t)
    now, state = process.evaluate(state, sigma)
    probs = lambda positions: process.graph.denoise_probs(positions.x, positions.log_score, sigma)  # noqa: E731
    return process.draw(process.event_keys(number, 0), state, number, probs, now)


def num_free(process: Process) -> Int[Array, " b"]:
    """Positions to fill in each sequence."""
    return (~process.given[0]).sum(1)


def per_call(process: Process) -> Int[Array, " b"]:
    """Positions that the first-hitting sampler draws in each call."""
    return jnp.maximum(1, -(-num_free(process) // jnp.asarray(process.steps)))


def first_hitting(process: Process, state: State, number: Int[Array, ""]) -> State:
    """Call `number` of the first-hitting sampler (Zheng et al., arXiv 2409.02908), for the absorbing graph.

    For normalised scores, the time when a position leaves MASK does not depend on its token. So all times are drawn
    beforehand, and the network is evaluated at these times, for the position that leaves then: a time grid and its
    error are not needed. With `per_call` > 1 positions at a time, all are drawn at the time of the first.
    """
    level, order = hitting_levels(process)
    rank = jnp.argsort(order, axis=1)
    count = per_call(process)[:, None]
    first = (number - 1) * count
    at = jnp.take_along_axis(order, jnp.minimum(first, order.shape[1] - 1), axis=1)
    masked_fraction = jnp.take_along_axis(level, at, axis=1)[:, 0]
    # A finished sequence is evaluated at an arbitrary level; the result is not used.
    sigma = -jnp.log1p(-jnp.where(masked_fraction > 0, masked_fraction, 0.5))
    now, state = process.evaluate(state, sigma)
    among = (rank >= first) & (rank < first + count)
    probs = lambda positions: process.graph.hazard(positions.x, positions.log_score, positions.sigma)  # noqa: E731
    return process.draw(process.event_keys(number, 0), state, number, probs, now, among=among)


def hitting_levels(process: Process) -> tuple[Float[Array, "b l"], Tokens]:
    """The masked fraction at which each position leaves MASK (0 for the given ones), and positions in that order."""
    length = process.given[0].shape[1]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,), minval=1e-7))(process.event_keys(0, 1))
    level = jnp.where(process.given[0], 0, -jnp.expm1(-process.noise.total(jnp.ones(()))) * uniform)
    return level, jnp.argsort(-level, axis=1)


def _leap(process: Process, state: State, number, event: int, sigma: Time, dsigma: Time) -> State:
    now, state = process.evaluate(state, sigma)
    probs = lambda positions: process.graph.analytic_probs(positions.x, positions.log_score, dsigma)  # noqa: E731
    return process.draw(process.event_keys(number, event), state, number, probs, now)


def _hazard(graph: Graph, positions: Positions) -> Float[Array, "b w n"]:
    return graph.hazard(positions.x, positions.log_score, positions.sigma)


def _jump(graph: Graph, positions: Positions, hazard: Float[Array, "b w n"], span: Time) -> Float[Array, "b w n"]:
    """Transition probabilities over a span of the clock with constant hazards; those at x itself are ignored."""
    here = jax.nn.one_hot(positions.x, graph.num_states, dtype=bool)
    hazard = jnp.where(here, 0, hazard)
    total = hazard.sum(-1, keepdims=True)
    # (1 - e^(-total span)) / total, which is span where total is 0.
    scaled = jnp.where(total > 0, -jnp.expm1(-total * span) / jnp.where(total > 0, total, 1), span)
    return jnp.where(here, jnp.exp(-total * span), hazard * scaled)
