"""A score function in two parts, so that log-scores exist only for some positions at a time, on each device by itself.

The loss, the likelihood and the samplers go through the positions that matter in chunks: [B, L, N] never exists.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.typing import Mask, PerSequence, Scalar, ScoreFn, Tokens

Index = Int[Array, " r"]  # positions of a batch as indices into its B * L; B * L itself stands for none


class Network(NamedTuple):
    """features: (tokens [B, L], sigma [B]) -> [B, L, D].
    log_score: (head, features [R, 1, D], tokens [R, 1], sigma [R]) -> [R, 1, N], for any R positions.
    head: the parameters of `log_score`.
    timeless: the features do not depend on sigma.
    on_shards: turns function(head, *arrays [B, ...]) -> arrays [B, ...] into one that every device runs on its own
        sequences with the complete head; see `sharding.on_shards`."""

    features: Callable[..., Float[Array, "b l d"]]
    log_score: Callable[..., Float[Array, "r 1 n"]]
    head: Any = ()
    timeless: bool = False
    on_shards: Callable[[Callable], Callable] = lambda function: function


def as_network(score_fn: ScoreFn | Network) -> Network:
    """A score function as a network whose features are the log-scores."""
    if isinstance(score_fn, Network):
        return score_fn
    return Network(features=score_fn, log_score=lambda head, log_score, tokens, sigma: log_score)


def guided(conditional: Network, unconditional: Network, weight: Scalar | float) -> Network:
    """The scores s(x | label)^weight s(x)^(1 - weight): reverse rates that favour the label more than the model does,
    by predictor-free guidance (Nisonoff et al., arXiv 2406.01572). Two calls of the network for one."""
    both = conditional, unconditional

    def features(x, sigma):
        return jnp.concatenate([network.features(x, sigma) for network in both], -1)

    def log_score(head, features, x, sigma):
        halves = zip(both, jnp.split(features, 2, -1), strict=True)
        one, other = (network.log_score(head, half, x, sigma) for network, half in halves)
        return weight * one + (1 - weight) * other

    return conditional._replace(features=features, log_score=log_score)


def chunk_size(positions: int) -> int:
    """Positions per chunk: a sixteenth of a device's, which keeps temporaries far below [B, L, N]. At least 320: below,
    adding a chunk's gradient to the sum outweighs its matrix products. At most 2048: above, they gain nothing."""
    return min(max(positions // 16, 320), 2048, positions)


def for_chunks(active: Mask, rows: int, body: Callable[[Index, Any], Any], carry: Any) -> Any:
    """carry = body(index, carry) for the active positions, `rows` at a time and only as often as there are any. The
    last chunk is filled up with an index that is out of range: see `pick` and `put`."""
    order = jnp.nonzero(active.ravel(), size=-(-active.size // rows) * rows, fill_value=active.size)[0]
    step = lambda i, carry: body(jax.lax.dynamic_slice_in_dim(order, i * rows, rows), carry)  # noqa: E731
    return jax.lax.fori_loop(0, -(-active.sum() // rows), step, carry)


def pick(values: Float[Array, "b l *rest"] | Any, index: Index) -> Any:
    """Values [B, L, ...] at positions: [R, ...]. Out of range, those of the last position."""
    return values.reshape(-1, *values.shape[2:]).at[index].get(mode="clip")


def put(values: Any, index: Index, new: Any) -> Any:
    """Values [B, L, ...] with the new ones [R, ...] at positions."""
    return values.reshape(-1, *values.shape[2:]).at[index].set(new, mode="drop").reshape(values.shape)


def sum_over_positions(
    network: Network, x: Tokens, sigma: PerSequence, active: Mask, term: Callable, *values: Any
) -> PerSequence:
    """The sum over the active positions of each sequence of term(log_score [R, 1, N], sigma [R, 1], x [R, 1], ...), by
    one network call. values: [B, L, ...]; term gets them at its positions, [R, 1, ...], behind its other arguments."""

    def local(head, features, x, sigma, active, *values):
        length = x.shape[1]

        def add(index, sums):
            sequence = index // length
            at = lambda values: pick(values, index)[:, None]  # noqa: E731
            level = sigma.at[sequence].get(mode="clip")
            log_score = network.log_score(head, at(features), at(x), level)
            new = term(log_score, level[:, None], at(x), *map(at, values))[:, 0]
            return sums.at[sequence].add(new, mode="drop")

        return for_chunks(active, chunk_size(x.size), add, jnp.zeros(len(x)))

    return network.on_shards(local)(network.head, network.features(x, sigma), x, sigma, active, *values)
