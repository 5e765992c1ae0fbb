"""How many tokens per second the loader yields by itself, in one process, and how much memory that takes.

python -m benchmarks.loader [--config=configs/baseline.py --config.data.source=shards:DIR] [--batches=500]
python -m benchmarks.loader --random_tokens=200000000      # from shards made for it, without text
"""

import json
import pathlib
import resource
import tempfile
import time

import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from sedd_jax.config import build
from sedd_jax.data import dataset, preparation, shards
from sedd_jax.data.loader import Loader

config_flags.DEFINE_config_file("config", "configs/baseline.py")
flags.DEFINE_integer("batches", 500, "Number of batches to read; 0 for an epoch.")
flags.DEFINE_integer("random_tokens", 0, "Reads shards of so many random bytes, made in a temporary directory.")
flags.DEFINE_integer("record_tokens", preparation.Plan.record_tokens, "Tokens per record of these.")


def make_shards(root: pathlib.Path, num_tokens: int, record_tokens: int, per_shard: int = 1 << 24) -> None:
    plan = preparation.Plan("random", record_tokens=record_tokens)
    generator = np.random.default_rng(0)
    made = []
    with preparation.begin(plan, root):
        for split, total in (("train", num_tokens), ("valid", 100_000)):
            for number, start in enumerate(range(0, total, per_shard)):
                tokens = generator.integers(256, size=min(per_shard, total - start), dtype=np.uint16)
                path = root / f"{split}-{number:05d}-00000.array_record"
                shards.write_records(path, tokens, record_tokens)
                size, digest = path.stat().st_size, shards.sha256(path)
                made.append(shards.Shard(path.name, len(tokens), 1, len(tokens), len(tokens), size, digest, ""))
        preparation.finish(plan, root, made)


def resident_megabytes() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(config) -> dict:
    data = build(dataset.load, "data", config, directory=epath.Path("/nonexistent"))
    loader = Loader(data.train, length=data.length, batch_size=config.train.batch_size, seed=0)
    for _ in range(20):
        next(loader)
    batches = flags.FLAGS.batches or int(loader.batches_per_epoch)
    start, busy, memory = time.perf_counter(), time.process_time(), [resident_megabytes()]
    for number in range(batches):
        batch = next(loader)
        if number % -(-batches // 4) == 0:
            memory.append(resident_megabytes())
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    memory.append(resident_megabytes())
    return {
        "tokens_per_second": batch.size * batches / seconds,
        # The rate of an exclusive core, where other programs share it.
        "tokens_per_cpu_second": batch.size * batches / busy,
        "epochs": batches / loader.batches_per_epoch,
        "batch": list(batch.shape),
        "resident_megabytes": memory,
    }


def main(_):
    config = flags.FLAGS.config
    with tempfile.TemporaryDirectory() as folder:
        if flags.FLAGS.random_tokens:
            make_shards(pathlib.Path(folder), flags.FLAGS.random_tokens, flags.FLAGS.record_tokens)
            config.data.source = f"shards:{folder}"
        print(json.dumps(measure(config)))


if __name__ == "__main__":
    app.run(main)
