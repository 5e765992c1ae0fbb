"""The samplers: each takes a step of the reverse process from t back to t_next, for both graphs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.rates import Graph
from sedd_jax.sampling import constrained
from sedd_jax.sampling.process import Count, Positions, Process, State
from sedd_jax.typing import Mask, PerSequence, Scalar

Step = Callable[[Process, State, Count, Scalar, Scalar], State]  # of process, state, number from 1, t, t_next


def analytic(process: Process, state: State, number: Count, t: Scalar, t_next: Scalar) -> State:
    """Tweedie tau-leaping (theorem 4.2 of the paper): exact in each position by itself, given the others at t."""
    sigma, sigma_next = process.noise.total(t), process.noise.total(t_next)
    return _leap(process, state, number, 0, sigma, sigma - sigma_next)


def euler(process: Process, state: State, number: Count, t: Scalar, t_next: Scalar) -> State:
    """Probabilities one_hot(x) + (t - t_next) sigma'(t) Qbar[., x] (equation 17 of the paper)."""
    weight = process.noise.rate(t) * (t - t_next)
    probs = lambda at: process.graph.euler_probs(at.x, at.log_score, weight)  # noqa: E731
    return process.step(state, number, 0, process.noise.total(t), probs)


THETA = 0.5  # where the theta-trapezoidal step evaluates again: in the middle, as in the midpoint rule


def trapezoidal(process: Process, state: State, number: Count, t: Scalar, t_next: Scalar) -> State:
    """The theta-trapezoidal method (Ren et al., arXiv 2502.00234, algorithm 2), two network calls. To the middle with
    the hazards of t, and on with the extrapolation a1 hazard(middle) - a2 hazard(t), a1 = 1 / (2 theta (1 - theta)),
    a2 = a1 - 1, cut off at 0. It is of second order where it is positive; the cut leaves a small first-order error.
    Hazards are per unit of the graph's clock. A position moves with probability 1 - e^(-hazard)."""
    graph = process.graph
    start, end = graph.clock(process.noise.total(t)), graph.clock(process.noise.total(t_next))
    first_part, second_part = THETA * (start - end), (1 - THETA) * (start - end)
    a1 = 1 / (2 * THETA * (1 - THETA))

    now, state = process.evaluate(state, process.noise.total(t))
    to_middle = lambda at: _jump(graph, at.x, graph.hazard(*at), first_part)  # noqa: E731
    state, _ = process.draw(state, number, 0, to_middle, now)
    # From sigma = 88 on the absorbing graph's clock is 0 in float32, whose sigma would be infinite.
    middle, state = process.evaluate(state, jnp.minimum(graph.from_clock(start - first_part), process.noise.total(t)))

    def to_end(at: Positions, before: Positions):
        hazard = a1 * graph.hazard(*at) - (a1 - 1) * graph.hazard(*before)
        return _jump(graph, at.x, jnp.maximum(hazard, 0), second_part)

    return process.draw(state, number, 1, to_end, middle, now)[0]


STEPS: dict[str, Step] = {"analytic": analytic, "euler": euler, "trapezoidal": trapezoidal}


@jax.named_scope("step")
def step(process: Process, state: State, number: Count) -> State:
    """Step `number`, from 1, and its corrector steps: each forward by dsigma and back by the analytic step, one network
    call. With the true scores that leaves p_t invariant, so it moves samples with errors back towards p_t. With the
    absorbing graph it masks tokens again and fills them in anew, as ReMDM (arXiv 2503.00307) does."""
    sampler, t, t_next = process.sampler, process.time(number - 1), process.time(number)
    state, sigma = STEPS[sampler.method](process, state, number, t, t_next), process.noise.total(t_next)
    dsigma = sampler.corrector_size * (process.noise.total(t) - sigma)
    forward = lambda key, x: process.graph.sample_transition(key, x, dsigma)  # noqa: E731
    for draw in range(2, 2 + 2 * sampler.corrector_steps, 2):
        moved = jax.vmap(forward)(process.event_keys(number, draw), state.x)
        state = state._replace(x=jnp.where(process.given[0], state.x, moved))
        state = _leap(process, state, number, draw + 1, sigma + dsigma, dsigma)
    return state


