"""Text by running the Markov chain backwards, all positions in parallel, with any positions given.

`sampler` has the options, `process` the reverse process, `methods` its steps, `constrained` the rules for a text."""

# ruff: noqa: F401 (names for users)

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sedd_jax.errors import TrainingError
from sedd_jax.network import Network, as_network
from sedd_jax.noise import Noise
from sedd_jax.rates import Graph
from sedd_jax.sampling import methods
from sedd_jax.sampling.constrained import Automaton, Constraint, Rules, probability
from sedd_jax.sampling.process import Count, Process, State
from sedd_jax.sampling.sampler import GRID_METHODS, GRIDS, METHODS, Sampler, Truncation
from sedd_jax.typing import Clamp, PerSequence, PRNGKey, Scalar, ScoreFn, Tokens


class Sample(NamedTuple):
    """changed: the step (from 1) at which each position got its token, 0 for given ones. calls: network evaluations.
    clipped: fraction of the (position, step) pairs whose transition had a negative probability, set to zero, or where
        a distribution to narrow had some, see `rates.Graph.narrow`.
    failed: the first step at which a position had no scores to draw from: see `require_sound`; 0 for none.
    log_weight, origin: [B], of a constraint: see `constrained.Population`."""

    tokens: Tokens
    changed: Tokens
    calls: Int[Array, ""]
    clipped: Scalar
    failed: Int[Array, ""]
    log_weight: PerSequence | None = None
    origin: Int[Array, " b"] | None = None


def make_process(
    key: PRNGKey,
    score_fn: ScoreFn | Network,
    graph: Graph,
    noise: Noise,
    shape: tuple[int, int],
    *,
    steps: Count,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    clamp: Clamp | None = None,
    first_index: Count = 0,
    constraint: Constraint | None = None,
) -> Process:
    """The reverse process of `shape` = (B, L) tokens.
    steps: from t = 1 to END_TIME; the denoising follows, with one more call. With `methods.CALLS`, the largest number
        of network calls: the positions to fill are divided evenly among them, and with as many calls as positions each
        is drawn by itself; 'entropy' may be done earlier. May be traced: other numbers compile no other program.
    clamp: the given positions, which are set from the beginning and never drawn.
    first_index: index of the first sequence. A sequence's draws depend only on the key and its index, so slices of a
        batch, on any devices, are slices of the samples of the batch, up to rounding.
    constraint: rules for the text of holes, for 'first_hitting': the samples all keep them, and have weights, by which
        they follow the law of the sampler given the rules. Those of equal windows in a batch are one population, which
        is resampled when few weights outweigh the others. Raises InputError as `Sampler.check` does."""
    sampler.check(graph, steps if isinstance(steps, int) else 1, constrained=constraint is not None)
    given = (jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)) if clamp is None else clamp
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first_index + jnp.arange(shape[0]))
    return Process(graph, noise, as_network(score_fn), sampler, steps, given, keys, constraint)


def simulate(*arguments: Any, **options: Any) -> Sample:
    """Samples from the process of `make_process`, which documents the arguments."""
    process = make_process(*arguments, **options)
    on_grid = process.sampler.method in GRID_METHODS
    # Not `advance`, which would put a second network into the loop.
    event, count = (methods.step, process.steps) if on_grid else (advance, num_events(process))
    with jax.named_scope("events"):
        state = jax.lax.fori_loop(1, count + 1, lambda number, state: event(process, state, number), process.start())
    return as_sample(methods.denoise(process, state, process.steps + 1) if on_grid else state)


def sample(
    key: PRNGKey, score_fn: ScoreFn | Network, graph: Graph, noise: Noise, shape: tuple[int, int], **options: Any
) -> Tokens:
    """The tokens [B, L] of `simulate`. options: its `steps`, `clamp` and `first_index`, and the fields of `Sampler`:
    `method` ('analytic' by default), `temperature` and so on."""
    given = {name: options.pop(name) for name in ("steps", "clamp", "first_index") if name in options}
    return simulate(key, score_fn, graph, noise, shape, sampler=Sampler(**options), **given).tokens


def num_events(process: Process) -> Count:
    """The steps and the final denoising; with `methods.CALLS` the calls that the free positions need."""
    return process.steps + 1 if process.sampler.method in GRID_METHODS else methods.hitting_counts(process)[1]


def advance(process: Process, state: State, number: Count) -> State:
    """The state after event `number`, from 1 to `num_events`."""
    number = jnp.asarray(number, jnp.int32)
    if call := methods.CALLS.get(process.sampler.method):
        return call(process, state, number)
    step, denoise = partial(methods.step, process), partial(methods.denoise, process)
    return jax.lax.cond(number <= process.steps, step, denoise, state, number)


def as_sample(state: State) -> Sample:
    """The result of a process, from its last state."""
    clipped = jnp.mean(state.clipped / jnp.maximum(state.drawn, 1))
    first = jnp.min(state.failed, initial=jnp.iinfo(jnp.int32).max, where=state.failed > 0)
    failed = jnp.where(jnp.any(state.failed > 0), first, 0)
    weights = () if state.population is None else state.population[:2]
    return Sample(state.x, state.changed, state.calls, clipped, failed, *weights)


def require_sound(failed: Int[Array | np.ndarray, "*samples"]) -> None:
    """Raises TrainingError if a step failed. failed: of one `Sample`, or of several."""
    if (steps := np.asarray(failed)[np.asarray(failed) > 0]).size:
        why = "the scores are NaN, infinite or all zero there; training diverged or the weights are damaged"
        raise TrainingError(f"sampling stopped at step {steps.min()}: {why}")
