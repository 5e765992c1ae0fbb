"""Speed of a training step, against a forward pass, against the plain loss, and against its floor.

    python -m benchmarks.train_step [--config=configs/baseline.py] [--vocab_size=257] [--repeats=5] [--plain=False]
        [--profile]

The floor is the time of the step's matrix products at the rate of a large one (float32 or bfloat16, as the config says)
measured in the same rounds, plus the optimiser's bytes at the rate at which a large array is read and written in place.
The head's products are needed at noised positions only: half of them with the absorbing graph. "Plain" is the same step
with autodiff through the [B, L, N] log-scores. Rounds alternate, and medians are reported, because a shared machine
drifts.
"""

import json

import jax
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from benchmarks.rounds import medians, passes, products
from benchmarks.trace import milliseconds
from sedd_jax.devices import sharding
from sedd_jax.score_entropy import denoising_loss, diffuse
from sedd_jax.training.experiment import Experiment, make_experiment
from sedd_jax.training.flops import train_flops_per_token
from sedd_jax.training.state import TrainState
from sedd_jax.training.step import ema_decay

config_flags.DEFINE_config_file("config", "configs/baseline.py")
flags.DEFINE_integer("vocab_size", 257, "Tokens, without MASK.")
flags.DEFINE_integer("repeats", 5, "Rounds.")
flags.DEFINE_bool("plain", True, "Also time the step with the plain loss.")
flags.DEFINE_bool("profile", False, "Also profile the step.")

# Per float32 parameter: clip reads the gradient; AdamW and the average read gradient, weight, two moments and average,
# and write all but the gradient.
OPTIMIZER_BYTES = 4 * (1 + 5 + 4)


def plain_step(experiment: Experiment, decay: float):
    """The training step in the obvious way: one loss function, differentiated."""

    def step(state, key, tokens):
        noise_key, dropout_key = jax.random.split(key)

        def loss_fn(params):
            def score_fn(x, sigma):
                return experiment.model.apply({"params": params}, x, sigma, True, rngs={"dropout": dropout_key})

            noised = diffuse(noise_key, experiment.graph, experiment.noise, tokens)
            return denoising_loss(score_fn, experiment.graph, noised, tokens).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = experiment.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = ema_decay(decay, state.step)
        ema = jax.tree.map(lambda average, new: new + keep * (average - new), state.ema, params)
        return TrainState(state.step + 1, params, ema, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def main(_):
    config = flags.FLAGS.config
    experiment = make_experiment(config, flags.FLAGS.vocab_size)
    options = experiment.train
    model, mesh, length = experiment.model, experiment.mesh, config.data.length
    tokens = np.random.default_rng(0).integers(0, flags.FLAGS.vocab_size, (options.batch_size, length)).astype(np.int32)
    with jax.set_mesh(mesh):
        batch, sigma, key = sharding.place_batch(tokens, mesh), np.ones(len(tokens), np.float32), jax.random.key(1)
        # All steps share one state: each donates it and returns the next.
        state = experiment.init_state(jax.random.key(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        steps = {"step": experiment.train_step_fn()}
        if flags.FLAGS.plain:
            steps["plain"] = plain_step(experiment, options.ema_decay)
        forward = jax.jit(lambda params, x, sigma: model.apply({"params": params}, x, sigma))
        compiled = {name: step.lower(state, key, batch).compile() for name, step in steps.items()}
        memory = {name: program.memory_analysis() for name, program in compiled.items()}

        def run(step):
            nonlocal state
            state, result = step(state, key, batch)
            return state, result

        (matmul, flops), (pass_over, moved) = products(model.dtype), passes()
        seconds = medians(
            flags.FLAGS.repeats,
            matmul=matmul,
            pass_over=pass_over,
            forward=lambda: forward(state.params, batch, sigma),
            **{name: lambda step=step: run(step) for name, step in steps.items()},
        )
        profile = {}
        if flags.FLAGS.profile:
            profile = {"milliseconds": milliseconds(compiled["step"].as_text(), lambda: run(steps["step"]), 10)}
    rate = flops / seconds.pop("matmul") * jax.device_count()
    bandwidth = moved / seconds.pop("pass_over") * jax.device_count()
    needed = train_flops_per_token(model, length, experiment.head_share().mean()) * tokens.size
    full = train_flops_per_token(model, length) * tokens.size
    floor = needed / rate + OPTIMIZER_BYTES * parameters / bandwidth
    figures = {
        "tokens_per_second": {name: tokens.size / value for name, value in seconds.items()},
        "seconds": seconds,
        "temporary_megabytes": {name: value.temp_size_in_bytes / 1e6 for name, value in memory.items()},
        "matmul_gflops": rate / 1e9,
        "memory_gigabytes_per_second": bandwidth / 1e9,
        "floor_seconds": floor,
        "step_over_floor": seconds["step"] / floor,
        "step_over_forward": seconds["step"] / seconds["forward"],
        "mfu": needed / seconds["step"] / rate,
        "mfu_full": full / seconds["step"] / rate,
        "device": jax.devices()[0].device_kind,
    }
    if flags.FLAGS.plain:
        figures["plain_over_step"] = seconds["plain"] / seconds["step"]
    print(json.dumps(figures | profile))


if __name__ == "__main__":
    app.run(main)
