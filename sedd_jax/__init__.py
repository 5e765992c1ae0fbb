"""Score entropy discrete diffusion (SEDD, arXiv 2310.16834) in JAX."""

__version__ = "0.2.0"
