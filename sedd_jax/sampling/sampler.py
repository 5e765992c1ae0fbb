"""The options of a sampler: its time grid, and the truncation of its distributions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sedd_jax.errors import InputError, check_fields
from sedd_jax.rates import Absorbing, Graph
from sedd_jax.typing import Scalar

GRID_METHODS = ("analytic", "euler", "trapezoidal")  # with a time grid; the others count network calls
METHODS = (*GRID_METHODS, "first_hitting", "confidence", "entropy")
GRIDS = ("uniform", "cosine")
END_TIME = 1e-5  # the time where the reverse steps end and the denoising step follows


def grid_time(grid: str, progress: Scalar) -> Scalar:
    """The time at a progress from 0 (t = 1) to 1 (END_TIME). 'uniform' is the paper's. 'cosine' takes small steps while
    few tokens are known: MaskGIT's schedule (arXiv 2202.04200) with t in the place of the masked fraction."""
    share = 1 - progress if grid == "uniform" else jnp.cos(jnp.pi / 2 * progress)
    return END_TIME + (1 - END_TIME) * share


@dataclass(frozen=True)
class Truncation:
    """A narrower distribution than the model's. Samples follow no process with a reported likelihood, at lower entropy.
    What is narrowed is a position's distribution given the others, see `rates.Graph.narrow`. temperature: probabilities
    are raised to 1 / temperature. top_k: only the k likeliest tokens, 0 for all. top_p: only the likeliest tokens with
    this share of the mass together (Holtzman et al., arXiv 1904.09751). In this order."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        # The least and the most that float32 has.
        check_fields("sampling", vars(self), temperature="[1e-30, 1e30]", top_k="[0, 2^31)", top_p="[1e-30, 1]")

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


@dataclass(frozen=True)
class Sampler:
    """How to run the chain backwards.
    method: 'analytic' (Tweedie tau-leaping), 'euler', 'trapezoidal' (smaller error, two calls per step), or for the
        absorbing graph 'first_hitting' (exact in time), 'confidence' or 'entropy' (the most certain positions first);
        see `sampling.methods`. With the absorbing graph and the log-linear schedule, analytic and Euler are one.
    grid: of the times, see `grid_time`; only for GRID_METHODS.
    entropy_budget, remask: of 'entropy', in nats per call, and of 'confidence': see `methods.ordered`.
    corrector_steps: after each step, one call each; corrector_size: as a fraction of the step's own change of sigma.
    temperature, top_k, top_p: see `Truncation`; biased.
    precision: 'exact', or 'reference' for draws that cut off rare outcomes as the reference implementation does.
    rows: log-scores [rows, N] that exist at a time. Raises InputError for a value that is unknown or out of range."""

    method: str = "analytic"
    grid: str = "uniform"
    corrector_steps: int = 0
    corrector_size: float = 0.5
    entropy_budget: float = 0.1
    remask: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    precision: str = "exact"
    rows: int = 512

    def __post_init__(self):
        choices = {"method": METHODS, "precision": ("exact", "reference"), "grid": GRIDS}
        spans = dict.fromkeys(("corrector_steps", "remask"), "[0, 2^31)") | {"rows": "[1, 2^31)"}
        spans |= {"corrector_size": "(0, 1]", "entropy_budget": "[0, 1e30]"}
        check_fields("sampling", vars(self), **choices, **spans)
        if self.remask and self.method != "confidence":
            raise InputError(f"sampling.remask={self.remask} needs method='confidence'; else set it to 0")
        if self.corrector_steps and self.method not in GRID_METHODS:
            raise InputError(f"sampling.method={self.method!r} has no time grid to correct on; set corrector_steps=0")
        self.truncation  # noqa: B018 (checks the values)

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.temperature, self.top_k, self.top_p)

    def check(self, graph: Graph, steps: int, *, constrained: bool = False) -> None:
        """Raises InputError if the method does not support the graph or rules for the text, or for steps < 1."""
        exact = self.method == "first_hitting" and self.precision == "exact" and (self.top_k, self.top_p) == (0, 1)
        if constrained and not exact:
            what = f"holes with a rule need sampling method 'first_hitting' (not {self.method!r}), precision 'exact'"
            raise InputError(f"{what}, top_k 0 and top_p 1: their law is exact nowhere else")
        if self.method not in GRID_METHODS and not isinstance(graph, Absorbing):
            what = f"sampling.method={self.method!r} needs the absorbing graph, where a position changes once"
            raise InputError(f"{what}; choose one of {', '.join(GRID_METHODS)}")
        if not 1 <= steps < 1 << 31:
            raise InputError(f"sampling steps={steps} must be at least 1 (and below 2^31)")
