"""The short form of a recipe, to try a machine or a change with: two minutes at most on two CPU cores, no downloads.

    python -m sedd_jax.train --config=configs/small.py:smoke --workdir=DIR

Graph, noise, mesh and remat stay as in the recipe; model, windows and run are small. The corpus is the text that ships
with Python, with SentencePiece tokens trained on it, or bytes for a recipe of characters.
"""

from ml_collections import ConfigDict


def form(config: ConfigDict, name: str) -> ConfigDict:
    """`config` itself, or its form `name`: what follows the colon in --config. Raises ValueError for another name."""
    if name == "":
        return config
    if name != "smoke":
        raise ValueError(f"--config=...:{name}: a recipe has no form but smoke")
    characters = config.data.tokenizer == "text8"
    config.model.update({"num_layers": 2, "dim": 64, "num_heads": 4, "cond_dim": 32, "dtype": "float32"})
    config.data.update(
        {
            "source": "embedded",
            "valid_source": None,
            "valid_fraction": 0.1,
            "tokenizer": "bytes" if characters else "sentencepiece",
            "tokenizer_path": None,
            "vocab_size": None if characters else 512,
            "length": 64,
        }
    )
    config.optim.update({"lr": 1e-3, "warmup_steps": 10})
    config.train.update(
        {
            "steps": 200,
            "batch_size": 16,  # x 64 tokens = 1024 per step
            "ema_decay": 0.98,
            "log_every": 10,
            "eval_every": 100,
            "sample_every": 200,
            "checkpoint_every": 100,
            "keep_period": 0,
        }
    )
    config.eval.update({"num_times": 8, "num_sequences": 64, "batch_size": 16})
    config.sampling.update({"num": 2, "steps": 16})
    return config
