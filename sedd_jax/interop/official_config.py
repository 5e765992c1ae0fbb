"""The config of the PyTorch implementation of SEDD as one of ours, and back.

Hydra composes theirs. A run saves it as `.hydra/config.yaml`, a published model as `config.json`.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from sedd_jax import noise
from sedd_jax.config import build
from sedd_jax.errors import InputError

_GRAPHS = {"absorb": "absorbing", "uniform": "uniform"}
_SIZES = {"num_layers": "n_blocks", "dim": "hidden_size", "num_heads": "n_heads", "cond_dim": "cond_dim"}
# Our fields of `model` that the official implementation has no option for, and what it does.
_FIXED = {"mlp_ratio": 4, "parametrisation": "score", "time_conditioning": True}


class _Loader(yaml.SafeLoader):
    """Without aliases, ten of which can stand for gigabytes."""

    def fetch_alias(self) -> None:
        raise yaml.YAMLError("it has an alias, which is not supported")


def read(path: Path) -> ConfigDict:
    """Our config from a file of theirs, JSON or YAML; see `from_official_config`. Raises InputError."""
    try:
        with path.open("rb") as file:
            text = file.read(1 << 18).decode("utf-8-sig")
        if len(text) == 1 << 18:  # theirs have some thousand
            raise ValueError("it is longer than 256 KiB")
        config = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
        if not isinstance(config, dict):
            raise ValueError("no fields")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    # Nested some thousand times, or a tag (!!int, !!bool) whose value is another: any type of error.
    except Exception as error:
        raise InputError(f"{path} is not a config ({' '.join(str(error).split())[:100]}); get a sound copy") from error
    try:
        return from_official_config(config)
    except ValueError as error:  # an InputError, or an integer of more digits than Python prints
        raise InputError(f"{path}: {error}") from error


def from_official_config(official: Mapping[str, Any]) -> ConfigDict:
    """A config with all our sections. Defaults stand for fields that do not matter to a trained model.

    `data` has the length and the vocabulary (without MASK), and no corpus. Raises InputError for a field that is
    missing, of another type, or asks for what is not implemented here.
    """

    def field(name: str, kind: type | tuple[type, ...]) -> Any:
        value: Any = official
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise InputError(f"{name} is missing; this is not the config of a SEDD model")
            value = value[part]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{name}={reprlib.repr(value)} has the wrong type; this is not the config of a SEDD model")
        return value

    def size(name: str) -> int:
        value = field(name, int)
        if not 0 < value <= 1 << 30:
            raise InputError(f"{name}={reprlib.repr(value)} must lie between 1 and 2**30")
        return value

    def level(name: str) -> float:
        value = field(name, (int, float, str))
        try:
            if math.isfinite(number := float(value)):  # 1e-4, without a point, is text to YAML
                return number
            raise ValueError
        except (ValueError, OverflowError) as error:
            raise InputError(f"{name}={reprlib.repr(value)} is not a number") from error

    graph, schedule = field("graph.type", str), field("noise.type", str)
    if graph not in _GRAPHS:
        raise InputError(f"graph.type={graph!r} is unknown here; choose one of {', '.join(map(repr, _GRAPHS))}")
    names = ("sigma_min", "sigma_max") if schedule == "geometric" else ()
    model = {ours: size(f"model.{theirs}") for ours, theirs in _SIZES.items()}
    scale_by_sigma = field("model.scale_by_sigma", bool)
    if scale_by_sigma and graph != "absorb":
        raise InputError("model.scale_by_sigma=True goes with graph.type='absorb' alone")
    model |= {"dropout": level("model.dropout"), "scale_by_sigma": scale_by_sigma, "attention": "auto"}
    config = ConfigDict({section: {} for section in ("optim", "train", "mesh", "eval", "sampling")})
    config.graph = {"kind": _GRAPHS[graph]}
    config.noise = {"kind": schedule} | {name: level(f"noise.{name}") for name in names}
    config.model = model
    config.data = {"length": size("model.length"), "vocab_size": size("tokens")}
    build(noise.make, "noise", config)
    return config


def to_official_config(config: ConfigDict, *, vocab_size: int) -> dict[str, Any]:
    """Theirs, with the model, its graph and its schedule. vocab_size: tokens, without MASK.

    Raises InputError for what their implementation cannot do: another noise.eps than 0.001, another value of a field
    of `_FIXED`, or scale_by_sigma with the uniform graph.
    """
    schedule = build(noise.make, "noise", config)
    if getattr(schedule, "eps", 1e-3) != 1e-3:
        raise InputError(f"noise.eps={schedule.eps}: the official implementation only knows 0.001")
    for name, only in _FIXED.items():
        if config.model.get(name, only) != only:
            raise InputError(f"model.{name}={config.model[name]!r}: the official implementation only knows {only!r}")
    absorbing = config.graph.kind == "absorbing"
    scale_by_sigma = config.model.get("scale_by_sigma")
    if scale_by_sigma is None:
        scale_by_sigma = absorbing
    if scale_by_sigma and not absorbing:
        raise InputError("model.scale_by_sigma=True: the official implementation only has it for the absorbing graph")
    levels = {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max") if hasattr(schedule, name)}
    return {
        "tokens": vocab_size,
        "graph": {"type": "absorb" if absorbing else "uniform", "file": "data", "report_all": False},
        "noise": {"type": config.noise.kind} | levels,
        "model": {
            "type": "ddit",
            **{theirs: config.model[ours] for ours, theirs in _SIZES.items()},
            "length": config.data.length,
            "scale_by_sigma": scale_by_sigma,
            "dropout": config.model.get("dropout", 0.1),
        },
    }
