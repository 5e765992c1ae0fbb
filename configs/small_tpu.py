"""`small.py` for training from scratch on TPUs: 6 heads of 128, the width of a TPU's matrix unit, for 12 of 64.

    python -m sedd_jax.train --config=configs/small_tpu.py --workdir=DIR

FLOPs and parameters are the same; the products of attention take half the time. Published figures and weights are of 12
heads. Bytes of a step: docs/tpu.md. Hardware: 16 TPU v5e and up. Not run on this hardware.
Smoke form, two minutes on a laptop: --config=configs/small_tpu.py:smoke
"""

from ml_collections import ConfigDict

from configs import small, smoke


def get_config(form: str = "") -> ConfigDict:
    config = small.get_config()
    config.model.num_heads = 6
    return smoke.form(config, form)
