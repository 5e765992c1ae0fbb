"""The study: three models of equal size and budget on the King James Bible, one command each.

    python -m sedd_jax.train --config=configs/study.py:absorbing --workdir=runs/study/absorbing    (ar, uniform)

Hardware: 2 CPU cores. Hours, figures and their errors: docs/benchmarks.md. data.source names the text: a plain file of
4,175,752 bytes, one verse a line, in the public domain.
"""

from ml_collections import ConfigDict

from configs import tiny

MODELS = {
    "ar": {"objective": "ar"},
    "absorbing": {},
    "uniform": {"graph": {"kind": "uniform"}, "noise": {"kind": "geometric"}},
}


def get_config(model: str = "absorbing") -> ConfigDict:
    config = tiny.get_config()
    if model not in MODELS:
        raise ValueError(f"{model} is no model of it; give one of {', '.join(MODELS)}")
    config.update(MODELS[model])
    # At most 4 million parameters: averages in bfloat16 are a file of 8 MB.
    config.model.update({"num_layers": 4, "dim": 256, "num_heads": 4, "cond_dim": 32})
    config.data.update({"source": "kjv.txt", "valid_fraction": 0.02, "vocab_size": 1024})
    config.train.update({"steps": 5000, "batch_size": 16, "ema_decay": 0.998})
    config.train.update(
        dict.fromkeys(("eval_every", "checkpoint_every"), 500) | {"log_every": 20, "sample_every": 1000}
    )
    config.eval.update({"num_times": 8, "num_sequences": 128})
    return config
