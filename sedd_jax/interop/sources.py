"""Files of other implementations: from the hub, in safetensors format, in shards."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from sedd_jax.errors import InputError, explained
from sedd_jax.files import read_json


def download(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder with these files of the hub's model `name`. Raises InputError if they cannot be had."""
    from huggingface_hub import snapshot_download  # here, since it is slow to import

    # An absent model, no network, no permission, a full disk: some ten types, of three libraries.
    with explained(f"{name} is not a path here, and could not be had from the hub", "check it", Exception):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name. path: a file, or the index of several (see `read_shards`). Raises InputError if the file is
    absent or damaged, or an array is of a type that NumPy does not have (float8)."""
    if path.suffix == ".json":
        return read_shards(path, read_safetensors)
    arrays, damages = {}, (safetensors.SafetensorError, OSError, ValueError)
    sound = explained(f"{path} is absent, damaged or not a safetensors file", "get a sound copy", *damages)
    with sound, safetensors.safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118, it is no dict
            kind = file.get_slice(name).get_dtype()
            with explained(f"{path}: {name} is of the type {kind}", "save it as F32", AttributeError, TypeError):
                arrays[name] = file.get_tensor(name)
    return arrays


def read_shards(index: Path, read: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays by name of all files that an index (`weight_map`: name to file) lists. Raises InputError if the index
    is damaged, or the files beside it do not hold what it says, each array once."""
    places = read_json(index, remedy="get a sound copy").get("weight_map")
    is_shard = re.compile(r"[\w.-]+\.(safetensors|bin)").fullmatch  # no index, and in the same folder
    if not isinstance(places, dict) or not all(isinstance(file, str) and is_shard(file) for file in places.values()):
        raise InputError(f"{index} has no weight_map from names to files beside it; get a sound copy")
    files = sorted(set(places.values()))
    if missing := [file for file in files if not os.path.isfile(index.parent / file)]:
        raise InputError(f"{index}: {len(missing)} of {len(files)} shards are missing ({', '.join(missing)}); get them")
    arrays = {(name, file): value for file in files for name, value in read(index.parent / file).items()}
    if odd := places.items() ^ arrays.keys():
        name, file = min(odd)
        raise InputError(f"only one of {index} and {file} has {name} in this file; get a sound copy of both")
    return {name: value for (name, _), value in arrays.items()}


def without_prefixes(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what wrappers (DistributedDataParallel, compilation, Lightning) put before all names."""
    wrappers = re.match(r"(module\.|_orig_mod\.|backbone\.|model\.)*", os.path.commonprefix(list(weights)))
    return {name[wrappers.end() :]: value for name, value in weights.items()}


def as_float32(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In float32. Raises InputError that names an array neither float32, float16 nor bfloat16, or not finite."""
    for name, value in weights.items():
        if value.dtype.name not in ("float32", "float16", "bfloat16"):
            raise InputError(f"{name} is of the type {value.dtype.name}; expected float32, float16 or bfloat16")
        if not np.isfinite(value).all():
            raise InputError(f"{name} has numbers that are NaN or infinite; such a model gives no scores")
    return {name: value.astype(np.float32, copy=False) for name, value in weights.items()}
