"""Trained models for evaluation and sampling: read from a workdir, and written into one."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.data import tokenizers
from sedd_jax.devices import sharding
from sedd_jax.errors import InputError, explained, require_finite
from sedd_jax.training.checkpoint import Checkpoints
from sedd_jax.training.experiment import Experiment, make_experiment
from sedd_jax.training.state import folded, merged


def make_converted(config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> Experiment:
    """`make_experiment` for weights that `interop.load` reads, on one device. config gets the tokenizer's vocabulary,
    and as `graph.padding` what the model has beyond it: tables are padded by a token, or to a multiple of 128. Raises
    InputError if the tokenizer's vocabulary is not the model's, or the config does not make a model."""
    if not 0 <= (padding := config.data.vocab_size - tokenizer.vocab_size) < 128:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens and the weights are for {config.data.vocab_size}"
        raise InputError(f"{what}; give the one that the model was trained with")
    if padding:
        config.graph.padding, config.data.vocab_size = padding, tokenizer.vocab_size
    return make_experiment(config, tokenizer.vocab_size, jax.local_devices()[:1])


class Trained(NamedTuple):
    """A run for evaluation and sampling. params: the averaged weights (EMA). step: number of updates."""

    config: ConfigDict
    experiment: Experiment
    tokenizer: tokenizers.Tokenizer
    params: Any
    step: int

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.config.data.length

    @property
    def fingerprint(self) -> str:
        """Hex digest of the parameters, to compare with those behind figures that were computed earlier."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode())
            whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
            digest.update(np.ascontiguousarray(jax.device_get(whole)).tobytes())
        return digest.hexdigest()


def load_trained(workdir: epath.Path, *, log: Callable[[str], None], mesh: Mapping[str, int] | None = None) -> Trained:
    """The averaged weights of the newest sound checkpoint of a workdir, split over all devices. mesh: its sizes, by
    default those of the training, since weights that had to be split there would not fit whole here; where these do not
    fit the devices, see `sharding.fitting_mesh`. Raises InputError if workdir holds no run, no checkpoint, or another
    tokenizer or config than the run's, for sizes that do not fit, and TrainingError for weights that are not finite."""
    config = configuration.load(workdir)
    tokenizer = tokenizers.load(workdir)
    configuration.check_same_tokenizer(tokenizer.fingerprint, workdir)
    config.update({"model": {"attention": "auto"}})  # the kernels of the training may not fit this machine
    config.mesh = config.get("mesh", ConfigDict())
    config.mesh = ConfigDict(mesh or dict(configuration.build(sharding.fitting_mesh, "mesh", config).shape))
    experiment = make_experiment(config, tokenizer.vocab_size)
    tokenizer.padding = experiment.graph.vocab_size - tokenizer.vocab_size
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore({"ema": experiment.abstract_state().ema}, log=log, partial=True)
    if restored is None:
        raise InputError(f"--workdir={workdir} has no checkpoint yet; let the training get to its first one")
    configuration.check_same_model(config, restored.config, workdir)
    params = require_finite(restored.state["ema"], f"--workdir={workdir}, step {restored.step}, weights")
    if experiment.model.lora_rank:
        base = load_base(config, workdir, log=log, mesh=dict(experiment.mesh.shape))
        params = folded(merged(base.params, params), experiment.model.lora[1])
        config.model.lora_rank = 0
        experiment = make_experiment(config, tokenizer.vocab_size)
    return Trained(config, experiment, tokenizer, params, restored.step)


def load_base(config: ConfigDict, workdir: epath.Path, **options: Any) -> Trained:
    """The model that the run in workdir has adapters to, from where its config says. options: those of `load_trained`.
    Raises InputError if it is not there, or not the same any more."""
    remedy = f"put it back, or name its place as init.source in {workdir / 'config.json'}"
    with explained(f"--workdir={workdir} adapts a model that cannot be read", remedy, InputError):
        base = load_trained(epath.Path(config.init.source), **options)
    if base.fingerprint != config.init.fingerprint:
        raise InputError(f"--workdir={workdir} has adapters to other weights than {config.init.source}; {remedy}")
    return base


def write_workdir(
    workdir: epath.Path, params: Any, config: ConfigDict, tokenizer: tokenizers.Tokenizer, *, dtype: str = "float32"
) -> None:
    """Writes config.json, the tokenizer and a checkpoint with `params` as averages, in `dtype`: all that is read later.
    config: with all sections; `train.steps`, if there, is the number of updates. It raises as `make_converted`."""
    make_converted(config, tokenizer)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        averages = {"ema": jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)}
        checkpoints.save(config.train.get("steps", 0), averages, position=0, config=config.to_dict())
    tokenizer.save(workdir)
    configuration.save(config, workdir, tokenizer.fingerprint)
