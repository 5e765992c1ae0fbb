"""Weights of other implementations."""

from sedd_jax.interop.official_files import load, load_official, save_official

__all__ = ["load", "load_official", "save_official"]
