"""A config as objects: what training, evaluation and sampling of one run have in common."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sedd_jax import autoregressive, likelihood, noise, rates, sampling
from sedd_jax.config import build
from sedd_jax.devices import sharding
from sedd_jax.errors import InputError, check_fields
from sedd_jax.network import Network, guided
from sedd_jax.score_entropy import Objective, ScoreEntropy, ScoreFn
from sedd_jax.training import state
from sedd_jax.training.options import EvalOptions, SamplingOptions, TrainOptions
from sedd_jax.training.step import TrainStep, make_train_step
from sedd_jax.transformer import Transformer, attention
from sedd_jax.typing import PRNGKey

# Equal experiments have the same functions, so that what one has compiled the next of this process need not.
_once = functools.lru_cache(maxsize=8)


@dataclass(frozen=True)
class Experiment:
    """A config as objects, except for the data, and jitted functions of the parameters on the mesh. With the objective
    'ar' the model is causal, and graph and noise are not used."""

    graph: rates.Graph
    noise: noise.Noise
    objective: Objective
    model: Transformer
    optimizer: state.Optimizer
    mesh: jax.sharding.Mesh
    train: TrainOptions = field(compare=False)
    eval: EvalOptions = field(compare=False)
    sampling: SamplingOptions = field(compare=False)

    def score_fn(self, params: Any) -> ScoreFn:
        return lambda tokens, sigma: self.model.apply({"params": params}, tokens, sigma)

    def network(self, params: Any, labels: Any = None, guidance: float = 1.0) -> Network:
        """`score_fn` in two parts (for the AR baseline the logits), of which each device computes the second on its own
        sequences. labels: the class of each sequence, or of all; None for none. guidance: see `network.guided`."""

        def apply(method, params, *arguments, **options):
            return self.model.apply({"params": params}, *arguments, **options, method=method)

        places = jax.tree.map(lambda leaf: leaf.sharding, state.abstract_params(self.model, self.mesh)["head"])
        network = Network(
            features=functools.partial(apply, "features", params, labels=labels),
            log_score=lambda head, *arguments: apply("log_score", {"head": head}, *arguments),
            head=params["head"],
            timeless=not self.model.time_conditioning,
            on_shards=functools.partial(sharding.on_shards, places=places, dtype=self.model.dtype),
        )
        return network if guidance == 1 else guided(network, self.network(params), guidance)

    def abstract_state(self) -> state.TrainState:
        """Shapes, dtypes and shardings of the state."""
        return state.abstract_state(self.model, self.optimizer, self.mesh)

    def init_state(self, key: PRNGKey) -> state.TrainState:
        return state.init_state(key, self.model, self.optimizer, self.mesh)

    def train_step_fn(self) -> TrainStep:
        """(state, key, tokens [B, L]) -> (next state, metrics): see `make_train_step`."""
        options = {"decay": self.train.ema_decay, "microbatches": self.train.microbatches}
        return make_train_step(self.model, self.objective, self.optimizer, self.mesh, **options)

    def unsharded(self) -> list[str]:
        """The weights that the mesh should split and does not, or too finely: see `sharding.unsharded`, `narrow`."""
        boxed = jax.eval_shape(lambda: state.init_params(jax.random.key(0), self.model))
        return sharding.unsharded(boxed, self.mesh) + sharding.narrow(self.model.dim, self.mesh)

    def head_share(self, sigma: Any = None) -> np.ndarray:
        """The share of positions at noise sigma that contribute, and so go through the head. Without sigma: at the
        noise levels of a training step, one entry per sequence."""
        objective, key = self.objective, jax.random.key(0)
        if sigma is None:
            sigma = objective.noised(key, jnp.zeros((self.train.batch_size, 1), jnp.int32)).sigma
        kinds = jnp.zeros(1, jnp.int32), self.graph.sample_limit(key, (1,))
        clean, noise = (float(objective.contributes(x)[0]) for x in kinds)
        return noise + (clean - noise) * np.exp(-np.asarray(sigma, np.float64))

    @_once
    def bound_fn(self, num_times: int, estimator: str = "auto") -> Callable[..., likelihood.Estimate]:
        """(params, key, tokens [B, L], number of the first sequence, given=None, never=None, labels=None) ->
        `likelihood.bound` with these options, or for a causal model the likelihood itself."""
        if not self.model.causal:
            likelihood.check_estimator(estimator, self.graph)

        def bound(params, key, tokens, first_index, given=None, never=None, labels=None):
            if self.model.causal:  # which sees nothing that is behind a position
                with jax.named_scope("exact"):
                    targets, _ = likelihood.roles(tokens, given, never)
                    return likelihood.Exact(autoregressive.nats(self.network(params), tokens, targets))
            process, asked = (self.network(params, labels), self.graph, self.noise), {"given": given, "never": never}
            options = {"num_times": num_times, "estimator": estimator, "first_index": first_index}
            return likelihood.bound(key, *process, tokens, **options, **asked)

        return jax.jit(bound, out_shardings=sharding.replicated(self.mesh))

    @_once
    def sample_fn(self, sampler: SamplingOptions, steps: int | None = None) -> jax.stages.Wrapped:
        """(params, key, (given [B, L], values [B, L]), steps, number of the first sequence) -> `sampling.Sample`. With
        (given, values, `sampling.Rules`) and an `Automaton` as the last argument, the rules are kept. steps: compiles
        for this number alone; then steps and number are no arguments. The AR baseline only truncates."""
        if not self.model.causal:
            sampler.check(self.graph, steps or 1)

        def draw(params, key, clamp, steps, first_index, *automaton):
            if not self.model.causal:
                return sampling.simulate(**self._process(sampler, params, key, clamp, steps, first_index, *automaton))
            step_fn = lambda *args: self.model.apply({"params": params}, *args, method="next_logits")  # noqa: E731
            cache, options = self.model.empty_cache(*clamp[1].shape), {"truncation": sampler.truncation}
            return autoregressive.simulate(key, step_fn, cache, clamp, first_index=first_index, **options)

        fixed = draw if steps is None else lambda params, key, clamp: draw(params, key, clamp, steps, 0)
        return jax.jit(fixed, out_shardings=sharding.replicated(self.mesh))

    @_once
    def event_fns(self, sampler: SamplingOptions) -> tuple[jax.stages.Wrapped, ...]:
        """The events of `sample_fn` one at a time, after the same arguments: start(...) -> `sampling.State`,
        advance(..., state, number) -> the state after event `number`, from 1, and length(...) -> how many there are."""
        process = lambda *arguments: sampling.make_process(**self._process(sampler, *arguments))  # noqa: E731
        events = (
            lambda *arguments: process(*arguments).start(),
            lambda *arguments: sampling.advance(process(*arguments[:-2]), *arguments[-2:]),
            lambda *arguments: sampling.num_events(process(*arguments)),
        )
        return tuple(jax.jit(event, out_shardings=sharding.replicated(self.mesh)) for event in events)

    def _process(self, sampler: SamplingOptions, params, key, clamp, steps, first_index, automaton=None) -> dict:
        """The arguments of `sampling.make_process`."""
        network = self.network(params, sampler.label, sampler.guidance)
        process = {"key": key, "score_fn": network, "graph": self.graph, "noise": self.noise, "shape": clamp[1].shape}
        options = {"steps": steps, "sampler": sampler, "clamp": clamp[:2], "first_index": first_index}
        if automaton is not None:
            options["constraint"] = sampling.Constraint(automaton, clamp[2])
        return process | options

    def map_batches(self, function: Callable[..., Any], sequences: Any, batch_size: int, **options: Any) -> Any:
        """`sharding.map_batches` on the mesh; no batch is larger than all sequences take."""
        size = min(batch_size, len(jax.tree.leaves(sequences)[0]))
        return sharding.map_batches(function, sequences, size, mesh=self.mesh, **options)


def make_experiment(config: ConfigDict, vocab_size: int, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """On the devices, by default all. Raises InputError for what is unknown, missing or does not fit."""
    objective = config.get("objective", "sedd")
    check_fields("config", {"objective": objective}, objective=("sedd", "ar"))
    causal = objective == "ar"
    graph = build(rates.make, "graph", config, vocab_size=vocab_size)
    schedule = build(noise.make, "noise", config)
    mesh = build(sharding.make_mesh, "mesh", config, devices=devices)
    # parent and name are fields of every Flax module, and not for a config to set.
    given = {"num_states": vocab_size if causal else graph.num_states, "causal": causal, "to_score": None}
    model = build(Transformer, "model", config, **given, parent=None, name=None)
    platform, absorbing = mesh.devices.flat[0].platform, isinstance(graph, rates.Absorbing)
    sizes = {"length": config.data.length, "head_dim": model.dim // model.num_heads}
    model = model.clone(
        to_score=getattr(graph, f"score_of_{model.parametrisation}", None),
        scale_by_sigma=absorbing if model.scale_by_sigma is None else model.scale_by_sigma,
        attention=attention.choose(model.attention, platform=platform, dtype=model.dtype, **sizes),
    )
    if model.num_heads % mesh.shape["tensor"]:
        raise InputError(f"mesh.tensor={mesh.shape['tensor']} must divide model.num_heads={model.num_heads}")
    optimizer = build(state.make_optimizer, "optim", config)
    if model.lora_rank and config.optim.get("kind") == "muon":
        raise InputError("optim.kind='muon' is for the products themselves; with model.lora_rank choose 'adamw'")
    # Scores depend on the noise level. Those of the absorbing graph do by a known factor alone.
    known = model.parametrisation != "score" or (absorbing and model.scale_by_sigma)
    if not (causal or model.time_conditioning or known):
        needs = "needs model.parametrisation='mean', or graph.kind='absorbing' with model.scale_by_sigma=True"
        raise InputError(f"model.time_conditioning=False {needs}: other scores depend on the noise level")
    options = build(SamplingOptions, "sampling", config)
    options.check_label(model.num_classes)
    data = config.data
    given = data.get("prompt_field") or (data.get("label_field") and data.tail == "unknown")
    if given and not (causal or absorbing):
        what = f"data.prompt_field={data.prompt_field!r}, data.tail={data.tail!r} need graph.kind='absorbing'"
        raise InputError(f"{what}: where any token may be noise, no prompt is clean and no position unknown")
    if not causal:
        options.check(graph, options.steps)
    # The config of converted weights need not have the options of their training.
    train = build(TrainOptions, "train", config) if "train" in config else TrainOptions()
    sections = {"train": train, "eval": build(EvalOptions, "eval", config), "sampling": options}
    loss = autoregressive.CrossEntropy() if causal else ScoreEntropy(graph, schedule)
    return Experiment(graph, schedule, loss, model, optimizer, mesh, **sections)
