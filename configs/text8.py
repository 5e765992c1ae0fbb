"""SEDD on text8: windows of 256 characters out of 27, 12 blocks, width 768. Bits per token are bits per character.

    python -m sedd_jax.train --config=configs/text8.py --workdir=DIR        (text8 in the current directory)
    python -m sedd_jax.evaluate --workdir=DIR --data=text8:text8@test --num_times=1000

The file is from mattmahoney.net/dc/text8.zip, with the customary split: 90 M characters to train, 5 M to validate
(during training), 5 M to test.
Hardware: 8 H100. Hours: 6, an estimate (docs/recipes.md). Not run on this hardware.
Smoke form, two minutes on a laptop: --config=configs/text8.py:smoke
Expect: 1.39 bits per character or less on the test part with the absorbing graph, 1.47 with the uniform one (Lou et
al., table 2). The paper does not give the number of updates; a million are a choice.
"""

from ml_collections import ConfigDict

from configs import small, smoke


def get_config(form: str = "") -> ConfigDict:
    config = small.get_config()
    config.data.update(
        {
            "source": "text8:text8@train",
            "valid_source": "text8:text8@valid",
            "tokenizer": "text8",
            "vocab_size": 27,
            "length": 256,
        }
    )
    config.train.steps = 1_000_000  # x 512 x 256 = 131,072 characters per step: 1456 epochs
    return smoke.form(config, form)
