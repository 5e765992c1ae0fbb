"""Time grids: where between t = 1 and the end the reverse steps are taken."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sedd_jax.errors import InputError

# Where the reverse process stops and the final denoising step takes over.
END_TIME = 1e-5

GRIDS = ("uniform", "cosine")


def check(grid: str) -> None:
    if grid not in GRIDS:
        raise InputError(f"sampling grid {grid!r} is unknown; choose one of {', '.join(GRIDS)}")


def time(grid: str, progress: Float[Array, ""]) -> Float[Array, ""]:
    """The time at a progress from 0 (t = 1) to 1 (END_TIME).

    'uniform' is what the paper uses. 'cosine' takes small steps first, while little is there to go by, and large ones
    at the end (the schedule of MaskGIT, arXiv 2202.04200, with t in the place of the masked fraction).
    """
    share = 1 - progress if grid == "uniform" else jnp.cos(jnp.pi / 2 * progress)
    return END_TIME + (1 - END_TIME) * share
