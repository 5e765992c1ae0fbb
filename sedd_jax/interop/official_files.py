"""Checkpoints of the PyTorch implementation of SEDD: found on disk or on the hub, read, and written.

Three layouts: a Hugging Face folder (config.json and weights, in one file or in shards), such a folder on the hub by
its id, and `checkpoint.pth` of a training run. A run's averaged weights (EMA) are read. They are a list in the order of
the model's parameters.
"""

import json
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

from sedd_jax.errors import InputError
from sedd_jax.files import new_directory
from sedd_jax.interop import official_config, torch_files
from sedd_jax.interop.official import ROTARY, check_shapes, from_official, to_official
from sedd_jax.interop.sources import check_finite, download, read_safetensors, read_shards, without_prefixes

FORMATS = ("safetensors", "torch")
_SAFETENSORS, _TORCH, _CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
_INDICES = (f"{_SAFETENSORS}.index.json", f"{_TORCH}.index.json")
_WEIGHTS = (_SAFETENSORS, _TORCH, *_INDICES, "checkpoints-meta/checkpoint.pth", "checkpoint.pth")


def load_official(path: str | os.PathLike, *, config_file: str | os.PathLike | None = None) -> tuple[dict, ConfigDict]:
    """(parameters of `Transformer` as float32 arrays, a config in our sections) of a published or trained model.

    Args:
      path: a folder with weights (Hugging Face's or a training run's), a file of weights, or an id on the hub.
      config_file: config.json or .hydra/config.yaml, if it is not beside the weights.

    `config.data` has the length and the vocabulary, but no corpus and no tokenizer. `config.train.steps` is the number
    of updates, if the file has it.

    Raises:
      InputError: something is absent, damaged, of another kind, or asks for code to be run. None is ever run.
    """
    file = _find_weights(path)
    config = official_config.read(_find_config(file) if config_file is None else Path(config_file))
    weights, steps = _read(file)
    config.train.update(steps)
    try:
        weights = without_prefixes(weights)
        check_shapes(weights, config, num_states=config.data.vocab_size + (config.graph.kind == "absorbing"))
        for name, value in weights.items():
            if value.dtype.name not in ("float32", "float16", "bfloat16"):
                raise InputError(f"{name} is of the type {value.dtype.name}; expected float32, float16 or bfloat16")
        check_finite(weights)
        params = from_official({name: value.astype(np.float32, copy=False) for name, value in weights.items()})
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return jax.tree.map(jnp.asarray, params), config


def save_official(
    path: epath.PathLike, params: Mapping[str, Any], config: ConfigDict, *, format: str = "safetensors"
) -> None:
    """Writes a Hugging Face folder at a new path: config.json, and model.safetensors or pytorch_model.bin (format
    'torch'). The constant rotary table is left out, since the model makes its own.

    Raises InputError for an unknown format, a model that the official implementation does not have, weights that are
    not finite, or a path that is not free.
    """
    if format not in FORMATS:
        raise InputError(f"format={format!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}")
    weights = to_official(params)
    check_finite(weights)
    vocab_size = len(params["embedding"]) - (config.graph.kind == "absorbing")
    official = official_config.to_official_config(config, vocab_size=vocab_size)
    with new_directory(path) as folder:
        (folder / _CONFIG).write_text(json.dumps(official, indent=2) + "\n")
        if format == "safetensors":
            (folder / _SAFETENSORS).write_bytes(safetensors.numpy.save(weights, metadata={"format": "pt"}))
        else:
            torch_files.save(folder / _TORCH, weights)


def _find_weights(path: str | os.PathLike) -> Path:
    here = Path(path)
    if os.path.isfile(here):  # unlike the method, False for a name that is too long
        return here
    if not os.path.exists(here) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        here = download(str(path), (_CONFIG, _SAFETENSORS, _TORCH, *_INDICES, "*-of-*.safetensors", "*-of-*.bin"))
    for name in _WEIGHTS:
        if os.path.isfile(here / name):
            return here / name
    if os.path.isdir(here):
        raise InputError(f"{path} has no weights; expected one of {', '.join(_WEIGHTS)}")
    raise InputError(f"{path} does not exist; give a folder, a file of weights, or an id on the hub (owner/name)")


def _find_config(file: Path) -> Path:
    # A run has its config in .hydra/, and its checkpoints in folders beside that.
    for name in (_CONFIG, ".hydra/config.yaml", "../.hydra/config.yaml"):
        if (file.parent / name).is_file():
            return file.parent / name
    raise InputError(f"{file} has no config.json or .hydra/config.yaml beside it; name its config with --model_config")


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Weights by name, and {'steps': n} for a training checkpoint."""
    if file.suffix == ".json":
        return read_shards(file, lambda shard: _read(shard)[0]), {}
    return (read_safetensors(file), {}) if file.suffix == ".safetensors" else _read_torch(file)


def _read_torch(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    file, steps = torch_files.load(path), {}
    weights = file.tree
    if isinstance(weights, dict) and {"model", "ema"} <= weights.keys():
        step, ema = weights.get("step"), weights["ema"]
        if not isinstance(step, int) or not 0 <= step < 1 << 31:
            raise InputError(f"{path} has step={reprlib.repr(step)}; it is not a training checkpoint of SEDD")
        steps = {"steps": step}
        # The averages get the names of the parameters, in whose order they are. Buffers have no average.
        model = {name: value for name, value in _tensors(path, weights["model"]).items() if not name.endswith(ROTARY)}
        shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
        count = len(shadows) if isinstance(shadows, list | tuple) else "no"
        if count != len(model):
            raise InputError(f"{path} has {count} averaged weights (ema.shadow_params) for {len(model)} parameters")
        weights = _tensors(path, dict(zip(model, shadows, strict=True)))
        if odd := [name for name in model if weights[name].shape != model[name].shape]:
            raise InputError(f"{path}: the averaged weights are not in the order of the model's, at {odd[0][:100]!r}")
    return file.read(_tensors(path, weights)), steps


def _tensors(path: Path, tree: Any) -> dict[str, torch_files.Tensor]:
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise InputError(f"{path} holds neither weights by name nor a training checkpoint of SEDD")
    for name, value in tree.items():
        if not isinstance(value, torch_files.Tensor):
            raise InputError(f"{path} holds no weights but a {type(value).__name__} under {name[:100]!r}")
    return tree