@jax.named_scope("denoise")
def denoise(process: Process, state: State, number: Count) -> State:
    """Event `number`, after the last step: the analytic step all the way to sigma = 0, MASK excluded."""
    sigma = process.noise.total(process.time(number - 1))
    probs = lambda at: process.graph.denoise_probs(at.x, at.log_score, sigma)  # noqa: E731
    return process.step(state, number, 0, sigma, probs)


def hitting_counts(process: Process) -> tuple[Int[Array, " b"], Int[Array, ""]]:
    """The positions that the first-hitting sampler fills per call in each sequence, and the number of its calls."""
    free = (~process.given[0]).sum(1)
    per_call = jnp.maximum(1, -(-free // jnp.asarray(process.steps)))
    return per_call, (-(-free // per_call)).max()


@jax.named_scope("first_hitting")
def first_hitting(process: Process, state: State, number: Count) -> State:
    """Call `number` of the first-hitting sampler (Zheng et al., arXiv 2409.02908), for the absorbing graph. For
    normalised scores, the time when a position leaves MASK does not depend on its token. So all times are drawn
    beforehand, and the network is evaluated at these times, for the position that leaves then: a time grid and its
    error are not needed. With several positions per call, all are drawn at the time of the first."""
    level = process.hitting_levels() if state.population is None else state.population.level
    order = jnp.argsort(-level, axis=1)
    rank, count = jnp.argsort(order, axis=1), hitting_counts(process)[0][:, None]
    first = (number - 1) * count
    at = jnp.take_along_axis(order, jnp.minimum(first, order.shape[1] - 1), axis=1)
    masked_fraction = jnp.take_along_axis(level, at, axis=1)[:, 0]
    # A finished sequence is evaluated at an arbitrary level; the result is not used.
    sigma = -jnp.log1p(-jnp.where(masked_fraction > 0, masked_fraction, 0.5))
    among = (rank >= first) & (rank < first + count)
    if process.constraint is not None:
        return _by_rules(process, state, number, sigma, among)
    return process.step(state, number, 0, sigma, lambda at: process.graph.hazard(*at), among)


def _by_rules(process: Process, state: State, number: Count, sigma: PerSequence, among: Mask) -> State:
    """The draw of first-hitting under a constraint: see `sampling.constrained`."""
    (automaton, rules), graph, population = process.constraint, process.graph, state.population
    now, state = process.evaluate(state, sigma)
    at = jnp.arange(len(state.x))[:, None], rules.places
    x = state.x.at[at].get(mode="fill", fill_value=0)
    masked, num = graph.contributes(x), len(automaton.classes.sizes)
    known = constrained.certain(jnp.asarray(automaton.class_of).at[x].get(mode="clip"), num)
    predicted = process.log_masses(now, rules.places, masked, automaton.classes)
    log_pi = jnp.where(masked[..., None], predicted, known)
    after, log_z = constrained.messages(process.constraint, log_pi)
    classes = constrained.draw_classes(process.event_keys(number, 1), process.constraint, log_pi, after)
    chosen = jnp.full_like(state.x, -1).at[at].set(classes, mode="drop")

    def probs(at: Positions, chosen: Int[Array, "r 1"]):
        allowed = (jnp.asarray(automaton.class_of) == chosen[..., None]) | (chosen[..., None] < 0)
        return jax.nn.softmax(jnp.where(allowed, at.log_score[..., : graph.vocab_size], -jnp.inf))

    state, _ = process.draw(state, number, 0, probs, now, among=among, values=(chosen,))
    kept = masked & among.at[at].get(mode="fill", fill_value=False)
    log_pi = jnp.where(kept[..., None], constrained.certain(classes, num), log_pi)
    log_weight = population.log_weight + log_z - constrained.messages(process.constraint, log_pi)[1]
    uniform = jax.vmap(jax.random.uniform)(process.event_keys(number, 2))
    index, log_weight = constrained.resampled(uniform, rules, log_weight, graph.contributes(state.x))
    population = constrained.Population(log_weight, population.origin[index], population.level[index])
    return state._replace(x=state.x[index], changed=state.changed[index], population=population)


@jax.named_scope("ordered")
def ordered(process: Process, state: State, number: Count) -> State:
    """Call `number` of 'confidence' or 'entropy', for the absorbing graph: tokens are drawn for all masked positions,
    and those of the most certain positions are kept. 'confidence' (MaskGIT, arXiv 2202.04200) keeps as many as
    first-hitting does, by their largest probability; then the tokens that were the least probable when drawn are masked
    again, `remask` of them, while positions are left. 'entropy' (Ben-Hamu et al., arXiv 2505.24857) keeps the first n
    such that n - 1 have at most the budget of entropy. The choice depends on the state, not on the draws: one position
    per call is exact, whatever the order. Narrowing changes the draws, not the certainty."""
    sampler, graph, free = process.sampler, process.graph, ~process.given[0]
    masked, per_call = free & graph.contributes(state.x), hitting_counts(process)[0][:, None]
    left = masked.sum(1)
    # The mean of the level at which first-hitting draws the next of these positions; arbitrary without any.
    fraction = -jnp.expm1(-process.noise.total(jnp.ones(()))) * left / (free.sum(1) + 1)
    sigma, entropy = -jnp.log1p(-jnp.where(left > 0, fraction, 0.5)), sampler.method == "entropy"

    def call(state: State) -> State:
        now, before = process.evaluate(state, sigma)
        hazard = lambda at: graph.hazard(*at)  # noqa: E731
        probability = lambda p, token: jnp.take_along_axis(p, token[:, None], axis=-1)[:, 0]  # noqa: E731
        measures = (UNCERTAINTY[sampler.method], *[probability] * (sampler.remask > 0))
        drawn, (key, *certainty) = process.draw(before, number, 0, hazard, now, measures=measures)
        key, count = jnp.where(masked, key, jnp.inf), per_call + sampler.remask
        if entropy:
            count = jnp.maximum(count, 1 + jnp.sum(jnp.cumsum(jnp.sort(key), 1) <= sampler.entropy_budget, 1)[:, None])
        kept = masked & (_rank(key) < count)
        x = jnp.where(kept, drawn.x, before.x)
        if certainty:
            certainty, filled = jnp.where(kept, certainty[0], before.certainty), free & (kept | ~masked)
            aim = jnp.minimum(number * per_call, free.sum(1, keepdims=True))  # what is filled after this call
            spare = filled.sum(1, keepdims=True) - aim
            again = filled & (_rank(jnp.where(filled, certainty, jnp.inf)) < spare)
            x, drawn = jnp.where(again, graph.mask, x), drawn._replace(certainty=certainty)
        return drawn._replace(x=x, changed=jnp.where(x != before.x, number, before.changed))

    # By entropy, all may be done before the last call.
    return jax.lax.cond(masked.any(), call, lambda state: state, state) if entropy else call(state)


# Samplers without a time grid: events are network calls, see `hitting_counts`.
CALLS = {"first_hitting": first_hitting, "confidence": ordered, "entropy": ordered}
UNCERTAINTY = {"confidence": lambda p, _: -p.max(-1), "entropy": lambda p, _: jax.scipy.special.entr(p).sum(-1)}


def _rank(key: Float[Array, "b l"]) -> Int[Array, "b l"]:
    return jnp.argsort(jnp.argsort(key, axis=1), axis=1)


def _leap(process: Process, state: State, number: Count, draw: int, sigma: Scalar, dsigma: Scalar) -> State:
    probs = lambda at: process.graph.analytic_probs(at.x, at.log_score, dsigma)  # noqa: E731
    return process.step(state, number, draw, sigma, probs)


def _jump(graph: Graph, x: Int[Array, "b w"], hazard: Float[Array, "b w n"], span: Scalar) -> Float[Array, "b w n"]:
    """Transition probabilities over a span of the clock with constant hazards, which are 0 at x itself."""
    here, total = jax.nn.one_hot(x, graph.num_states, dtype=bool), hazard.sum(-1, keepdims=True)
    # (1 - e^(-total span)) / total, which is span where total is 0.
    scaled = jnp.where(total > 0, -jnp.expm1(-total * span) / jnp.where(total > 0, total, 1), span)
    return jnp.where(here, jnp.exp(-total * span), hazard * scaled)
