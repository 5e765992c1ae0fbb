"""What a run begins from if not from random numbers: the averaged weights of another one (`train --init`). config.json,
and with it every checkpoint's record, says in the section `init` where they lay and what they were."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from sedd_jax import config as configuration, interop
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.training.experiment import Experiment
from sedd_jax.training.state import TrainState
from sedd_jax.training.trained import Trained, load_trained, make_converted

# Of a model: what may differ from the source's, since the weights mean the same.
_FREE = {"num_states", "to_score", "causal", "parent", "name", "dropout", "dtype", "gradient_dtype", "attention"}
_FREE |= {"residual_dtype", "remat", "lora_rank", "lora_alpha"}


def resumed(config: ConfigDict, workdir: epath.Path, init: str | None) -> ConfigDict:
    """The config with what the run in workdir began from, if it has begun. Raises InputError if that is not `init`."""
    if not configuration.has_checkpoint(workdir):
        return config
    found = configuration.load(workdir).get("init")
    if init is not None and (found is None or found.source not in (init, os.path.abspath(init))):
        began = f"from {found.source}" if found else "from random weights"
        what = f"--workdir={workdir} holds a run that began {began}, not from --init={init}"
        raise InputError(f"{what}: leave --init out to go on with it, or choose another --workdir")
    return ConfigDict(config.to_dict() | {"init": found.to_dict()}) if found else config


def read(
    init: str, rows: str | None, config: ConfigDict, experiment: Experiment, tokenizer: Tokenizer
) -> tuple[dict[str, Any], str]:
    """Weights of a workdir, or of what `interop.load` reads, for the model of `experiment`; and their fingerprint.
    rows: 'mean' gives tokens that the source does not know the mean of its rows (Hewitt 2021); others keep their
    scores. Raises InputError for another graph, network or vocabulary than the run's."""
    if configuration.has_checkpoint(epath.Path(init)):
        source = load_trained(epath.Path(init), log=say, mesh=dict(experiment.mesh.shape))
    else:
        params, theirs = interop.load(init)  # which come without a tokenizer
        if experiment.model.lora_rank:
            raise InputError(f"--init={init}: adapters need a workdir to refer to; make one with convert")
        source = Trained(theirs, make_converted(theirs, tokenizer), tokenizer, params, 0)
    pairs = {"objective": [c.get("objective", "sedd") for c in (source.config, config)]}
    pairs |= {f"graph.{name}": [c.graph.get(name, 0) for c in (source.config, config)] for name in ("kind", "padding")}
    names = [field.name for field in dataclasses.fields(experiment.model) if field.name not in _FREE]
    pairs |= {f"model.{name}": [getattr(e.model, name) for e in (source.experiment, experiment)] for name in names}
    if source.experiment.model.num_classes == 0:  # a new table of classes changes nothing
        del pairs["model.num_classes"]
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            what = f"--init={init} has {name}={theirs!r} and this run {ours!r}, where its weights mean nothing"
            raise InputError(f"{what}: give --config.{name}={theirs}, or another --init")
    if tokenizer.fingerprint == source.tokenizer.fingerprint:
        return source.params, source.fingerprint
    old, new = source.tokenizer.vocab_size, tokenizer.vocab_size
    grown = new > old and all(source.tokenizer.decode([i]) == tokenizer.decode([i]) for i in range(old))
    if not grown or rows is None or experiment.model.lora_rank:
        rows_of = "give --init_rows=mean for rows of the new ones, and no adapters, which have none"
        remedy = rows_of if grown else "leave data.tokenizer_path out"
        known = f"the first {old} of {new} tokens" if grown else "another tokenizer"
        raise InputError(f"--init={init} has {known} of this run: {remedy}")
    return _with_rows(source, new), source.fingerprint


def _with_rows(source: Trained, new: int) -> dict[str, Any]:
    """The parameters with rows for `new` tokens. What is behind them, padding and MASK, stays there."""
    old, model = source.tokenizer.vocab_size, source.experiment.model

    def grow(value: jax.Array, axis: int) -> jax.Array:
        tokens, rest = jnp.split(value, [old], axis)
        return jnp.concatenate([tokens, jnp.repeat(tokens.mean(axis, keepdims=True), new - old, axis), rest], axis)

    head = {"kernel": grow(source.params["head"]["kernel"], 1), "bias": grow(source.params["head"]["bias"], 0)}
    if not model.causal and model.parametrisation == "score" and model.scale_by_sigma:
        # The network divides by the number of the other states, which grows too.
        head["bias"] += float(np.log((model.num_states - 1 + new - old) / (model.num_states - 1)))
    return source.params | {"embedding": grow(source.params["embedding"], 0), "head": head}


def begin(state: TrainState, params: dict[str, Any]) -> TrainState:
    """A fresh state with these parameters, where it has them."""
    given, fresh = flatten_dict(params), flatten_dict(state.params)
    params = unflatten_dict({path: jax.device_put(given.get(path, x), x.sharding) for path, x in fresh.items()})
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params))
