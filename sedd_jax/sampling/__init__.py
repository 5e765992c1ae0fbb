"""Text by running the Markov chain backwards, all positions in parallel, with any positions given.

`simulate` is one loop over the reverse steps. Nothing here knows of training or of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.errors import InputError
from sedd_jax.noise import Noise
from sedd_jax.rates import Absorbing, Graph
from sedd_jax.sampling import grids, methods
from sedd_jax.sampling.reverse import Network, Reverse, State, as_network
from sedd_jax.sampling.truncation import Truncation
from sedd_jax.score_entropy import ScoreFn

METHODS = (*methods.METHODS, "first_hitting")
PRECISIONS = ("exact", "reference")

# Given positions: (mask [B, L] of what is given, values [B, L]).
Clamp = tuple[Bool[Array, "b l"], Int[Array, "b l"]]


class Sample(NamedTuple):
    """changed: the step (from 1) at which each position got its token, 0 for given ones. calls: network evaluations.
    clipped: fraction of the (position, step) pairs whose transition had a negative probability, set to zero."""

    tokens: Int[Array, "b l"]
    changed: Int[Array, "b l"]
    calls: Int[Array, ""]
    clipped: Float[Array, ""]


@dataclass(frozen=True)
class Sampler:
    """How to run the chain backwards.

    method: 'analytic' (Tweedie tau-leaping), 'euler', 'trapezoidal' (smaller error, two calls per step), or
        'first_hitting' (absorbing graph; exact in time); see `sampling.methods` and docs/mathematics.md. With the
        absorbing graph and the log-linear schedule, analytic and Euler are the same step.
    grid: of the times, see `grids.time`; of no meaning for 'first_hitting'.
    corrector_steps: corrector steps after each step, one call each; corrector_size: how far they go, in parts of the
        step's own change of sigma.
    temperature, top_k, top_p: see `Truncation`; biased.
    precision: 'exact', or 'reference' for draws that cut off rare outcomes as the reference implementation does.
    rows: log-scores [rows, N] that exist at a time.
    Raises InputError for a value that is unknown or out of range.
    """

    method: str = "analytic"
    grid: str = "uniform"
    corrector_steps: int = 0
    corrector_size: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    precision: str = "exact"
    rows: int = 512

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"sampling method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.precision not in PRECISIONS:
            raise InputError(f"sampling precision {self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        grids.check(self.grid)
        if self.corrector_steps < 0:
            raise InputError(f"sampling corrector_steps={self.corrector_steps} must be 0 or more")
        if not 0 < self.corrector_size <= 1:
            raise InputError(f"sampling corrector_size={self.corrector_size} must lie in (0, 1]")
        if self.rows < 1:
            raise InputError(f"sampling rows={self.rows} must be at least 1")
        if self.method == "first_hitting" and self.corrector_steps:
            raise InputError("sampling method 'first_hitting' has no time grid to correct on; set corrector_steps to 0")
        self.truncation  # noqa: B018 (checks the values)

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.temperature, self.top_k, self.top_p)

    def check(self, graph: Graph, steps: int) -> None:
        """Raises InputError where the method does not know the graph, or for steps < 1."""
        if self.method == "first_hitting" and not isinstance(graph, Absorbing):
            raise InputError(
                "sampling method 'first_hitting' needs the absorbing graph, where a position changes once; choose "
                f"one of {', '.join(methods.METHODS)}"
            )
        if steps < 1:
            raise InputError(f"sampling steps={steps} must be at least 1")


@dataclass(frozen=True, eq=False)
class Process:
    """A reverse process with its rule: `start`, then `advance` for each number from 1 to `length`."""

    reverse: Reverse
    noise: Noise
    sampler: Sampler
    steps: Int[Array, ""] | int

    @property
    def length(self) -> Int[Array, ""] | int:
        """Events: the steps and the final denoising; with 'first_hitting' as many calls as the holes need."""
        if self.sampler.method != "first_hitting":
            return self.steps + 1
        return (-(-self._holes() // self._per_call())).max()

    def start(self) -> State:
        return self.reverse.start()

    def advance(self, state: State, number: Int[Array, ""] | int) -> State:
        """Event `number`, from 1."""
        number = jnp.asarray(number, jnp.int32)
        if self.sampler.method == "first_hitting":
            return methods.first_hitting(self.reverse, self.noise, state, number, self._per_call())
        return jax.lax.cond(number <= self.steps, self._step, self._denoise, state, number)

    def run(self) -> State:
        """All events."""
        if self.sampler.method == "first_hitting":
            return self._each(self.advance, self.length)
        # Not `advance`, which would put a second network into the loop.
        state = self._each(self._step, self.steps)
        return self._denoise(state, jnp.asarray(self.steps + 1, jnp.int32))

    def _each(self, event: Callable[[State, Int[Array, ""]], State], last: Int[Array, ""] | int) -> State:
        return jax.lax.fori_loop(1, last + 1, lambda number, state: event(state, number), self.start())

    def _time(self, number: Int[Array, ""]) -> Float[Array, ""]:
        return grids.time(self.sampler.grid, number / self.steps)

    def _step(self, state: State, number: Int[Array, ""]) -> State:
        t, t_next = self._time(number - 1), self._time(number)
        state = methods.METHODS[self.sampler.method](self.reverse, self.noise, state, number, t, t_next)
        dsigma = self.sampler.corrector_size * (self.noise.total(t) - self.noise.total(t_next))
        for index in range(self.sampler.corrector_steps):
            state = methods.correct(self.reverse, self.noise, state, number, index, t_next, dsigma)
        return state

    def _denoise(self, state: State, number: Int[Array, ""]) -> State:
        return methods.denoise(self.reverse, self.noise, state, number, self._time(number - 1))

    def _holes(self) -> Int[Array, " b"]:
        return (~self.reverse.given[0]).sum(1)

    def _per_call(self) -> Int[Array, " b"]:
        return jnp.maximum(1, -(-self._holes() // jnp.asarray(self.steps)))


def make_process(
    key: Key[Array, ""],
    score_fn: ScoreFn | Network,
    graph: Graph,
    noise: Noise,
    shape: tuple[int, int],
    *,
    steps: Int[Array, ""] | int,
    sampler: Sampler,
    clamp: Clamp | None = None,
    first_index: Int[Array, ""] | int = 0,
) -> Process:
    """The arguments are those of `simulate`. Raises InputError as `Sampler.check` does."""
    sampler.check(graph, steps if isinstance(steps, int) else 1)
    given = (jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)) if clamp is None else clamp
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first_index + jnp.arange(shape[0]))
    reverse = Reverse(graph, as_network(score_fn), sampler.truncation, sampler.precision, given, keys, sampler.rows)
    return Process(reverse, noise, sampler, steps)


def simulate(
    key: Key[Array, ""],
    score_fn: ScoreFn | Network,
    graph: Graph,
    noise: Noise,
    shape: tuple[int, int],
    *,
    steps: Int[Array, ""] | int,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    clamp: Clamp | None = None,
    first_index: Int[Array, ""] | int = 0,
) -> Sample:
    """Samples `shape` = (B, L) tokens.

    steps: from t = 1 to END_TIME; then comes the denoising, one call more. With 'first_hitting', the most network calls
        that may be made: the positions to fill are shared out evenly, and with as many calls as there are positions
        each is drawn by itself. May be traced: another number is no other program.
    clamp: the given positions are set from the beginning and never drawn.
    first_index: number of the first sequence. A sequence's draws depend on the key and its number alone, so that
        slices of a batch, on any devices, are the slices of the whole batch's samples up to rounding.
    Raises InputError as `Sampler.check` does.
    """
    process = make_process(
        key, score_fn, graph, noise, shape, steps=steps, sampler=sampler, clamp=clamp, first_index=first_index
    )
    return as_sample(process.run())


def as_sample(state: State) -> Sample:
    """What a process has come to."""
    return Sample(state.x, state.changed, state.calls, state.clipped / jnp.maximum(state.drawn, 1))


def sample(
    key: Key[Array, ""],
    score_fn: ScoreFn | Network,
    graph: Graph,
    noise: Noise,
    shape: tuple[int, int],
    *,
    steps: int,
    method: str = "analytic",
    clamp: Clamp | None = None,
    **options,
) -> Int[Array, "b l"]:
    """The tokens of `simulate`; options: fields of `Sampler`."""
    sampler = Sampler(method=method, **options)
    return simulate(key, score_fn, graph, noise, shape, steps=steps, sampler=sampler, clamp=clamp).tokens
