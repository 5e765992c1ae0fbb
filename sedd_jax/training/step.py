"""The training step: one jitted, donated function that runs unchanged on any mesh."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from sedd_jax import sharding
from sedd_jax.noise import Noise
from sedd_jax.rates import Graph
from sedd_jax.score_entropy import Noised, denoising_loss, diffuse
from sedd_jax.training.state import TrainState, abstract_state

Metrics = dict[str, Float[Array, ""]]


def ema_decay(decay: float, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The paper's ramp: an average over the whole short past first, then over about 1 / (1 - decay) steps."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def split_microbatches(tree: Any, num: int) -> Any:
    """[B, ...] -> [num, B / num, ...]; microbatch m has the rows m, m + num, ..., so that a batch that is split over
    devices gives each of them its share of every microbatch, without moving a row."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, num, *a.shape[1:]), 1, 0), tree)


def make_train_step(
    model: nn.Module,
    graph: Graph,
    noise: Noise,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    decay: float,
    microbatches: int = 1,
) -> Callable[[TrainState, Key[Array, ""], Int[Array, "b l"]], tuple[TrainState, Metrics]]:
    """`step(state, key, tokens)` -> (next state, metrics); the state given is consumed.

    key: the run's key; the step folds its own number into it, so that a step depends on nothing but the state, the
        run's key and its batch.
    metrics: `loss` in nats per token (a draw of the diffusion part of the bound), `grad_norm` before the clip, of the
        gradient of nats per sequence.
    """

    def sequence_loss(params, key, noised: Noised, tokens):
        def score_fn(x, sigma):
            return model.apply({"params": params}, x, sigma, train=True, rngs={"dropout": key})

        return denoising_loss(score_fn, graph, noised, tokens).mean()

    def loss_and_grads(params, key, noised: Noised, tokens):
        if microbatches == 1:
            return jax.value_and_grad(sequence_loss)(params, key, noised, tokens)

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(sequence_loss)(params, *inputs)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        batches = split_microbatches((noised, tokens), microbatches)
        total, _ = jax.lax.scan(add, zero, (jax.random.split(key, microbatches), *batches))
        return jax.tree.map(lambda x: x / microbatches, total)

    def step(state: TrainState, key: Key[Array, ""], tokens: Int[Array, "b l"]) -> tuple[TrainState, Metrics]:
        noise_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        noised = diffuse(noise_key, graph, noise, tokens)
        loss, grads = loss_and_grads(state.params, dropout_key, noised, tokens)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = ema_decay(decay, state.step + 1)
        ema = jax.tree.map(lambda average, new: new + keep * (average - new), state.ema, params)
        metrics = {"loss": loss / tokens.shape[1], "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    whole = sharding.replicated(mesh)
    return jax.jit(
        step, donate_argnums=0, in_shardings=(places, whole, sharding.of_batch(mesh)), out_shardings=(places, whole)
    )
