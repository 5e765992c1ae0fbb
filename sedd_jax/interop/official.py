"""Weights of the PyTorch implementation of SEDD (louaaron/Score-Entropy-Discrete-Diffusion), by its parameter names.

Torch stores a linear layer as [out, in] and we as [in, *out]; it has one entry per block and we stack them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sedd_jax.errors import InputError

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


def _get(tree: Mapping[str, Any], path: str) -> np.ndarray:
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


def from_official(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `Transformer` from arrays under the reference's names.

    The rotary table (`rotary_emb.inv_freq`), which is a constant, may be there or not.
    Raises InputError for a missing or an unknown name.
    """
    left = dict(weights)
    left.pop("rotary_emb.inv_freq", None)

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
    """The inverse of `from_official`, bit for bit; the rotary table is left out."""
    weights = {name: _to_torch(path, _get(params, path), _FUSED_TOP) for path, name in _TOP.items()}
    for path, name in _BLOCK.items():
        for i, layer in enumerate(_get(params["blocks"], path)):
            weights[f"blocks.{i}.{name}"] = _to_torch(path, layer, _FUSED)
    return weights
