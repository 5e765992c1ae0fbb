"""SEDD small on FineWeb-Edu: newer and cleaner text than OpenWebText; otherwise `small.py`.

    hf download HuggingFaceFW/fineweb-edu --repo-type=dataset --include='sample/100BT/*' --local-dir=fineweb_edu_text
    python -m sedd_jax.prepare --data='fineweb_edu_text/**/*.parquet' --valid_fraction=0.001 --tokenizer=gpt2 \
        --tokenizer_path=/data/gpt2 --output=fineweb_edu
    python -m sedd_jax.train --config=configs/fineweb_edu.py --workdir=DIR

Hardware: 8 H100 or 16 TPU v5e. Hours: 8 or 20, estimates (docs/recipes.md). Not run on this hardware.
Smoke form, two minutes on a laptop: --config=configs/fineweb_edu.py:smoke
Expect: no published figures with SEDD; compare with the zero-shot figures of small.py.
"""

from ml_collections import ConfigDict

from configs import small, smoke


def get_config(form: str = "") -> ConfigDict:
    config = small.get_config()
    config.data.source = "shards:fineweb_edu"
    config.train.steps = 200_000  # x 524,288 = 105 billion tokens: about once through the sample
    return smoke.form(config, form)
