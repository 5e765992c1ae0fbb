"""The reverse process of one model: evaluations of the network, and draws at the positions that can still change."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.categorical import fine_uniform, quantile, truncated, usable
from sedd_jax.network import Index, Network, for_chunks, pick, put
from sedd_jax.noise import Noise
from sedd_jax.rates import Graph
from sedd_jax.sampling.constrained import Constraint, LogMasses, Population, log_sums
from sedd_jax.sampling.sampler import Sampler, Truncation, grid_time
from sedd_jax.typing import Clamp, Features, Keys, Mask, PerSequence, Scalar, Tokens

Count = Int[Array, ""] | int
Sigma = Scalar | PerSequence
Among = Mask | bool
PerPosition = Float[Array, "b l"]


class State(NamedTuple):
    """changed: the event (counted from 1) at which a position got its token; 0 for never.
    calls: network evaluations so far. drawn: draws so far in each sequence.
    clipped, failed: of each sequence, how many draws had a negative probability, and the first event at which a
    position had no probabilities to draw from, NaN or all zero; 0 for none. Devices need not agree on a sum.
    certainty: if tokens are masked again, the probability that each had when it was drawn. population: with rules.
    cache: for a timeless network, the tokens of its last evaluation and their features."""

    x: Tokens
    changed: Tokens
    calls: Int[Array, ""]
    drawn: Int[Array, ""]
    clipped: Int[Array, " b"]
    failed: Int[Array, " b"]
    certainty: PerPosition | None
    cache: tuple[Tokens, Features] | None
    population: Population | None = None


class Evaluation(NamedTuple):
    """The network at tokens x and noise levels sigma."""

    features: Features
    x: Tokens
    sigma: PerSequence


class Positions(NamedTuple):
    """An evaluation at R positions: the arguments of `Graph.hazard`."""

    x: Int[Array, "r 1"]
    log_score: Float[Array, "r 1 n"]
    sigma: Float[Array, "r 1"]


# (probabilities [R, M] before any narrowing, tokens drawn [R]) -> a number each.
Measures = tuple[Callable[[Float[Array, "r m"], Int[Array, " r"]], Float[Array, " r"]], ...]
# (positions of each evaluation, values there) -> transition probabilities [R, 1, N or V]; negative ones are clipped.
Probs = Callable[..., Float[Array, "r 1 m"]]


@dataclass(frozen=True, eq=False)
class Process:
    """The reverse process, which `methods` steps through.
    steps: see `sampling.simulate`. given: (mask [B, L], values [B, L]) of the positions that are not drawn.
    constraint: rules for the text, if there are any.
    keys: one per sequence. All randomness of a sequence comes from its own key and its own positions, so samples do not
        depend on how a batch is sliced, split over devices, or processed in chunks."""

    graph: Graph
    noise: Noise
    network: Network
    sampler: Sampler
    steps: Count
    given: Clamp
    keys: Keys
    constraint: Constraint | None = None

    def time(self, number: Count) -> Scalar:
        """The time after step `number`."""
        return grid_time(self.sampler.grid, jnp.asarray(number, jnp.int32) / self.steps)

    def start(self) -> State:
        """A sample of the distribution at sigma = infinity, with the given positions in place."""
        mask, values = self.given
        limit = jax.vmap(lambda key: self.graph.sample_limit(key, mask.shape[1:]))(self.event_keys(0))
        x, cache = jnp.where(mask, values, limit), None
        if self.network.timeless:
            features = jax.eval_shape(self.network.features, x, jnp.ones(len(x)))
            cache = jnp.full_like(x, -1), jnp.zeros(features.shape, features.dtype)
        zero, none = jnp.zeros((), jnp.int32), jnp.zeros(len(x), jnp.int32)
        certainty, population = jnp.zeros(x.shape) if self.sampler.remask else None, None
        if self.constraint is not None:
            population = Population(jnp.zeros(len(x)), jnp.asarray(self.constraint.rules.number), self.hitting_levels())
        return State(x, jnp.zeros_like(x), zero, zero, none, none, certainty, cache, population)

    def hitting_levels(self) -> PerPosition:
        """The masked fraction at which each position leaves MASK with the first-hitting sampler; 0 for given ones."""
        length = self.given[0].shape[1]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,), minval=1e-7))(self.event_keys(0, 1))
        return jnp.where(self.given[0], 0, -jnp.expm1(-self.noise.total(jnp.ones(()))) * uniform)

    def event_keys(self, *event: Count) -> Keys:
        """A key per sequence for a numbered event of the process."""
        return functools.reduce(jax.vmap(jax.random.fold_in, in_axes=(0, None)), event, self.keys)

    def evaluate(self, state: State, sigma: Sigma) -> tuple[Evaluation, State]:
        """One network call, or none if the network is timeless and no token has changed since its last one."""
        sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), len(state.x))
        if state.cache is None:
            features = self.network.features(state.x, sigma)
            return Evaluation(features, state.x, sigma), state._replace(calls=state.calls + 1)
        stale = jnp.any(state.cache[0] != state.x)
        features = jax.lax.cond(stale, lambda: self.network.features(state.x, sigma), lambda: state.cache[1])
        state = state._replace(calls=state.calls + stale, cache=(state.x, features))
        return Evaluation(features, state.x, sigma), state

    def step(self, state: State, number: Count, draw: int, sigma: Sigma, probs: Probs, among: Among = True) -> State:
        """One network call at the noise level sigma, and one draw, as in `draw`."""
        now, state = self.evaluate(state, sigma)
        return self.draw(state, number, draw, probs, now, among=among)[0]

    def draw(
        self,
        state: State,
        number: Count,
        draw: int,
        probs: Probs,
        *at: Evaluation,
        among: Among = True,
        measures: Measures = (),
        values: tuple[Any, ...] = (),
    ) -> tuple[State, tuple[PerPosition, ...]]:
        """Draw `draw` of event `number`: at every position (of `among`) that can leave its token and is not given. And
        the measures there. values: [B, L]; probs gets them at its positions. Every device goes through these positions
        of its own sequences in chunks: log-scores [B, L, N] never exist, and those of other positions not at all."""

        def local(head, keys, x, active, at, values):
            length = x.shape[1]
            uniform = jax.vmap(lambda key: fine_uniform(key, (length, 2)))(keys)

            def chunk(index, carry):
                given = [self._positions(head, evaluation, index) for evaluation in at]
                narrowed, clipped = zip(*map(self._narrow, given), strict=True)
                others = [pick(array, index)[:, None] for array in values]
                transition = probs(*narrowed, *others)[:, 0]
                weights = jnp.maximum(transition, 0)
                if self.sampler.precision == "exact":
                    tokens = quantile(pick(uniform, index), weights)
                else:
                    sequence_keys = keys.at[index // length].get(mode="clip")
                    tokens = jax.vmap(truncated)(jax.vmap(jax.random.fold_in)(sequence_keys, index % length), weights)
                clipped = jnp.any(transition < 0, axis=-1) | jnp.any(jnp.stack(clipped), axis=0)[:, 0]
                shares = probs(*given, *others)[:, 0]  # XLA drops this again where nothing is measured
                shares = shares / shares.sum(-1, keepdims=True)
                results = tokens, clipped, ~usable(weights), *(measure(shares, tokens) for measure in measures)
                return tuple(put(values, index, new) for values, new in zip(carry, results, strict=True))

            nowhere, measured = jnp.zeros_like(active), [jnp.zeros(x.shape)] * len(measures)
            return for_chunks(active, min(self.sampler.rows, x.size), chunk, (x, nowhere, nowhere, *measured))

        keys, active = self.event_keys(number, draw), self.graph.contributes(state.x) & ~self.given[0] & among
        results = self.network.on_shards(local)(self.network.head, keys, state.x, active, at, values)
        drawn, clipped, failed, *measured = results
        changed = jnp.where(drawn != state.x, number, state.changed)
        failed = jnp.where((state.failed == 0) & failed.any(1), number, state.failed)
        counts = {"drawn": state.drawn + active.shape[1], "clipped": state.clipped + clipped.sum(1)}
        return state._replace(x=drawn, changed=changed, failed=failed, **counts), tuple(measured)

    def log_masses(self, now: Evaluation, places: Tokens, active: Mask, groups: Any) -> LogMasses:
        """The log of the mass that the narrowed predictions at the active places [B, H] give to groups of tokens."""
        rows = jnp.arange(len(places))[:, None]
        picked = (array.at[rows, places].get(mode="clip") for array in (now.features, now.x))

        def local(head, features, x, sigma, active):
            def chunk(index, masses):
                at = self._narrow(self._positions(head, Evaluation(features, x, sigma), index))[0]
                log_probs = jax.nn.log_softmax(at.log_score[:, 0, : self.graph.vocab_size])
                return put(masses, index, log_sums(log_probs, groups))

            nothing = jnp.zeros((*active.shape, len(groups.sizes)))
            return for_chunks(active, min(self.sampler.rows, active.size), chunk, nothing)

        return self.network.on_shards(local)(self.network.head, *picked, now.sigma, active)

    def _positions(self, head: Any, evaluation: Evaluation, index: Index) -> Positions:
        here = pick(evaluation.x, index)[:, None]
        sigma = evaluation.sigma.at[index // evaluation.x.shape[1]].get(mode="clip")
        log_score = self.network.log_score(head, pick(evaluation.features, index)[:, None], here, sigma)
        return Positions(here, log_score, sigma[:, None])

    def _narrow(self, at: Positions) -> tuple[Positions, Mask]:
        if (truncation := self.sampler.truncation) == Truncation():
            return at, jnp.zeros_like(at.x, bool)
        log_score, clipped = self.graph.narrow(truncation.log_probs, *at)
        return at._replace(log_score=log_score), clipped
