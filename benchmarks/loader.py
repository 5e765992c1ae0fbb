"""How many tokens per second the loader yields by itself, in one process.

python -m benchmarks.loader [--config=configs/baseline.py] [--batches=500]
"""

import json
import time

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from sedd_jax.config import build
from sedd_jax.data import dataset
from sedd_jax.data.loader import Loader

config_flags.DEFINE_config_file("config", "configs/baseline.py")
flags.DEFINE_integer("batches", 500, "To draw.")


def main(_):
    config = flags.FLAGS.config
    data = build(dataset.load, "data", config, directory=epath.Path("/nonexistent"))
    loader = Loader(
        data.train, length=data.length, batch_size=config.train.batch_size, seed=0, process_index=0, process_count=1
    )
    next(loader)
    start = time.perf_counter()
    for _ in range(flags.FLAGS.batches):
        batch = next(loader)
    seconds = time.perf_counter() - start
    print(json.dumps({"tokens_per_second": batch.size * flags.FLAGS.batches / seconds, "batch": list(batch.shape)}))


if __name__ == "__main__":
    app.run(main)
