"""How fast a training step is beside a bare forward pass and beside the floor that a matrix product sets.

    python -m benchmarks.train_step [--config=configs/baseline.py] [--repeats=5]

The floor is the FLOPs of `metrics.train_flops_per_token` at the rate of a large float32 (or bfloat16) matrix product of
the same process. Rounds alternate between the three, and medians are reported, because a shared machine drifts.
"""

import json
import statistics
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from sedd_jax import sharding
from sedd_jax.config import build
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.loop import TrainOptions
from sedd_jax.training.metrics import matmul_rate, train_flops_per_token
from sedd_jax.training.state import init_state
from sedd_jax.training.step import make_train_step

config_flags.DEFINE_config_file("config", "configs/baseline.py")
flags.DEFINE_integer("vocab_size", 257, "Tokens, without MASK.")
flags.DEFINE_integer("repeats", 5, "Rounds.")


def main(_):
    config = flags.FLAGS.config
    experiment = make_experiment(config, flags.FLAGS.vocab_size)
    options = build(TrainOptions, "train", config)
    model, mesh, length = experiment.model, experiment.mesh, config.data.length
    tokens = np.random.default_rng(0).integers(0, flags.FLAGS.vocab_size, (options.batch_size, length)).astype(np.int32)
    flops = train_flops_per_token(model, length) * tokens.size
    with jax.set_mesh(mesh):
        batch, sigma = sharding.place_batch(tokens, mesh), np.ones(len(tokens), np.float32)
        state = init_state(jax.random.key(0), model, experiment.optimizer, mesh)
        step = make_train_step(
            model, experiment.graph, experiment.noise, experiment.optimizer, mesh, decay=options.ema_decay
        )
        forward = jax.jit(lambda params, x, sigma: model.apply({"params": params}, x, sigma))

        def timed(call):
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            return result, time.perf_counter() - start

        rounds = []
        for _ in range(flags.FLAGS.repeats + 1):
            _, forward_seconds = timed(lambda state=state: forward(state.params, batch, sigma))
            (state, _), step_seconds = timed(lambda state=state: step(state, jax.random.key(1), batch))
            rounds.append((forward_seconds, step_seconds))
    rates = [matmul_rate(dtype=model.dtype) for _ in range(flags.FLAGS.repeats)]
    forward_seconds, step_seconds = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    floor = flops / statistics.median(rates)
    figures = {
        "step_tokens_per_second": tokens.size / step_seconds,
        "forward_tokens_per_second": tokens.size / forward_seconds,
        "step_over_forward": step_seconds / forward_seconds,
        "matmul_gflops": statistics.median(rates) / 1e9,
        "floor_seconds": floor,
        "step_seconds": step_seconds,
        "step_over_floor": step_seconds / floor,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
