"""Windows to sample for templates whose holes have rules or find their length."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError
from sedd_jax.generation.rules import Language
from sedd_jax.generation.templates import FREE, Window, parse_template
from sedd_jax.likelihood import Bound
from sedd_jax.training.trained import Trained
from sedd_jax.typing import Batch

MOST_ALTERNATIVES = 1024  # of one template; holes that find their length multiply
Posterior = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]


def alternatives(template: str, window: Window, tokenizer: Tokenizer, language: Language | None) -> list[Window]:
    """A window for each choice of lengths of the holes that can keep their rules; `window` itself where all is said.
    Raises InputError if there is none, or more than MOST_ALTERNATIVES."""
    ranges = [range(least, most + 1) for least, most in window.ranges]
    if (count := np.prod([len(sizes) for sizes in ranges], dtype=float)) > MOST_ALTERNATIVES:
        raise InputError(f"the template {template[:60]!r} has {count:.0f} lengths; {MOST_ALTERNATIVES} are the most")
    windows, length = [window], len(window.tokens)
    if count > 1:
        windows = [parse_template(template, tokenizer, length=length, sizes=n) for n in itertools.product(*ranges)]
    faults = [language and language.fault(window) for window in windows]
    if all(faults):
        raise InputError(f"the template {template[:60]!r} cannot be filled: {faults[-1]}")
    return [window for window, fault in zip(windows, faults, strict=True) if not fault]


def length_posterior(trained: Trained, windows: Sequence[Window], *, draws: int, seed: int = 0) -> Posterior:
    """The `posterior` of windows [n], equally likely beforehand, by the bound of their given tokens (holes and what is
    behind them unknown) from `draws` network calls. Raises InputError for a graph without such a bound."""
    tokens, key = np.stack([window.tokens for window in windows]), jax.random.key(seed)
    bound, batch = trained.experiment.bound_fn(draws), Batch(np.maximum(tokens, 0), never=tokens == FREE)
    measure = lambda batch, first: bound(trained.params, key, batch.tokens, first, *batch[1:])  # noqa: E731
    return posterior(trained.experiment.map_batches(measure, batch, 16, progress="lengths"))


def posterior(found: Bound) -> Posterior:
    """The probabilities [n] of alternatives that are equally likely beforehand, by the bound of what is known under
    each of them, and their standard errors [n], of the draws, to first order."""
    total, variance = np.asarray(found.total, np.float64), np.square(np.asarray(found.stderr, np.float64))
    probs = np.exp(total.min() - total)
    probs /= probs.sum()
    relative = (1 - 2 * probs) * variance + (probs**2 * variance).sum()
    return probs, probs * np.sqrt(np.maximum(relative, 0))


def choose(
    trained: Trained, windows: Sequence[Window], num: int, *, draws: int, seed: int
) -> tuple[list[Window], list[dict[str, Any]]]:
    """`num` of the alternatives, drawn by their posterior, equal ones side by side; and the posterior, for people."""
    if len(windows) == 1:
        return list(windows) * num, []
    probs, errors = length_posterior(trained, windows, draws=draws, seed=seed)
    counts = np.random.default_rng(seed).multinomial(num, probs)
    chosen = [window for window, count in zip(windows, counts, strict=True) for _ in range(count)]
    rows = zip((list(window.holes) for window in windows), probs.tolist(), errors.tolist(), strict=True)
    return chosen, [{"holes": sizes, "probability": p, "probability_stderr": error} for sizes, p, error in rows]
