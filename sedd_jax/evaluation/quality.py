"""What samples are like, next to how likely a judge finds them.

A low perplexity is easily had by saying little: text that repeats itself is likely, and so is text drawn with truncated
probabilities. So the diversity of the samples stands beside it (Zheng et al. 2024, arXiv 2409.02908, section 4.2).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

N_GRAMS = (1, 2, 3)


def unigram_entropy(tokens: Int[np.ndarray, " n"]) -> float:
    """Entropy in nats of the frequencies of the tokens: log n where all differ, 0 where all are the same."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-np.sum(share * np.log(share)))


def distinct(tokens: Sequence[Int[np.ndarray, " _"]], n: int) -> float:
    """The share of different ones among all n-grams (within a sequence each) of the sequences; NaN if there are none
    (Li et al. 2016, arXiv 1510.03055)."""
    grams = [gram for each in tokens for gram in zip(*(each[i:].tolist() for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Over those that are not NaN. The error is NaN for fewer than two."""
    finite = np.asarray([value for value in values if not np.isnan(value)], np.float64)
    mean = finite.mean() if len(finite) else np.nan
    return float(mean), float(finite.std(ddof=1) / len(finite) ** 0.5) if len(finite) > 1 else float("nan")


def diversity(samples: Sequence[Int[np.ndarray, " _"]]) -> dict[str, float]:
    """Means over samples, with standard errors, and for distinct-n the figure of all samples together: it falls with
    their number, but it alone tells if samples are alike."""
    figures = {"unigram_entropy": mean_and_stderr([unigram_entropy(tokens) for tokens in samples])}
    figures |= {f"distinct_{n}": mean_and_stderr([distinct([tokens], n) for tokens in samples]) for n in N_GRAMS}
    summary = {}
    for name, (value, error) in figures.items():
        summary |= {name: value, f"{name}_stderr": error}
    return summary | {f"distinct_{n}_of_all": distinct(samples, n) for n in N_GRAMS}


def perplexity(nats: Float[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Generative perplexity: exp of nats per token over all samples, from the nats and the number of tokens of each.

    The errors are over samples, of a ratio of two means to first order; NaN for a single sample.
    """
    nats, total = np.asarray(nats, np.float64), counts.sum()
    rate = nats.sum() / total
    spread = np.sum((nats - rate * counts) ** 2) * len(nats) / (len(nats) - 1) if len(nats) > 1 else np.nan
    error = float(np.sqrt(spread) / total)
    return {
        "generative_perplexity": float(np.exp(rate)),
        "generative_perplexity_stderr": float(np.exp(rate) * error),
        "nats_per_token": float(rate),
        "nats_per_token_stderr": error,
    }
