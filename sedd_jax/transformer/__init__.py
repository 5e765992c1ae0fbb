"""The network: tokens and a noise level to log-scores."""

from sedd_jax.transformer.model import Transformer

__all__ = ["Transformer"]
