"""Checkpoints of the PyTorch implementations of SEDD and its family: found on disk or on the hub, read, and written.
Four layouts: a Hugging Face folder (config.json and weights, in one file or in shards), such a folder on the hub by its
id, and of training runs `checkpoint.pth` (SEDD, RADD) or Lightning's `.ckpt` (MDLM, Duo, UDLM). A run's averaged
weights (EMA) are read. They are a list in the order of the model's parameters."""

import json
import os
import re
import reprlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils.epath import PathLike
from ml_collections import ConfigDict

from sedd_jax.errors import InputError, explained
from sedd_jax.files import new_directory
from sedd_jax.interop import official, official_config, torch_files
from sedd_jax.interop.sources import as_float32, download, read_safetensors, read_shards

FORMATS = ("safetensors", "torch")
_SAFETENSORS, _TORCH, _CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
_INDICES = (f"{_SAFETENSORS}.index.json", f"{_TORCH}.index.json")
# Training checkpoints: where the weights are, the number of updates, and the prefix of the network among the weights.
_LAYOUTS = (("state_dict", "global_step", "backbone."), ("model", "step", ""))
_WEIGHTS = (_SAFETENSORS, _TORCH, *_INDICES, "checkpoints-meta/checkpoint.pth", "checkpoint.pth")
_WEIGHTS += ("checkpoints/last.ckpt", "last.ckpt")


def load(
    path: PathLike, *, family: str = "auto", config_file: PathLike | None = None, revision: str | None = None
) -> tuple[dict, ConfigDict]:
    """(parameters of `Transformer` as float32 arrays, a config in our sections) of a published or trained model.
    `make_experiment(config, config.data.vocab_size).model` is its network. Of a network that takes no noise level, the
    modulation is folded into the other weights. `config.data` has the length and the vocabulary, but no corpus and no
    tokenizer. `config.train.steps` is the number of updates, if the file has it.
    path: a folder with weights (Hugging Face's or a training run's), a file of weights, or an id on the hub.
    family: one of `official_config.FAMILIES`; 'auto': what the config says. config_file: config.json or
    .hydra/config.yaml, if it is not beside the weights. revision: of the id on the hub; by default its newest.
    Raises InputError if something is absent, damaged, of another kind, or asks for code to be run. None is ever run."""
    file = _find_weights(path, revision)
    family, config = official_config.read(_find_config(file) if config_file is None else Path(config_file), family)
    weights, steps = _read(file)
    config.train.update(steps)
    absorbing = config.graph.kind == "absorbing"
    with explained(str(file), "", InputError):
        weights = official.plain(weights)
        rows = next(iter(weights[official.EMBEDDING].shape), 0) if official.EMBEDDING in weights else 0
        if "vocab_size" not in config.data:
            config.data.vocab_size = max(rows - absorbing, 2)
        # Where the modulation is folded, it does not depend on a class.
        if config.model.get("time_conditioning", True) and np.ndim(table := weights.get(official.CLASSES, 0)):
            config.model.num_classes = len(table) - 1  # the last one is for no class
        num_states = config.data.vocab_size + absorbing
        if family == "gidd" and rows == -(-num_states // 128) * 128:
            # Rows of padding behind MASK, which are never read nor predicted.
            tables = (official.EMBEDDING, f"{official.HEAD}.weight", f"{official.HEAD}.bias")
            weights |= {name: weights[name][:num_states] for name in tables if name in weights}
        official.check_shapes(weights, config, num_states=num_states)
        weights = as_float32(weights)
        if not config.model.get("time_conditioning", True):
            weights = as_float32(official.fold(weights))
        return jax.tree.map(jnp.asarray, official.from_official(weights)), config


load_official = partial(load, family="sedd")


def save_official(path: PathLike, params: Mapping, config: ConfigDict, *, format: str = "safetensors") -> None:
    """Writes a Hugging Face folder at a new path: config.json, and model.safetensors or pytorch_model.bin (format
    'torch'), without the constant rotary table. Raises InputError for an unknown format, a model that the official
    implementation does not have, weights that are not finite, or a path that is not free."""
    if format not in FORMATS:
        raise InputError(f"format={format!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}")
    weights = as_float32(official.to_official(params))
    vocab_size = len(params["embedding"]) - (config.graph.kind == "absorbing")
    fields = official_config.to_official_config(config, vocab_size=vocab_size)
    with new_directory(path) as folder:
        (folder / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        if format == "safetensors":
            (folder / _SAFETENSORS).write_bytes(safetensors.numpy.save(weights, metadata={"format": "pt"}))
        else:
            torch_files.save(folder / _TORCH, weights)


def _find_weights(path: PathLike, revision: str | None) -> Path:
    here = Path(path)
    if os.path.isfile(here):  # unlike the method, False for a name that is too long
        return here
    if not os.path.exists(here) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        patterns = (_CONFIG, _SAFETENSORS, _TORCH, *_INDICES, "*-of-*.safetensors", "*-of-*.bin")
        here = download(str(path), patterns, revision)
    elif revision is not None:
        raise InputError(f"{path} has no revision {revision!r}: only an id on the hub (owner/name) has revisions")
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


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Weights by name, and {'steps': n} for a training checkpoint."""
    if path.suffix == ".json":
        return read_shards(path, lambda shard: _read(shard)[0]), {}
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    file, steps = torch_files.load(path), {}
    weights = file.tree
    layout = next((layout for layout in _LAYOUTS if isinstance(weights, dict) and layout[0] in weights), None)
    if layout:
        name, counter, prefix = layout
        step, ema = weights.get(counter, 0), weights.get("ema")
        if not isinstance(step, int) or not 0 <= step < 1 << 31:
            raise InputError(f"{path} has {counter}={reprlib.repr(step)}; it is no training checkpoint of the family")
        steps, weights = {"steps": step}, _tensors(path, weights[name])
        weights = {name: x for name, x in weights.items() if name.startswith(prefix)} or weights
        weights = {name: x for name, x in weights.items() if not official.is_constant(name)}
        if ema is not None:
            weights = _averages(path, weights, ema)
    return file.read(_tensors(path, weights)), steps


def _averages(path: Path, model: dict[str, torch_files.Tensor], ema: Any) -> dict[str, torch_files.Tensor]:
    """The averages under the names of the parameters, in whose order they are. Constants have no average."""
    shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
    count = len(shadows) if isinstance(shadows, list | tuple) else "no"
    if count != len(model):
        raise InputError(f"{path} has {count} averaged weights (ema.shadow_params) for {len(model)} parameters")
    weights = _tensors(path, dict(zip(model, shadows, strict=True)))
    if odd := [name for name in model if weights[name].shape != model[name].shape]:
        raise InputError(f"{path}: the averaged weights are not in the order of the model's, at {odd[0][:100]!r}")
    return weights


def _tensors(path: Path, tree: Any) -> dict[str, torch_files.Tensor]:
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise InputError(f"{path} holds neither weights by name nor a training checkpoint of SEDD")
    for name, value in tree.items():
        if not isinstance(value, torch_files.Tensor):
            raise InputError(f"{path} holds no weights but a {type(value).__name__} under {name[:100]!r}")
    return tree
