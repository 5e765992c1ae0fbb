"""SEDD medium on OpenWebText: 24 blocks, width 1024, 16 heads; otherwise `small.py`.

    python -m sedd_jax.train --config=configs/medium.py --workdir=DIR --config.data.source='/data/owt/*.jsonl' \
        --config.data.tokenizer_path=/data/gpt2.model

Hardware: 32 TPU v5e or 8 H100 and up; 424 M parameters. Not run here: no such hardware was at hand.
"""

from ml_collections import ConfigDict

from configs import small


def get_config() -> ConfigDict:
    config = small.get_config()
    config.model.update({"num_layers": 24, "dim": 1024, "num_heads": 16, "remat": "blocks"})
    config.mesh.update({"data": 1, "fsdp": -1})
    return config
