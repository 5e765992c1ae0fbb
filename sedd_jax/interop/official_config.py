"""The configs of the PyTorch implementations of SEDD and its family as ours, and SEDD's back. Hydra composes theirs. A
run saves it as `.hydra/config.yaml`, a published model as `config.json`."""

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
from sedd_jax.errors import InputError, explained

# Graph, parametrisation, and whether the network takes a noise level by default. SEDD's config says it itself.
_LAWS = {
    "mdlm": ("absorbing", "mean", False),
    "radd": ("absorbing", "mean", False),
    "duo": ("uniform", "plugin", True),
    "udlm": ("uniform", "plugin", True),
    "gidd": ("absorbing", "mean", True),
}
FAMILIES = ("sedd", *_LAWS)
_GRAPHS = {"absorb": "absorbing", "uniform": "uniform", "simplex": "uniform"}
_SIZES = {"num_layers": "n_blocks", "dim": "hidden_size", "num_heads": "n_heads", "cond_dim": "cond_dim"}
_NESTED = {ours: f"model.{theirs}" for ours, theirs in _SIZES.items()} | {"length": "model.length"}
_FLAT = _SIZES | {"dim": "hidden_dim", "length": "model_length"}
_GIDD = {"num_layers": "num_hidden_layers", "dim": "hidden_size", "num_heads": "num_attention_heads"}
_GIDD |= {"cond_dim": "timestep_cond_dim", "length": "max_seq_len"}
# What a config calls itself: `model_type`, `algo.name`, or `diffusion` and `parameterization`.
_ALIASES = {"bd3lm": "mdlm", "absorbing_state subs": "mdlm", "uniform d3pm": "udlm"}
_ALIASES |= {"duo_base": "duo", "distillation": "duo"}
# Our fields of `model` that the official implementation has no option for, and what it does.
_FIXED = {"mlp_ratio": 4, "parametrisation": "score", "time_conditioning": True, "time_input": "sigma"}


def read(path: Path, family: str = "auto") -> tuple[str, ConfigDict]:
    """(family, our config) from a file of theirs, JSON or YAML; see `from_official_config`. Raises InputError."""
    with explained(f"{path} cannot be read", "check the path", OSError), path.open("rb") as file:
        text = file.read(1 << 18)
    # Nested some thousand times, or a tag (!!int, !!bool) whose value is another: any type of error.
    with explained(f"{path} is not a config", "get a sound copy", Exception):
        if len(text) == 1 << 18:  # theirs have some thousand
            raise ValueError("it is longer than 256 KiB")
        text, is_json = text.decode("utf-8-sig"), path.suffix == ".json"
        # Ten aliases can stand for gigabytes.
        if not is_json and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has an alias, which is not supported")
        config = json.loads(text) if is_json else yaml.safe_load(text)
        if not isinstance(config, dict):
            raise ValueError("no fields")
    with explained(str(path), "", ValueError, InputError):  # such as an integer of more digits than Python prints
        found = family_of(config)
        if family == "auto" and found is None:
            raise InputError(f"it names no family that is known; say with --from which of {', '.join(FAMILIES)} it is")
        if family not in ("auto", found or family):
            raise InputError(f"it is of the family {found!r}, and not {family!r}; give --from={found}")
        family = found if family == "auto" else family
        return family, from_official_config(config, family)


