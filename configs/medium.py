"""SEDD medium on OpenWebText: 24 blocks, width 1024, 16 heads; otherwise `small.py`, where the data is prepared.

    python -m sedd_jax.train --config=configs/medium.py --workdir=DIR

Hardware: 8 H100, or 32 TPU v5e and up; 424 M parameters. Hours: 45 or 56, estimates (docs/recipes.md). Not run on this
hardware. Smoke form, two minutes on a laptop: --config=configs/medium.py:smoke
Expect zero-shot perplexities (Lou et al., table 1, absorbing): LAMBADA 42.77, WikiText-2 31.04, PTB 87.12,
WikiText-103 29.98, One Billion Words 61.19.
"""

from ml_collections import ConfigDict

from configs import small, smoke


def get_config(form: str = "") -> ConfigDict:
    config = small.get_config()
    config.model.update({"num_layers": 24, "dim": 1024, "num_heads": 16, "remat": "blocks"})
    config.mesh.update({"data": 1, "fsdp": -1})
    return smoke.form(config, form)
