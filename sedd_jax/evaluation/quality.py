"""Diversity of samples, and their perplexity under a judge.

Text that repeats itself has a low perplexity, and so has text sampled from truncated probabilities. So the perplexity
is read beside the diversity (Zheng et al. 2024, arXiv 2409.02908, section 4.2)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sedd_jax.errors import require_finite

N_GRAMS = (1, 2, 3)


def unigram_entropy(tokens: Int[np.ndarray, " n"]) -> float:
    """Entropy in nats of the frequencies of the tokens: log n where all differ, 0 where all are the same."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-np.sum(share * np.log(share)))


def distinct(tokens: Sequence[Int[np.ndarray, " _"]], n: int) -> float:
    """Number of different n-grams over number of n-grams, each within a sequence (Li et al., arXiv 1510.03055)."""
    grams = [gram for each in tokens for gram in zip(*(each[i:].tolist() for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def mean_and_stderr(name: str, values: Sequence[float]) -> dict[str, float]:
    """{name: mean, name_stderr: its standard error} over the values that are not NaN, NaN if they are too few."""
    known = np.asarray([value for value in values if not np.isnan(value)], np.float64)
    mean = known.mean() if len(known) else np.nan
    stderr = known.std(ddof=1) / len(known) ** 0.5 if len(known) > 1 else np.nan
    return {name: float(mean), f"{name}_stderr": float(stderr)}


def diversity(samples: Sequence[Int[np.ndarray, " _"]]) -> dict[str, float]:
    """Means over samples with standard errors, and distinct-n of all samples together."""
    figures = mean_and_stderr("unigram_entropy", [unigram_entropy(tokens) for tokens in samples])
    for n in N_GRAMS:
        figures |= mean_and_stderr(f"distinct_{n}", [distinct([tokens], n) for tokens in samples])
    return figures | {f"distinct_{n}_of_all": distinct(samples, n) for n in N_GRAMS}


def ratio(values: Float[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """The sum of values over the sum of counts, and its error to first order; NaN for a single pair."""
    num, total = len(values), counts.sum()
    rate = float(values.sum() / total)
    spread = np.sum((values - rate * counts) ** 2) * num / (num - 1) if num > 1 else np.nan
    return rate, float(np.sqrt(spread) / total)


def perplexity(nats: Float[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Generative perplexity: exp of nats per token over all samples, from the nats and the number of tokens of each.
    Standard errors are over samples, as in `ratio`. Raises TrainingError for nats that are not finite."""
    rate, error = ratio(np.asarray(require_finite(nats, f"nats of {len(nats)} samples"), np.float64), counts)
    value = float(np.exp(rate))
    figures = {"generative_perplexity": value, "generative_perplexity_stderr": value * error}
    return figures | {"nats_per_token": rate, "nats_per_token_stderr": error}
