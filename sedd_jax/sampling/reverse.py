"""What every sampler is made of: an evaluation of the network, and a draw at the positions that can still change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.categorical import fine_uniform, quantile, truncated
from sedd_jax.rates import Graph
from sedd_jax.sampling.truncation import Truncation
from sedd_jax.score_entropy import ScoreFn


class Network(NamedTuple):
    """A score function in two parts, so that log-scores exist only for the positions that are drawn.

    features: (tokens [B, L], sigma [B]) -> [B, L, D].
    log_score: (features [B, W, D], tokens [B, W], sigma [B]) -> [B, W, N], of any W of the positions.
    timeless: the features do not depend on sigma, so they are computed again only when a token has changed.
    """

    features: Callable[..., Float[Array, "b l d"]]
    log_score: Callable[..., Float[Array, "b w n"]]
    timeless: bool = False


def as_network(score_fn: "ScoreFn | Network") -> Network:
    """A plain score function as a network whose features are the log-scores."""
    if isinstance(score_fn, Network):
        return score_fn
    return Network(features=score_fn, log_score=lambda log_score, tokens, sigma: log_score)


class State(NamedTuple):
    """Where the reverse process is.

    changed: the event (counted from 1) at which a position got its token; 0 for never.
    calls: network evaluations so far. drawn, clipped: draws so far, and how many had a negative probability.
    cache: of a timeless network, the tokens of its last evaluation and their features.
    """

    x: Int[Array, "b l"]
    changed: Int[Array, "b l"]
    calls: Int[Array, ""]
    drawn: Float[Array, ""]
    clipped: Float[Array, ""]
    cache: tuple[Int[Array, "b l"], Float[Array, "b l d"]] | None


class Evaluation(NamedTuple):
    """The network at tokens x and noise levels sigma."""

    features: Float[Array, "b l d"]
    x: Int[Array, "b l"]
    sigma: Float[Array, " b"]


class Rows(NamedTuple):
    """An evaluation at W positions of each sequence."""

    log_score: Float[Array, "b w n"]
    x: Int[Array, "b w"]
    sigma: Float[Array, "b 1"]


# (rows of each evaluation) -> transition probabilities [B, W, M], M = N or V; what is negative is clipped.
Probs = Callable[..., Float[Array, "b w m"]]


@dataclass(frozen=True, eq=False)
class Reverse:
    """The reverse process of one model, but for the rule by which it steps.

    given: (mask [B, L], values [B, L]) of the positions that are not drawn.
    keys: one per sequence. All randomness of a sequence comes from its own key and its own positions, so samples do not
        depend on how a batch is sliced, split over devices, or walked through in chunks.
    rows: log-scores at a time, over all sequences.
    """

    graph: Graph
    network: Network
    truncation: Truncation
    precision: str
    given: tuple[Bool[Array, "b l"], Int[Array, "b l"]]
    keys: Key[Array, " b"]
    rows: int

    def start(self) -> State:
        """From the distribution at sigma = infinity, the given positions in place."""
        mask, values = self.given
        limit = jax.vmap(lambda key: self.graph.sample_limit(key, mask.shape[1:]))(self.event_keys(0))
        x = jnp.where(mask, values, limit)
        cache = None
        if self.network.timeless:
            features = jax.eval_shape(self.network.features, x, jnp.ones(len(x)))
            cache = jnp.full_like(x, -1), jnp.zeros(features.shape, features.dtype)
        nothing = jnp.zeros(())
        return State(x, jnp.zeros_like(x), jnp.zeros((), jnp.int32), nothing, nothing, cache)

    def event_keys(self, *event: Int[Array, ""] | int) -> Key[Array, " b"]:
        """A key per sequence for a numbered event of the process."""
        keys = self.keys
        for number in event:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        return keys

    def renoise(self, keys: Key[Array, " b"], state: State, dsigma: Float[Array, ""]) -> State:
        """Forward by dsigma, which leaves the given positions alone."""
        moved = jax.vmap(lambda key, x: self.graph.sample_transition(key, x, dsigma))(keys, state.x)
        return state._replace(x=jnp.where(self.given[0], state.x, moved))

    def evaluate(self, state: State, sigma: Float[Array, "..."]) -> tuple[Evaluation, State]:
        """One network call, or none if the network is timeless and no token has changed since its last one."""
        sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), len(state.x))
        if state.cache is None:
            features = self.network.features(state.x, sigma)
            return Evaluation(features, state.x, sigma), state._replace(calls=state.calls + 1)
        stale = jnp.any(state.cache[0] != state.x)
        features = jax.lax.cond(stale, lambda: self.network.features(state.x, sigma), lambda: state.cache[1])
        state = state._replace(calls=state.calls + stale, cache=(state.x, features))
        return Evaluation(features, state.x, sigma), state

    def draw(
        self,
        keys: Key[Array, " b"],
        state: State,
        number: Int[Array, ""] | int,
        probs: Probs,
        *evaluations: Evaluation,
        among: Bool[Array, "b l"] | None = None,
    ) -> State:
        """Event `number`: a draw at every position (of `among`) that can leave its token and is not given.

        Of each sequence W positions at a time, those to be drawn first, and only as many times as there are such: so
        the log-scores of [B, L, N] never exist, and those of positions that stay are never computed.
        """
        x, length = state.x, state.x.shape[1]
        width = min(max(1, self.rows // len(x)), length)
        active = self.graph.contributes(x) & ~self.given[0]
        if among is not None:
            active &= among
        order = jnp.argsort(~active, axis=1, stable=True)
        uniform = jax.vmap(lambda key: fine_uniform(key, (length, 2)))(keys)

        def chunk(i, carry):
            # The last chunk may begin within the one before: the same draws are then made again.
            at = jax.lax.dynamic_slice_in_dim(order, i * width, width, axis=1)
            pick = lambda values: jnp.take_along_axis(values, at.reshape(*at.shape, *[1] * (values.ndim - 2)), 1)  # noqa: E731
            transition = probs(*(self._rows(evaluation, pick) for evaluation in evaluations))
            negative = jnp.any(transition < 0, axis=-1)
            weights = jnp.maximum(transition, 0)
            tokens = (
                quantile(pick(uniform), weights) if self.precision == "exact" else self._truncated(keys, at, weights)
            )
            live = pick(active)
            put = lambda values, new: jnp.put_along_axis(values, at, new, axis=1, inplace=False)  # noqa: E731
            drawn, clipped = carry
            return put(drawn, jnp.where(live, tokens, pick(x))), put(clipped, live & negative)

        chunks = -(-active.sum(1).max() // width)
        drawn, clipped = jax.lax.fori_loop(0, chunks, chunk, (x, jnp.zeros_like(active)))
        return state._replace(
            x=drawn,
            changed=jnp.where(drawn != x, number, state.changed),
            drawn=state.drawn + active.size,
            clipped=state.clipped + clipped.sum(),
        )

    def _rows(self, evaluation: Evaluation, pick: Callable[[Any], Any]) -> Rows:
        x = pick(evaluation.x)
        log_score = self.network.log_score(pick(evaluation.features), x, evaluation.sigma)
        return Rows(self.truncation.of_score(log_score, x), x, evaluation.sigma[:, None])

    @staticmethod
    def _truncated(keys: Key[Array, " b"], at: Int[Array, "b w"], weights: Float[Array, "b w n"]) -> Int[Array, "b w"]:
        position_keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys, at)
        return jax.vmap(jax.vmap(truncated))(position_keys, weights)
