"""Texts of a regular language, sampled exactly: an automaton over tokens, messages along holes, weights of samples.

In one network call the predictions pi_i of masked positions are independent. A hole reads its tokens from a start state
s; the chance that the rest of it ends in an accepting state is b_i(s) = sum over tokens a of pi_i(a) b_i+1(move(s, a)),
and the mass Z of the constraint the product of the b of all holes at their starts. A text drawn forwards by
pi_i(a) b_i+1(move(s, a)) / b_i(s) follows the product law given the constraint. The sampler keeps those of its tokens
whose turn it is. By their mass Z' then, a sample's weight grows by Z / Z', so that its mean is the probability of the
constraint, and weighted samples follow the law of the unconstrained sampler given it (docs/constrained.md)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.categorical import fine_uniform, quantile
from sedd_jax.typing import Keys, Mask, PerSequence

NEVER = -1e30  # the logarithm of an impossible event: finite, so that differences are no NaN
ROW = 32  # members of a group that are summed at a time

LogMasses = Float[Array, "b h c"]
Column = Float[np.ndarray, " n"]
After = Float[Array, "h b s"]
Origin = Int[Array, " b"]


class Groups(NamedTuple):
    """Numbers divided into groups, some in none. sizes [groups]; members [rows, ROW]: numbers of one group, filled up
    with one that is out of range; owner [rows]: the group of each row."""

    sizes: Any
    members: Any
    owner: Any


class Automaton(NamedTuple):
    """A deterministic automaton over tokens [V], in which tokens with the same moves from all states are one class. A
    move leads from the state `source` with a class `label` to the state `target`, all [moves]; what no move allows is
    forbidden. classes: of tokens. class_of [V]: the class of each token, -1 without any move. by_source: the moves of
    each state. accepting [states]: where a hole may end. Classes and moves are few, so nothing is [states, V]."""

    classes: Groups
    class_of: Any
    source: Any
    label: Any
    target: Any
    by_source: Groups
    accepting: Any


class Rules(NamedTuple):
    """Which positions of each sequence the automaton reads.
    places [B, H]: in ascending order, L for none. starts [B, H]: the state of a hole that begins there, or -1. ends
    [B, H]: whether one ends there. group [B]: an ascending number of the window; equal windows are neighbours, and one
    population. number [B]: of the sequence; a repeated one only fills a batch up."""

    places: Any
    starts: Any
    ends: Any
    group: Any
    number: Any


class Constraint(NamedTuple):
    automaton: Automaton
    rules: Rules


class Population(NamedTuple):
    """log_weight [B]: their mean e^log_weight over a window's samples estimates the probability of the constraint.
    origin [B]: number of the sequence that a sample stems from. level [B, L]: see `Process.hitting_levels`."""

    log_weight: PerSequence
    origin: Origin
    level: Float[Array, "b l"]


def grouped(owner: np.ndarray, num: int) -> Groups:
    """Groups 0 to num - 1 of the numbers of `owner` [n], which has the group of each, or -1."""
    order = np.argsort(owner, kind="stable")[np.sum(owner < 0) :]
    parts = [
        (group, part[start : start + ROW])
        for group, part in enumerate(np.split(order, np.searchsorted(owner[order], np.arange(1, num))))
        for start in range(0, len(part), ROW)
    ]
    members = np.full((len(parts), ROW), len(owner), np.int32)
    for row, (_, part) in zip(members, parts, strict=True):
        row[: len(part)] = part
    sizes = np.bincount(owner[order], minlength=num).astype(np.int32)
    return Groups(sizes, members, np.array([group for group, _ in parts], np.int32))


def log_sums(values: Float[Array, "*b n"], groups: Groups) -> Float[Array, "*b m"]:
    """The logarithm of the sum of e^values over each group, of which none is larger than float32 resolves."""
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)], constant_values=NEVER)
    rows = jnp.maximum(values, NEVER)[..., groups.members]
    rows = rows.max(-1) + jnp.log(jnp.exp(rows - rows.max(-1, keepdims=True)).sum(-1))
    nothing = jnp.full((*values.shape[:-1], len(groups.sizes)), NEVER)
    top = nothing.at[..., groups.owner].max(rows)
    total = jnp.zeros_like(top).at[..., groups.owner].add(jnp.exp(rows - top[..., groups.owner]))
    return top + jnp.log(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))


def certain(classes: Int[Array, "b h"], num: int) -> LogMasses:
    """Log-masses of known classes."""
    return jnp.where(jnp.arange(num) == classes[..., None], 0.0, NEVER)


def messages(constraint: Constraint, log_pi: LogMasses) -> tuple[After, PerSequence]:
    """log b_i+1 of every state behind each place, and log Z."""
    automaton, rules = constraint
    accepting = jnp.where(automaton.accepting, 0.0, NEVER)

    def back(carry, place):
        after, log_z = carry
        log_pi, start, end = place
        after = jnp.where(end[:, None], accepting, after)
        before = log_sums(log_pi[:, automaton.label] + after[:, automaton.target], automaton.by_source)
        at_start = jnp.take_along_axis(before, jnp.maximum(start, 0)[:, None], axis=1)[:, 0]
        return (before, log_z + jnp.where(start >= 0, at_start, 0)), after

    begin = jnp.zeros((len(log_pi), len(accepting))), jnp.zeros(len(log_pi))
    places = [array.swapaxes(0, 1) for array in (log_pi, rules.starts, rules.ends)]
    (_, log_z), after = jax.lax.scan(back, begin, places, reverse=True)
    return after, log_z


def draw_classes(keys: Keys, constraint: Constraint, log_pi: LogMasses, after: After) -> Int[Array, "b h"]:
    """The classes of a text that meets the constraint, by the product law given it. after: of `messages`."""
    automaton, rules = constraint
    uniform = jax.vmap(lambda key: fine_uniform(key, (log_pi.shape[1], 2)))(keys)

    def forth(state, place):
        log_pi, start, uniform, after = place
        state = jnp.where(start >= 0, start, state)
        moves = log_pi[:, automaton.label] + after[:, automaton.target]
        moves = jnp.where(automaton.source == state[:, None], moves, -jnp.inf)
        move = quantile(uniform, jnp.exp(moves - moves.max(-1, keepdims=True)))
        return automaton.target[move], automaton.label[move]

    places = [*(array.swapaxes(0, 1) for array in (log_pi, rules.starts, uniform)), after]
    return jax.lax.scan(forth, jnp.zeros(len(log_pi), jnp.int32), places)[1].T


def resampled(uniform: PerSequence, rules: Rules, log_weight: PerSequence, missing: Mask) -> tuple[Origin, PerSequence]:
    """The sequences that take the places of all, and their weights: systematic resampling of each population whose
    effective size is below half of it. missing [B, L]: where tokens are missing; complete samples stay."""
    count = len(log_weight)
    numbers, group = jnp.arange(count), rules.group - rules.group[0]
    alive = (rules.number != jnp.roll(rules.number, 1)) | (numbers == 0)
    total = lambda values: jax.ops.segment_sum(values, group, count)[group]  # noqa: E731
    top = jax.ops.segment_max(log_weight, group, count)[group]
    weight = jnp.where(alive, jnp.exp(log_weight - top), 0)
    size, mass = total(alive.astype(jnp.float32)), total(weight)
    share = weight / mass
    poor = (1 / total(share**2) < size / 2) & missing.any(1)
    # Shares of a population end where the next begins, since each has the sum of its size.
    first = jnp.searchsorted(group, group)
    last = jax.ops.segment_max(jnp.where(alive, numbers, 0), group, count)[group]
    point = jnp.cumsum(alive) - 1 + uniform[first]
    chosen = jnp.clip(jnp.searchsorted(jnp.cumsum(share * size), point, side="right"), first, last)
    mean = top + jnp.log(mass / size)
    return jnp.where(poor & alive, chosen, numbers), jnp.where(poor, mean, log_weight)


def probability(log_weight: Column, origin: Int[np.ndarray, " n"]) -> tuple[float, float, Column]:
    """The probability of the constraint, its standard error (NaN for a single sample), and weights that sum to 1.
    Samples of one origin are dependent: the error is by the spread of their sums (Chan and Lai, Ann. Stat. 2013)."""
    log_weight, count = np.asarray(log_weight, np.float64), len(log_weight)
    weight = np.exp(log_weight - log_weight.max())
    mean, weight = np.exp(log_weight.max()) * weight.mean(), weight / weight.sum()
    spread = np.square(np.bincount(np.unique(origin, return_inverse=True)[1], weight)).sum() - 1 / count
    error = mean * np.sqrt(max(spread, 0.0) * count / (count - 1)) if count > 1 else float("nan")
    return float(mean), float(error), weight
