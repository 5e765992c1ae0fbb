"""A demonstration: learns words and layout of the text that ships with Python, on two CPU cores, in minutes.

    python -m sedd_jax.train --config=configs/tiny.py --workdir=runs/tiny        (or: make demo)

Hardware: 2 CPU cores. Result: 2.00 bits per byte in 5 to 9 minutes (docs/benchmarks.md).
--config=configs/tiny.py:paper has the optimiser of the paper, and 400 steps.
"""

from ml_collections import ConfigDict

from configs import small


def get_config(recipe: str = "fast") -> ConfigDict:
    config = small.get_config()
    if recipe not in ("fast", "paper"):
        raise ValueError(f"{recipe} is no recipe of it; give fast or paper")
    config.model.update({"num_layers": 3, "dim": 256, "num_heads": 4, "dtype": "float32"})
    # Most tokens are words: in minutes only a little order can be learnt, and it is then between words.
    config.data.update(
        {"source": "embedded", "valid_fraction": 0.1, "tokenizer": "sentencepiece", "vocab_size": 8192, "length": 128}
    )
    config.optim.update({"lr": 1e-3, "warmup_steps": 50})
    config.train.update(
        {
            "steps": 400,
            "batch_size": 16,  # x 128 tokens = 2048 per step
            "ema_decay": 0.99,
            "log_every": 10,
            "eval_every": 100,
            "sample_every": 100,
            "checkpoint_every": 100,
            "keep_period": 0,
        }
    )
    config.eval.update({"num_times": 16, "num_sequences": 0, "batch_size": 32})
    config.sampling.update({"num": 4, "steps": 128})
    if recipe == "fast":
        config.optim.update({"kind": "muon", "lr": 5e-3})
        config.train.update({"steps": 500} | dict.fromkeys(("eval_every", "sample_every", "checkpoint_every"), 250))
    return config
