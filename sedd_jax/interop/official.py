"""Parameters of `Transformer` under the names of the PyTorch implementation, and back.

That is louaaron/Score-Entropy-Discrete-Diffusion. Torch stores a linear layer as [out, in], we store [in, *out]. Torch
has one entry per block, we stack the blocks.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from sedd_jax.config import build
from sedd_jax.errors import InputError
from sedd_jax.transformer import Transformer

# A constant table, which may be among the weights.
ROTARY = "rotary_emb.inv_freq"

# Our path -> the reference's name. {}: the number of the block.
_NAMES = {
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
    "blocks/modulation/kernel": "blocks.{}.adaLN_modulation.weight",
    "blocks/modulation/bias": "blocks.{}.adaLN_modulation.bias",
    "blocks/norm1/scale": "blocks.{}.norm1.weight",
    "blocks/qkv/kernel": "blocks.{}.attn_qkv.weight",
    "blocks/attention_out/kernel": "blocks.{}.attn_out.weight",
    "blocks/norm2/scale": "blocks.{}.norm2.weight",
    "blocks/mlp_in/kernel": "blocks.{}.mlp.0.weight",
    "blocks/mlp_in/bias": "blocks.{}.mlp.0.bias",
    "blocks/mlp_out/kernel": "blocks.{}.mlp.2.weight",
    "blocks/mlp_out/bias": "blocks.{}.mlp.2.bias",
}
# Layers that compute several vectors, and how many: torch has [n * dim] outputs, we have [n, dim].
_FUSED = {"modulation": 2, "blocks/modulation": 6, "blocks/qkv": 3}


def from_official(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `Transformer` from arrays under the reference's names.

    The rotary table (`rotary_emb.inv_freq`), a constant, may be missing. Shapes are not checked: see `check_shapes`.
    Raises InputError for a missing or an unknown name.
    """
    left = {name: value for name, value in weights.items() if name != ROTARY}
    num_layers, flat = len(_blocks(weights)), {}

    def take(path: str, name: str) -> np.ndarray:
        if name not in left:
            raise InputError(f"the weights have no {name!r}; they are not those of a SEDD model")
        value, layer = np.asarray(left.pop(name)), path.rpartition("/")[0]
        value = value.T if path.endswith("kernel") else value
        return value.reshape(*value.shape[:-1], _FUSED[layer], -1) if layer in _FUSED else value

    for path, name in _NAMES.items():
        stacked = path.startswith("blocks/")
        flat[path] = np.stack([take(path, name.format(i)) for i in range(num_layers)]) if stacked else take(path, name)
    if left:
        raise InputError(f"the weights have {min(left)!r}, which a SEDD model does not have")
    return unflatten_dict(flat, sep="/")


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_official`, bit for bit, without the rotary table.

    Raises InputError if `params` are not those of a SEDD model.
    """
    return {name: np.ascontiguousarray(value) for name, value in _to_official(jax.device_get(params)).items()}


def _to_official(params: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten_dict(params, sep="/")
    if odd := sorted(_NAMES.keys() ^ flat.keys()):
        word = "without" if odd[0] in _NAMES else "with"
        raise InputError(f"the official implementation knows no model {word} the parameter {odd[0]}")
    weights = {}
    for path, name in _NAMES.items():
        for i, value in enumerate(flat[path] if path.startswith("blocks/") else [flat[path]]):
            value = value.reshape(*value.shape[:-2], -1) if path.rpartition("/")[0] in _FUSED else value
            weights[name.format(i)] = value.T if path.endswith("kernel") else value
    return weights


def check_shapes(weights: Mapping[str, np.ndarray], config: ConfigDict, *, num_states: int) -> None:
    """Raises InputError if arrays under the reference's names do not fit the section `model` of the config.

    num_states: the tokens, and MASK if the graph has one.
    """
    model = build(Transformer, "model", config, num_states=num_states, parent=None, name=None).clone(attention="plain")
    blocks = _blocks(weights)
    # First, since the tree below has an entry per block, and a config may claim any number of them.
    if blocks != {str(i) for i in range(min(model.num_layers, len(blocks) + 1))}:
        what = f"the weights have {len(blocks)} blocks, and n_blocks={model.num_layers} in their config"
        raise InputError(f"{what}; their first name is {min(weights, default=None)!r}")
    inputs = jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones(1)
    shapes = jax.eval_shape(lambda: _to_official(nn.unbox(model.init(*inputs)["params"])))
    expected = {ROTARY: (model.dim // model.num_heads // 2,)} | {name: leaf.shape for name, leaf in shapes.items()}
    # Sorted by name, so the embedding is the last one: its sizes tell most.
    for name, shape in reversed(expected.items()):
        if name in weights and weights[name].shape != shape:
            found = list(weights[name].shape)
            raise InputError(f"{name} is {found}, and {list(shape)} by the config; they are of two models")


def _blocks(weights: Mapping[str, np.ndarray]) -> set[str]:
    return {name.split(".")[1] for name in weights if name.startswith("blocks.")}
