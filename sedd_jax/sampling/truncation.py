"""Temperature, top-k and top-p: a narrower distribution than the model's, on purpose.

They change what is sampled: the samples follow no process whose likelihood is reported, and their entropy is lower.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.errors import InputError


@dataclass(frozen=True)
class Truncation:
    """temperature: the ratios are raised to 1 / temperature. top_k: only the k likeliest tokens, 0 for all. top_p: only
    the likeliest tokens that have this share of the mass together (Holtzman et al., arXiv 1904.09751). In this order.

    Raises InputError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"sampling temperature={self.temperature} must be above 0; 1 samples the model itself")
        if self.top_k < 0:
            raise InputError(f"sampling top_k={self.top_k} must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")

    def log_probs(self, logits: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Normalised log-probabilities of softmax(logits), narrowed; tokens as likely as the last one kept are kept."""
        log_p = jax.nn.log_softmax(logits / self.temperature)
        if 0 < self.top_k < log_p.shape[-1]:
            least = jax.lax.top_k(log_p, self.top_k)[0][..., -1:]
            log_p = jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))
        if self.top_p < 1:
            ranked = jnp.sort(log_p, axis=-1, descending=True)
            mass_above = jnp.cumsum(jnp.exp(ranked), axis=-1) - jnp.exp(ranked)
            least = jnp.min(ranked, axis=-1, keepdims=True, initial=jnp.inf, where=mass_above < self.top_p)
            log_p = jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))
        return log_p

    def of_score(self, log_score: Float[Array, "*shape n"], x: Int[Array, "*shape"]) -> Float[Array, "*shape n"]:
        """Log-scores whose sum of scores at y != x is the same, so that as much moves as before, elsewhere to."""
        if self == Truncation():
            return log_score
        other = jnp.arange(log_score.shape[-1]) != x[..., None]
        before = jnp.where(other, log_score, -jnp.inf)
        total = jax.nn.logsumexp(before, axis=-1, keepdims=True)
        return jnp.where(other, self.log_probs(before) + total, log_score)
