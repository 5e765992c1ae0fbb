"""The setting in which implementations are compared (docs/benchmarks.md): byte-level, on the text of Python.

    python -m sedd_jax.train --config=configs/baseline.py --workdir=DIR
    python -m sedd_jax.train --config=configs/baseline.py --workdir=DIR \
        --config.graph.kind=uniform --config.noise.kind=geometric

Hardware: 2 CPU cores, 25 to 45 minutes each. Result: 2.737 bits per byte, uniform 3.383 (docs/benchmarks.md).
"""

from ml_collections import ConfigDict

from configs import small


def get_config() -> ConfigDict:
    config = small.get_config()
    config.model.update({"num_layers": 4, "dim": 256, "num_heads": 4, "dtype": "float32"})
    config.data.update(
        {"source": "embedded", "valid_fraction": 0.1, "tokenizer": "bytes", "vocab_size": None, "length": 256}
    )
    config.optim.warmup_steps = 200
    config.train.update(
        {
            "steps": 1000,
            "batch_size": 16,  # x 256 bytes = 4096 per step, 10 epochs in all
            "ema_decay": 0.999,
            "log_every": 10,
            "eval_every": 500,
            "sample_every": 500,
            "checkpoint_every": 250,
            "keep_period": 0,
        }
    )
    config.eval.update({"num_times": 16, "num_sequences": 0, "batch_size": 32})
    config.sampling.update({"num": 4, "steps": 64})
    return config