def _get(official: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A field by its dotted name."""
    for part in name.split("."):
        official = official.get(part, default) if isinstance(official, Mapping) else default
    return official


def family_of(official: Mapping[str, Any]) -> str | None:
    """Whose config this is: one of FAMILIES, or None if nothing says."""
    text = lambda name: str(_get(official, name) or "").lower()  # noqa: E731
    if text("model.type") == "ddit_wot" or text("model.name").endswith("radd"):
        return "radd"
    if _get(official, "graph.type") is not None:
        return "sedd"
    if text("model_type") == "dit" and "p_uniform" in official:
        return "gidd"
    kind = text("model_type") or text("algo.name") or f"{text('diffusion')} {text('parameterization')}"
    return kind if kind in _LAWS else _ALIASES.get(kind)


def from_official_config(official: Mapping[str, Any], family: str = "sedd") -> ConfigDict:
    """A config with all our sections; `data` has the length and, if theirs has it, the vocabulary (without MASK).
    family: one of FAMILIES. Raises InputError for a field that is missing, wrong, or asks for what we do not have."""

    def field(name: str, kind: type | tuple[type, ...]) -> Any:
        if (value := _get(official, name, ...)) is ...:
            raise InputError(f"{name} is missing; this is not the config of such a model")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{name}={reprlib.repr(value)} has the wrong type; this is not the config of such a model")
        return value

    def size(name: str) -> int:
        value = field(name, int)
        if not 0 < value <= 1 << 30:
            raise InputError(f"{name}={reprlib.repr(value)} must lie between 1 and 2**30")
        return value

    def level(name: str) -> float:
        value = field(name, (int, float, str))  # 1e-4, without a point, is text to YAML
        with explained(f"{name}={reprlib.repr(value)}", "give a finite number", ValueError, OverflowError):
            if not math.isfinite(number := float(value)):
                raise ValueError("not a number")
        return number

    def first(*names: str) -> str | None:
        return next((name for name in names if _get(official, name) is not None), None)

    law = _LAWS.get(family)
    if law is None and (graph := field("graph.type", str)) not in _GRAPHS:
        raise InputError(f"graph.type={graph!r} is unknown here; choose one of {', '.join(map(repr, _GRAPHS))}")
    kind = law[0] if law else _GRAPHS[graph]
    nested = law is None or first("model") is not None
    schedule = field("noise.type", str).replace("-", "") if nested else "loglinear"
    names = {name: f"noise.{name}" for name in ("sigma_min", "sigma_max")} if schedule == "geometric" else {}
    if law and schedule == "loglinear" and (eps := first("t_eps", "noise.eps")):
        names = {"eps": eps}
    model = {ours: size(name) for ours, name in (_NESTED if nested else _GIDD if family == "gidd" else _FLAT).items()}
    data = {"length": model.pop("length")}
    if nested and (law is None or first("tokens")):
        data["vocab_size"] = size("tokens")
    elif not nested:
        data["vocab_size"] = size("vocab_size") - (kind == "absorbing")
    if law is None:
        model |= {"dropout": level("model.dropout"), "scale_by_sigma": field("model.scale_by_sigma", bool)}
        if model["scale_by_sigma"] and kind != "absorbing":
            raise InputError("model.scale_by_sigma=True goes with graph.type='absorb' alone")
    else:
        conditioning = first("time_conditioning", "algo.time_conditioning")
        conditioned = field(conditioning, bool) if conditioning and family != "gidd" else law[2]
        model |= {"parametrisation": law[1], "time_conditioning": conditioned, "qkv_bias": not conditioned}
        model |= {"time_input": "t" if family == "gidd" else "sigma"}
        if dropout := first("dropout", "model.dropout"):
            model["dropout"] = level(dropout)
        if (block := _get(official, "block_size") or data["length"]) != data["length"]:
            raise InputError(f"block_size={reprlib.repr(block)}: attention by blocks (BD3LM) is not supported")
        if causal := next((name for name in ("causal", "algo.causal_attention") if _get(official, name)), None):
            raise InputError(f"{causal}=True: causal networks of this family are not supported")
        if first("p_uniform") and level("p_uniform") != 0:
            raise InputError(f"p_uniform={official['p_uniform']}: masks and uniform noise at once are not supported")
    config = ConfigDict({section: {} for section in ("optim", "train", "mesh", "eval", "sampling")})
    config.noise = {"kind": schedule} | {ours: level(theirs) for ours, theirs in names.items()}
    config.update({"graph": {"kind": kind}, "model": model | {"attention": "auto"}, "data": data})
    build(noise.make, "noise", config)
    return config


def to_official_config(config: ConfigDict, *, vocab_size: int) -> dict[str, Any]:
    """Theirs: model, graph, schedule. vocab_size: tokens, without MASK. Raises InputError for what they cannot do."""
    schedule = build(noise.make, "noise", config)
    if getattr(schedule, "eps", 1e-3) != 1e-3:
        raise InputError(f"noise.eps={schedule.eps}: the official implementation only knows 0.001")
    for name, only in _FIXED.items():
        if config.model.get(name, only) != only:
            raise InputError(f"model.{name}={config.model[name]!r}: the official implementation only knows {only!r}")
    absorbing, scale_by_sigma = config.graph.kind == "absorbing", config.model.get("scale_by_sigma")
    scale_by_sigma = absorbing if scale_by_sigma is None else scale_by_sigma
    if scale_by_sigma and not absorbing:
        raise InputError("model.scale_by_sigma=True: the official implementation only has it for the absorbing graph")
    levels = {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max") if hasattr(schedule, name)}
    model = {theirs: config.model[ours] for ours, theirs in _SIZES.items()} | {"length": config.data.length}
    model |= {"scale_by_sigma": scale_by_sigma, "dropout": config.model.get("dropout", 0.1)}
    return {
        "tokens": vocab_size,
        "graph": {"type": "absorb" if absorbing else "uniform", "file": "data", "report_all": False},
        "noise": {"type": config.noise.kind} | levels,
        "model": {"type": "ddit"} | model,
    }
