"""SEDD on One Billion Words: windows of 128 tokens of bert-base-uncased, 12 blocks, width 768.

    hf download google-bert/bert-base-uncased tokenizer.json
    python -m sedd_jax.prepare --data=tfds:lm1b --valid_data=tfds:lm1b@test --tokenizer=huggingface \
        --tokenizer_path=google-bert/bert-base-uncased --output=lm1b
    python -m sedd_jax.train --config=configs/lm1b.py --workdir=DIR \
        --config.data.source=shards:lm1b --config.data.valid_source=shards:lm1b

Without the preparation the corpus is tokenised at each start. Sentences are packed, each closed by [SEP].
Hardware: 8 H100. Hours: 4, an estimate (docs/recipes.md). Not run on this hardware.
Smoke form, two minutes on a laptop: --config=configs/lm1b.py:smoke
Expect: a perplexity of 32.79 or less on the test split with the absorbing graph, 40.25 with the uniform one (Lou et
al., table 3), per token of this vocabulary, which lower-cases: bits per byte do not compare. The paper does not give
the number of updates; a million are a choice.
"""

from ml_collections import ConfigDict

from configs import small, smoke


def get_config(form: str = "") -> ConfigDict:
    config = small.get_config()
    config.data.update(
        {
            "source": "tfds:lm1b",
            "valid_source": "tfds:lm1b@test",
            "tokenizer": "huggingface",
            "tokenizer_path": "google-bert/bert-base-uncased",
            "vocab_size": 30_522,
            "length": 128,
        }
    )
    config.train.steps = 1_000_000  # x 512 x 128 = 65,536 tokens per step
    return smoke.form(config, form)
