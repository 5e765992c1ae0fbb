"""A model to watch: trains on the text that comes with Python, on two CPU cores, in minutes."""

from ml_collections import ConfigDict

from configs import small


def get_config() -> ConfigDict:
    config = small.get_config()
    config.model.update({"num_layers": 4, "dim": 256, "num_heads": 4, "dtype": "float32"})
    config.data.update({"source": "embedded", "valid_fraction": 0.1, "tokenizer": "bytes", "length": 256})
    config.optim.warmup_steps = 200
    config.train.update(
        {
            "steps": 1000,
            "batch_size": 16,
            "ema_decay": 0.999,
            "log_every": 10,
            "eval_every": 250,
            "sample_every": 250,
            "checkpoint_every": 250,
            "keep_period": 0,
        }
    )
    config.eval.update({"num_times": 8, "num_sequences": 0, "batch_size": 32})
    config.sampling.update({"num": 4, "steps": 64})
    return config
