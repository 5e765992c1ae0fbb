"""Checkpoints of the PyTorch implementation of SEDD: found on disk or on the hub, read, and written.

Three layouts: a Hugging Face folder (config.json and weights), the same on the hub by its id, and `checkpoint.pth` of a
training run, of which the averaged weights (EMA) are read: a list in the order of the model's parameters.
"""

import json
import os
import re
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
from sedd_jax.interop.official import ROTARY, from_official, to_official
from sedd_jax.interop.sources import download, read_safetensors
from sedd_jax.interop.torch_files import Tensor

FORMATS = ("safetensors", "torch")
_SAFETENSORS, _TORCH, _CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
_WEIGHTS = (_SAFETENSORS, _TORCH, "checkpoints-meta/checkpoint.pth", "checkpoint.pth")


def load_official(path: str | os.PathLike, *, config_file: str | os.PathLike | None = None) -> tuple[dict, ConfigDict]:
    """(parameters of `Transformer` as float32 arrays, a config in our sections) of a published or trained model.

    path: a folder with weights (Hugging Face's or a training run's), a file of weights, or an id on the hub.
    config_file: config.json or .hydra/config.yaml, if it is not where the weights are.
    `config.data` has the length and the vocabulary, but no corpus and no tokenizer. `config.train.steps` is the number
    of updates, if the file has it.
    Raises InputError if a file is absent, damaged, of another model, or asks to run code, which never happens.
    """
    weights_file = _find_weights(path)
    config = official_config.read(_find_config(weights_file) if config_file is None else Path(config_file))
    if weights_file.suffix == ".safetensors":
        weights = read_safetensors(weights_file)
    else:
        weights, steps = _read_torch(weights_file)
        config.train.update(steps)
    try:
        # DistributedDataParallel puts a prefix before all names.
        prefix = "module." if all(name.startswith("module.") for name in weights) else ""
        weights = {name.removeprefix(prefix): _float32(name, value) for name, value in weights.items()}
        num_states = config.data.vocab_size + (config.graph.kind == "absorbing")
        params = from_official(weights, config, num_states=num_states)
    except InputError as error:
        raise InputError(f"{weights_file}: {error}") from error
    return jax.tree.map(jnp.asarray, params), config


def save_official(
    path: epath.PathLike, params: Mapping[str, Any], config: ConfigDict, *, format: str = "safetensors"
) -> None:
    """Writes a new Hugging Face folder: config.json, and model.safetensors or pytorch_model.bin (format 'torch'),
    without the constant rotary table, which the model makes itself.

    Raises InputError for an unknown format, a config without a counterpart in the official implementation, or a
    directory that is not empty.
    """
    if format not in FORMATS:
        raise InputError(f"format={format!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}")
    weights = to_official(params)
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
    if here.is_file():
        return here
    if not here.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        here = download(str(path), (_CONFIG, _SAFETENSORS, _TORCH))
    for name in _WEIGHTS:
        if (here / name).is_file():
            return here / name
    if here.is_dir():
        raise InputError(f"{path} has no weights; expected one of {', '.join(_WEIGHTS)}")
    raise InputError(f"{path} does not exist; give a folder, a file of weights, or an id on the hub (owner/name)")


def _find_config(weights_file: Path) -> Path:
    # A run has its config in .hydra/, and its checkpoints in folders beside it.
    for name in (_CONFIG, ".hydra/config.yaml", "../.hydra/config.yaml"):
        if (path := weights_file.parent / name).is_file():
            return path
    raise InputError(
        f"{weights_file} has no config.json or .hydra/config.yaml beside it; name its config with --model_config"
    )


def _read_torch(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Weights by name, and {'steps': n} for a training checkpoint."""
    file = torch_files.load(path)
    tree, steps = file.tree, {}
    if isinstance(tree, dict) and {"model", "ema"} <= tree.keys():
        step = tree.get("step")
        if not isinstance(step, int) or not 0 <= step < 1 << 31:
            raise InputError(f"{path} has step={str(step)[:40]}; it is not a training checkpoint of SEDD")
        tree, steps = _averaged(path, tree["model"], tree["ema"]), {"steps": step}
    tensors = _tensors(path, tree)
    return {name: file.read(tensor) for name, tensor in tensors.items()}, steps


def _averaged(path: Path, model: Any, ema: Any) -> dict[str, Tensor]:
    """The averages by name. They were saved in the order of the parameters; buffers have no average."""
    names = [name for name in _tensors(path, model) if not name.endswith(ROTARY)]
    shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadows, list | tuple) or len(shadows) != len(names):
        count = len(shadows) if isinstance(shadows, list | tuple) else "no"
        raise InputError(f"{path} has {count} averaged weights (ema.shadow_params) for {len(names)} parameters")
    averaged = _tensors(path, dict(zip(names, shadows, strict=True)))
    for name, tensor in averaged.items():
        if tensor.shape != model[name].shape:
            raise InputError(f"{path}: the averaged weights are not in the order of the model's, at {name[:100]!r}")
    return averaged


def _tensors(path: Path, tree: Any) -> dict[str, Tensor]:
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise InputError(f"{path} holds neither weights by name nor a training checkpoint of SEDD")
    for name, value in tree.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{path} holds no weights but a {type(value).__name__} under {name[:100]!r}")
    return tree


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.name not in ("float32", "float16", "bfloat16"):
        raise InputError(f"{name} is of the type {value.dtype.name}; expected float32, float16 or bfloat16")
    return value.astype(np.float32)
