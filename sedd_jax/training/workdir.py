"""A workdir around weights that were trained elsewhere, for `evaluate` and `sample`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError
from sedd_jax.training.checkpoint import Checkpoints
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.state import TrainState


def write_workdir(workdir: epath.Path, params: Mapping[str, Any], config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Writes config.json, the tokenizer and a checkpoint with `params` as parameters and as averages.

    config: with all sections. `train.steps`, if it is there, is the number of updates behind the parameters. It gets
    the tokenizer's vocabulary, and as `graph.padding` what the model has beyond it: tables are padded by a token or to
    a multiple of 128.

    Raises InputError if the tokenizer's vocabulary is not the model's, or the config does not make a model.
    """
    vocab_size, step = config.data.vocab_size, config.train.get("steps", 0)
    if not 0 <= (padding := vocab_size - tokenizer.vocab_size) < 128:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the weights are for {vocab_size}; "
            "give the one that the model was trained with"
        )
    if padding:
        config.graph.padding, config.data.vocab_size = padding, tokenizer.vocab_size
    optimizer = make_experiment(config, tokenizer.vocab_size, jax.local_devices()[:1]).optimizer
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = TrainState(jnp.int32(step), params, params, optimizer.init(params))
        checkpoints.save(step, state, position=0, config=config.to_dict())
    tokenizer.save(workdir)
    configuration.save(config, workdir, tokenizer.fingerprint)
