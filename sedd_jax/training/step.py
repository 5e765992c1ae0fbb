"""The training step: one jitted, donated function that runs unchanged on any mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from sedd_jax.devices import sharding
from sedd_jax.network import chunk_size
from sedd_jax.score_entropy import Noised, Objective, loss_and_grads
from sedd_jax.training.state import Optimizer, TrainState, abstract_params, abstract_state, merged, split
from sedd_jax.transformer import Transformer
from sedd_jax.typing import Batch, PRNGKey, Scalar, Tokens, as_batch

# The share of sequences that training shows without their label (Ho and Salimans, arXiv 2207.12598).
LABEL_DROPOUT = 0.1

Metrics = dict[str, Scalar]
TrainStep = Callable[[TrainState, PRNGKey, Tokens | Batch], tuple[TrainState, Metrics]]


def ema_decay(decay: float, step: Int[Array, ""] | int) -> Scalar:
    """The paper's ramp: an average over the whole short past first, then over about 1 / (1 - decay) steps."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def split_microbatches(tree: Any, num: int) -> Any:
    """[B, ...] -> [num, B / num, ...]. Microbatch m has the sequences m, m + num, ..., so that no sequence moves."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, num, *a.shape[1:]), 1, 0), tree)


def loss_rows(mesh: Mesh, positions: int) -> int:
    """Positions per chunk of the loss. On a TPU at most 512: their log-scores, 103 MB for GPT-2's tokens, stay in the
    on-chip memory of 128 MiB."""
    return min(chunk_size(positions), 512 if mesh.devices.flat[0].platform == "tpu" else positions)


def make_head_loss(model: Transformer, objective: Objective, mesh: Mesh, places: dict[str, NamedSharding]) -> Callable:
    """(parameters of the head, features [B, L, D], noised, tokens) -> (loss, gradients by the first two): those of
    `score_entropy.loss_and_grads`, in nats per sequence, the mean over the batch. places: shardings of the parameters.
    Every device computes its own sequences, in as many chunks as it has noised positions. It exchanges the parameters
    of the head before and their gradient after, nothing else."""
    batch_axes = sharding.RULES["batch"]
    split = {name: sharding.batch_axes(place) for name, place in places.items()}
    specs = {name: PartitionSpec(*(axes or None for axes in entries)) for name, entries in split.items()}

    def reduce(name, grad):
        rest = [axis for axis in batch_axes if mesh.shape[axis] > 1]
        for dim, axes in enumerate(split[name]):
            if axes:  # Moved in gradient_dtype and summed in float32.
                parts = jax.lax.all_to_all(grad.astype(model.gradient_dtype), axes, dim, dim, tiled=True)
                parts = parts.reshape(*grad.shape[:dim], jax.lax.axis_size(axes), -1, *grad.shape[dim + 1 :])
                grad = parts.sum(dim, dtype=grad.dtype)
                rest = [axis for axis in rest if axis not in axes]
        return jax.lax.psum(grad, tuple(rest))

    def local(head, features, noised, tokens):
        output = lambda head, *inputs: model.apply({"params": {"head": head}}, *inputs, method="log_score")  # noqa: E731
        with jax.named_scope("loss"):
            inputs, rows = (head, features, noised, tokens), loss_rows(mesh, tokens.size)
            loss, (d_head, d_features) = loss_and_grads(output, objective, *inputs, rows=rows)
        return jax.lax.psum(loss, batch_axes), ({name: reduce(name, grad) for name, grad in d_head.items()}, d_features)

    outputs = (PartitionSpec(), (specs, PartitionSpec(batch_axes)))
    mapped = sharding.on_shards(local, places, model.dtype, outputs=outputs)
    mean = lambda noised: noised._replace(weight=noised.weight / len(noised.x))  # noqa: E731
    return lambda head, features, noised, tokens: mapped(head, features, mean(noised), tokens)


@functools.lru_cache(maxsize=4)  # the next run of this process need not compile it again
def make_train_step(
    model: Transformer, objective: Objective, optimizer: Optimizer, mesh: Mesh, *, decay: float, microbatches: int = 1
) -> TrainStep:
    """`step(state, key, batch)` -> (next state, metrics); the state is donated. batch: tokens [B, L], or a `Batch`.
    With adapters a fourth argument has the frozen parameters. key: the run's. The step folds its own number into it, so
    it depends on the state, this key and its batch only. metrics: `loss` in nats per token (for score entropy, an
    estimate of the diffusion part of the bound), `grad_norm` of the gradient of nats per sequence, before the clip."""
    whole, abstract = abstract_params(model, mesh), abstract_state(model, optimizer, mesh)
    places, whole = jax.tree.map(lambda leaf: leaf.sharding, (abstract, whole))
    head_loss = make_head_loss(model, objective, mesh, whole["head"])

    def microbatch_loss_and_grads(params, frozen, key, noised: Noised, tokens, labels, numbers):
        def features_of(params):
            inputs, dropout = (noised.x, noised.sigma, True, numbers, labels), {"dropout": key}
            return model.apply({"params": merged(*frozen, params)}, *inputs, rngs=dropout, method="features")

        features, pull_back = jax.vjp(features_of, params)
        loss, (d_head, d_features) = head_loss(merged(*frozen, params)["head"], features, noised, tokens)
        (grads,) = pull_back(d_features)
        return loss, grads | {"head": d_head} if "head" in params else grads

    def batch_loss_and_grads(params, frozen, key, noised: Noised, tokens, labels):
        batch = noised, tokens, labels, jnp.arange(len(tokens))
        if microbatches == 1:
            return microbatch_loss_and_grads(params, frozen, key, *batch)

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, microbatch_loss_and_grads(params, frozen, key, *inputs)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, split_microbatches(batch, microbatches))
        return jax.tree.map(lambda x: x / microbatches, total)

    def step(state: TrainState, key: PRNGKey, batch: Tokens | Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        tokens, given, never, labels = as_batch(batch)
        step_key = jax.random.fold_in(key, state.step)
        noise_key, dropout_key = jax.random.split(step_key)
        noised = objective.noised(noise_key, tokens, given, never)
        if labels is not None:
            # `split` folds in 0 and 1.
            drop = jax.random.bernoulli(jax.random.fold_in(step_key, 2), LABEL_DROPOUT, labels.shape)
            labels = jnp.where(drop, model.num_classes, labels)
        loss, grads = batch_loss_and_grads(state.params, frozen, dropout_key, noised, tokens, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = ema_decay(decay, state.step + 1)
        ema = jax.tree.map(lambda average, new: new + keep * (average - new), state.ema, params)
        length = tokens.shape[1] if noised.targets is None else noised.targets.sum() / len(tokens)
        metrics = {"loss": loss / length, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    replicated, frozen = sharding.replicated(mesh), [split(whole)[1]] * bool(model.lora_rank)
    given = places, replicated, sharding.batch_sharding(mesh), *frozen
    return jax.jit(step, donate_argnums=0, in_shardings=given, out_shardings=(places, replicated))
