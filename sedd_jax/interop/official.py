"""Weights of the PyTorch implementation of SEDD (louaaron/Score-Entropy-Discrete-Diffusion), by its parameter names.

Torch stores a linear layer as [out, in] and we as [in, *out]; it has one entry per block and we stack them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sedd_jax.errors import InputError

# A constant table, which may be among the weights.
ROTARY = "rotary_emb.inv_freq"

# Our path -> the reference's name. The blocks' paths below are relative to blocks.<i>.
_TOP = {
    "embedding": "vocab_embed.embedding",
    "sigma_in/kernel": "sigma_map.mlp.0.weight",
    "sigma_in/bias": "sigma_map.mlp.0.bias",
    "sigma_out/kernel": "sigma_map.mlp.2.weight",
    "sigma_out/bias": "sigma_map.mlp.2.bias",
    "modulation/kernel": "output_layer.adaLN_modulation.weight",
    "modulation/bias": "output_layer.adaLN_modulation.bias",
    "norm/scale": "output_layer.norm_final.weight",
    "head/kernel": "output_layer.linear.weight",
    "head/bias": "output_layer.linear.bias",
}
_BLOCK = {
    "modulation/kernel": "adaLN_modulation.weight",
    "modulation/bias": "adaLN_modulation.bias",
    "norm1/scale": "norm1.weight",
    "qkv/kernel": "attn_qkv.weight",
    "attention_out/kernel": "attn_out.weight",
    "norm2/scale": "norm2.weight",
    "mlp_in/kernel": "mlp.0.weight",
    "mlp_in/bias": "mlp.0.bias",
    "mlp_out/kernel": "mlp.2.weight",
    "mlp_out/bias": "mlp.2.bias",
}
# Several vectors in one output axis: (block level, path prefix) -> how many. Torch has [n * dim], we [n, dim].
_FUSED = {"qkv": 3, "modulation": 6}
_FUSED_TOP = {"modulation": 2}


def _from_torch(path: str, value: np.ndarray, fused: Mapping[str, int]) -> np.ndarray:
    if path.endswith("kernel"):
        value = value.T
    parts = fused.get(path.split("/")[0])
    return value if parts is None else value.reshape(*value.shape[:-1], parts, -1)


def _to_torch(path: str, value: np.ndarray, fused: Mapping[str, int]) -> np.ndarray:
    if path.split("/")[0] in fused:
        value = value.reshape(*value.shape[:-2], -1)
    return np.ascontiguousarray(value.T if path.endswith("kernel") else value)


def _set(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    *parents, leaf = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}/")
        else:
            yield prefix + name


def _get(tree: Mapping[str, Any], path: str) -> np.ndarray:
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


def check_shapes(weights: Mapping[str, np.ndarray], config: ConfigDict, *, num_states: int) -> None:
    """Raises InputError if the arrays, under the reference's names, are not those of the model that config describes.

    config: the section model, of which num_layers, dim, num_heads and cond_dim count. num_states: tokens and MASK.
    """
    model = config.model
    layers = sorted({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if set(layers) != {str(i) for i in range(min(model.num_layers, len(layers) + 1))}:
        raise InputError(f"the weights have {len(layers)} blocks, and n_blocks={model.num_layers} in their config")
    top, block = _shapes(num_states, model.dim, model.cond_dim)
    expected = {_TOP[path]: shape for path, shape in top.items()}
    expected |= {f"blocks.{i}.{_BLOCK[path]}": shape for i in layers for path, shape in block.items()}
    expected[ROTARY] = (model.dim // model.num_heads // 2,)
    for name, shape in expected.items():
        if name in weights and weights[name].shape != shape:
            found = list(weights[name].shape)
            raise InputError(f"{name} is {found}, and {list(shape)} by the config; they are of two models")


def _shapes(rows: int, dim: int, cond_dim: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Of the reference's arrays, under our paths. rows: of the vocabulary, MASK among them."""
    top = {
        "embedding": (rows, dim),
        "sigma_in/kernel": (cond_dim, 256),
        "sigma_in/bias": (cond_dim,),
        "sigma_out/kernel": (cond_dim, cond_dim),
        "sigma_out/bias": (cond_dim,),
        "modulation/kernel": (2 * dim, cond_dim),
        "modulation/bias": (2 * dim,),
        "norm/scale": (dim,),
        "head/kernel": (rows, dim),
        "head/bias": (rows,),
    }
    block = {
        "modulation/kernel": (6 * dim, cond_dim),
        "modulation/bias": (6 * dim,),
        "norm1/scale": (dim,),
        "qkv/kernel": (3 * dim, dim),
        "attention_out/kernel": (dim, dim),
        "norm2/scale": (dim,),
        "mlp_in/kernel": (4 * dim, dim),
        "mlp_in/bias": (4 * dim,),
        "mlp_out/kernel": (dim, 4 * dim),
        "mlp_out/bias": (dim,),
    }
    return top, block


def from_official(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `Transformer` from arrays under the reference's names.

    The rotary table (`rotary_emb.inv_freq`), which is a constant, may be there or not.
    Raises InputError for a missing or an unknown name. Shapes are for `check_shapes`.
    """
    left = dict(weights)
    left.pop(ROTARY, None)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise InputError(f"the weights have no {name!r}; they are not those of a SEDD model")
        return np.asarray(left.pop(name))

    params: dict[str, Any] = {}
    for path, name in _TOP.items():
        _set(params, path, _from_torch(path, take(name), _FUSED_TOP))
    num_layers = len({name.split(".")[1] for name in left if name.startswith("blocks.")})
    for path, name in _BLOCK.items():
        layers = [_from_torch(path, take(f"blocks.{i}.{name}"), _FUSED) for i in range(num_layers)]
        _set(params, f"blocks/{path}", np.stack(layers))
    if left:
        raise InputError(f"the weights have {sorted(left)[0]!r}, which a SEDD model does not")
    return params


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_official`, bit for bit; the rotary table is left out.

    Raises InputError if `params` are not those of a SEDD model.
    """
    expected = {*_TOP, *(f"blocks/{path}" for path in _BLOCK)}
    if odd := sorted(expected ^ set(_paths(params))):
        word = "without" if odd[0] in expected else "with"
        raise InputError(f"the official implementation knows no model {word} the parameter {odd[0]}")
    weights = {name: _to_torch(path, _get(params, path), _FUSED_TOP) for path, name in _TOP.items()}
    for path, name in _BLOCK.items():
        for i, layer in enumerate(_get(params["blocks"], path)):
            weights[f"blocks.{i}.{name}"] = _to_torch(path, layer, _FUSED)
    return weights
