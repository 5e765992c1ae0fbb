"""The autoregressive (AR) baseline of `baseline.py`: the same network, causal, without noise levels, by cross-entropy.

    python -m sedd_jax.train --config=configs/ar.py --workdir=DIR

Compare it at equal budget with the two commands of `baseline.py`. Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import baseline


def get_config() -> ConfigDict:
    config = baseline.get_config()
    config.objective = "ar"
    return config
