"""From a config to objects: sections unpack into the constructors they configure, and a run keeps its config."""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_args

from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from sedd_jax.errors import InputError, explained
from sedd_jax.files import read_json, write_atomically

T = TypeVar("T")
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "None"}

# What may differ when a run is resumed: where and how long it runs and what it reports, not what it computes.
_TRAIN = ("steps", "microbatches", "keep_last", "keep_period", "log_every", "eval_every", "sample_every")
MAY_CHANGE = ("mesh", "eval", "sampling", "model.attention", "model.remat", "model.gradient_dtype")
MAY_CHANGE += tuple(f"train.{name}" for name in (*_TRAIN, "checkpoint_every"))
# Where the data lies. What it is, its fingerprint says (`check_same_data`).
PLACES = ("data.source", "data.valid_source", "data.tokenizer_path", "init.source")

# Fields that older runs do not have, with the values that they ran with.
_OPTIM = {"kind": "adamw", "decayed": "all", "decay": "none", "decay_steps": 0, "floor": 0.0}
_DATA = {"prompt_field": None, "label_field": None, "tail": "eot"}
_MODEL = {"parametrisation": "score", "time_conditioning": True, "time_input": "sigma", "qkv_bias": False}
_MODEL |= {"num_classes": 0, "lora_rank": 0, "lora_alpha": 16.0, "residual_dtype": "float32"}
NEWER = {"objective": "sedd", "graph": {"padding": 0}, "model": _MODEL, "data": _DATA, "optim": _OPTIM}


def build(constructor: Callable[..., T], section: str, config: ConfigDict, **given: Any) -> T:
    """`constructor(**config[section], **given)`, with an InputError for a section or field that does not exist."""
    if section not in config:
        raise InputError(f"config.{section} is missing")
    if not isinstance(config[section], ConfigDict):
        raise InputError(f"config.{section} is a {type(config[section]).__name__}; give a section with its fields")
    fields = {name: field for name, field in inspect.signature(constructor).parameters.items() if name not in given}
    for name, field in fields.items():
        if field.default is field.empty and name not in config[section]:
            raise InputError(f"config.{section}.{name} is missing")
    for name, value in config[section].items():
        if name not in fields:
            raise InputError(f"config.{section}.{name} is unknown; config.{section} has {', '.join(fields)}")
        _check_type(f"config.{section}.{name}", value, fields[name].annotation)
    with explained(f"config.{section} has a value of the wrong type", "see configs/small.py", TypeError):
        return constructor(**config[section], **given)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    kinds = get_args(annotation) or (annotation,)
    if isinstance(value, float) and value.is_integer() and float not in kinds:
        value = int(value)
    wider = (*kinds, int) if float in kinds else kinds
    if set(kinds) <= _KINDS.keys() and not isinstance(value, wider):
        raise InputError(f"{name}={value!r}: give {' or '.join(_KINDS[kind] for kind in kinds)}")
    if isinstance(value, int) and abs(value) >= 1 << 32:
        raise InputError(f"{name}={value} is beyond 32 bits; give a smaller number")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'section.field': value} of every field; tuples are lists, as JSON has them."""
    fields = flatten_dict(config.to_dict(), sep=".")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def save(config: ConfigDict, workdir: epath.Path, data: str, tokenizer: str | None = None) -> None:
    """Writes config.json, and data.json with the fingerprints. Without one of the tokenizer, any will do later."""
    write_atomically(workdir / "data.json", json.dumps({"fingerprint": data, "tokenizer": tokenizer}) + "\n")
    write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def load(workdir: epath.Path) -> ConfigDict:
    """The config that a run was started with. Raises InputError if workdir holds no run."""
    remedy = "restore it from a checkpoint's record or a backup"
    if not (config := read_json(workdir / "config.json", remedy=remedy, absent=True)):
        raise InputError(f"--workdir={workdir} holds no run (no config.json); give the directory of a trained model")
    return ConfigDict(config)


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether anything has been trained there: without a checkpoint, a workdir is free for another experiment."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return any(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    return False


def check_same_experiment(config: ConfigDict, workdir: epath.Path) -> None:
    """Raises InputError for checkpoints of no run, or of one whose config differs beyond MAY_CHANGE and PLACES."""
    if not has_checkpoint(workdir):
        return
    saved = load(workdir)
    if "source" not in saved.get("data", {}):
        what = f"--workdir={workdir} holds converted weights, which cannot be trained on"
        raise InputError(f"{what}: choose another --workdir, and begin from them with --init={workdir}")
    for field, there, here in _differences(saved, config, MAY_CHANGE + (PLACES if _data_record(workdir) else ())):
        what = f"--workdir={workdir} holds another experiment: config.{field} is {there!r} there and {here!r} here"
        raise InputError(f"{what}; choose another --workdir or the same config")


def check_same_model(config: ConfigDict, recorded: dict[str, Any], workdir: epath.Path) -> None:
    """Raises InputError if config.json in workdir, read as `config`, is not what its checkpoint was trained with."""
    for field, saved, found in _differences(ConfigDict(recorded), config, MAY_CHANGE + PLACES):
        what = f"{workdir / 'config.json'} has been altered: {field} is {found!r} there and {saved!r} in the checkpoint"
        raise InputError(f"{what}; restore it from the checkpoint's record or a backup")


def _differences(one: ConfigDict, other: ConfigDict, free: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """(field, its value in one config, in the other) where they differ, but for the fields that are free to."""
    configs = [flatten_dict(NEWER, sep=".") | flatten(config) for config in (one, other)]
    for field in sorted(set().union(*configs)):
        values = [config.get(field) for config in configs]
        if values[0] != values[1] and not field.startswith(free):
            yield field, *values


def check_same_tokenizer(fingerprint: str, workdir: epath.Path) -> None:
    """Raises InputError if the weights in workdir were trained with another tokenizer, of any vocabulary size."""
    if _data_record(workdir).get("tokenizer") not in (None, fingerprint):
        what = f"--workdir={workdir} was trained with another tokenizer than the one in it"
        raise InputError(f"{what}: restore tokenizer.json and the files beside it from a copy of the run")


def check_same_data(fingerprint: str, workdir: epath.Path, remedy: str = "choose another --workdir") -> None:
    """Raises InputError if the run in workdir was trained on other tokens, which the same path may hold by now."""
    if has_checkpoint(workdir) and _data_record(workdir).get("fingerprint", fingerprint) != fingerprint:
        what = f"--workdir={workdir} was trained on other data: the corpus or its tokenizer has changed since"
        raise InputError(f"{what} (the embedded corpus does with Python's version); put the old data back, or {remedy}")


def _data_record(workdir: epath.Path) -> dict[str, Any]:
    return read_json(workdir / "data.json", remedy="restore it from a backup", absent=True)
