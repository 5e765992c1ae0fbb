"""Weights of the PyTorch implementation of SEDD (louaaron/Score-Entropy-Discrete-Diffusion), by its parameter names.

Torch stores a linear layer as [out, in] and we as [in, *out]; it has one entry per block and we stack them.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from sedd_jax.errors import InputError
from sedd_jax.transformer import Transformer

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


def _shapes(config: ConfigDict, num_states: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `Transformer`, by its path."""
    sizes = {name: config.model[name] for name in ("num_layers", "dim", "num_heads", "cond_dim")}
    model = Transformer(num_states=num_states, **sizes)
    tokens, sigma = jnp.zeros((1, 2), jnp.int32), jnp.ones(1)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, sigma)["params"])
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel [in, *out] is [prod(out), in] in torch, a bias [*out] is [prod(out)]; embedding and norms agree."""
    if path.endswith("kernel"):
        return math.prod(shape[1:]), shape[0]
    return (math.prod(shape),) if path.endswith("bias") else shape


def _names(num_layers: int) -> dict[str, list[str]]:
    """Our path -> the reference's names: of the arrays that are stacked in the path of a block, or of one."""
    blocks = {f"blocks/{path}": [f"blocks.{i}.{name}" for i in range(num_layers)] for path, name in _BLOCK.items()}
    return {path: [name] for path, name in _TOP.items()} | blocks


def from_official(weights: Mapping[str, np.ndarray], config: ConfigDict, *, num_states: int) -> dict[str, Any]:
    """Parameters of `Transformer` from arrays under the reference's names.

    config: the section model, of which num_layers, dim, num_heads and cond_dim count. num_states: tokens and MASK.
    The rotary table (`rotary_emb.inv_freq`), which is a constant, may be present or absent.
    Raises InputError for a missing or an unknown name, and for an array of another shape than the config implies.
    """
    left, sizes = dict(weights), config.model
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if layers != {str(i) for i in range(min(sizes.num_layers, len(layers) + 1))}:
        raise InputError(f"the weights have {len(layers)} blocks, and n_blocks={sizes.num_layers} in their config")

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise InputError(f"the weights have no {name!r}; they are not those of a SEDD model")
        found = np.asarray(left.pop(name))
        if found.shape != shape:
            raise InputError(f"{name} is {list(found.shape)}, and {list(shape)} by the config; they are of two models")
        return found

    if ROTARY in left:
        take(ROTARY, (sizes.dim // sizes.num_heads // 2,))
    shapes, params = _shapes(config, num_states), {}
    for path, names in _names(sizes.num_layers).items():
        shape = shapes[path]
        one = shape[1:] if path.startswith("blocks/") else shape
        arrays = [take(name, _torch_shape(path, one)) for name in names]
        params[path] = np.stack([a.T.reshape(one) if path.endswith("kernel") else a for a in arrays]).reshape(shape)
    if left:
        raise InputError(f"the weights have {sorted(left)[0]!r}, which a SEDD model does not")
    return unflatten_dict(params, sep="/")


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_official`, bit for bit, without the rotary table.

    Raises InputError if `params` are not those of a SEDD model.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    names = _names(len(flat.get("blocks/norm1/scale", ())))
    if odd := sorted(names.keys() ^ flat.keys()):
        word = "without" if odd[0] in names else "with"
        raise InputError(f"the official implementation knows no model {word} the parameter {odd[0]}")
    weights = {}
    for path, leaf in flat.items():
        for name, value in zip(names[path], leaf if path.startswith("blocks/") else [leaf], strict=True):
            shape = _torch_shape(path, value.shape)
            flat_out = value.reshape(shape[::-1]).T if path.endswith("kernel") else value.reshape(shape)
            weights[name] = np.ascontiguousarray(flat_out)
    return weights
