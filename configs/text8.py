"""Character-level text8: 12 blocks, width 768, windows of 256 characters; bits per byte are bits per character.

    python -m sedd_jax.train --config=configs/text8.py --workdir=DIR --config.data.source=/data/text8

The file is one line of a-z and spaces. The last 5 % are the validation part, which differs from the customary split of
90 M / 5 M / 5 M in that the test characters are these. Hardware: 8 GPUs or TPUs. Not run here to the end: no such
hardware was at hand.
"""

from ml_collections import ConfigDict

from configs import small


def get_config() -> ConfigDict:
    config = small.get_config()
    config.data.update(
        {"source": "text8", "tokenizer": "bytes", "vocab_size": None, "length": 256, "valid_fraction": 0.05}
    )
    config.train.update({"steps": 1_000_000, "batch_size": 512})  # x 256 = 131,072 characters per step
    return config
