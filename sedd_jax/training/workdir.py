"""A workdir around weights that were trained elsewhere, for `evaluate` and `sample`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.training.checkpoint import Checkpoints
from sedd_jax.training.experiment import make_converted
from sedd_jax.training.state import TrainState


def write_workdir(
    workdir: epath.Path,
    params: Mapping[str, Any],
    config: ConfigDict,
    tokenizer: Tokenizer,
    *,
    averages: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes config.json, the tokenizer and a checkpoint with `params` as parameters and as averages.

    config: with all sections. `train.steps`, if it is there, is the number of updates behind the parameters; see
    `make_converted` for the rest. averages: saves the averages alone, in this
    dtype, which is enough for everything but going on with a training.

    Raises InputError if the tokenizer's vocabulary is not the model's, or the config does not make a model.
    """
    optimizer, step = make_converted(config, tokenizer).optimizer, config.train.get("steps", 0)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if averages:
            state = {"ema": jax.tree.map(lambda leaf: jnp.asarray(leaf, averages), params)}
        else:
            state = TrainState(jnp.int32(step), params, params, optimizer.init(params))
        checkpoints.save(step, state, position=0, config=config.to_dict())
    tokenizer.save(workdir)
    configuration.save(config, workdir, tokenizer.fingerprint)
