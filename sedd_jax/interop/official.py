"""Parameters of `Transformer` under the names of the PyTorch implementation, and back. That is
louaaron/Score-Entropy-Discrete-Diffusion, whose names its successors kept. Torch stores a linear layer as [out, in] and
one entry per block, we store [in, *out] and stack the blocks."""

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
from sedd_jax.interop.sources import without_prefixes
from sedd_jax.transformer import Transformer

# Constants that may be among the weights. A bias of the logits has to be 0. The table tells the number of heads.
_ROTARY, _LOGIT_BIAS = "rotary_emb.inv_freq", "logit_bias"
_CONSTANTS = ("rotary_emb.cos_cached", "rotary_emb.sin_cached", "sampling_eps_min", "sampling_eps_max", _LOGIT_BIAS)
EMBEDDING, CLASSES, HEAD = "vocab_embed.embedding", "cond_map.embedding_table.weight", "output_layer.linear"
_SIGMA = "sigma_map.mlp"  # in a network that takes a noise level
# Names that an uploader has given to SEDD's layers.
_RENAMED = {"cond_map.mlp.": "sigma_map.mlp.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2."}

# Our path -> the reference's name. {}: the number of the block.
_NAMES = {
    "embedding": EMBEDDING,
    "classes": CLASSES,
    "norm/scale": "output_layer.norm_final.weight",
    "blocks/norm1/scale": "blocks.{}.norm1.weight",
    "blocks/norm2/scale": "blocks.{}.norm2.weight",
    "blocks/attention_out/kernel": "blocks.{}.attn_out.weight",
}
_LINEAR = {
    "sigma_in": f"{_SIGMA}.0",
    "sigma_out": f"{_SIGMA}.2",
    "modulation": "output_layer.adaLN_modulation",
    "head": HEAD,
    "blocks/modulation": "blocks.{}.adaLN_modulation",
    "blocks/qkv": "blocks.{}.attn_qkv",
    "blocks/mlp_in": "blocks.{}.mlp.0",
    "blocks/mlp_out": "blocks.{}.mlp.2",
}
_NAMES |= {f"{ours}/kernel": f"{theirs}.weight" for ours, theirs in _LINEAR.items()}
_NAMES |= {f"{ours}/bias": f"{theirs}.bias" for ours, theirs in _LINEAR.items()}
# Layers that compute several vectors, and how many: torch has [n * dim] outputs, we have [n, dim].
_FUSED = {"modulation": 2, "blocks/modulation": 6, "blocks/qkv": 3}


def plain(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same under SEDD's names, without wrappers' prefixes, constants, and the teacher of a distillation."""
    for name in weights:
        if name.endswith(_LOGIT_BIAS) and np.any(weights[name]):
            raise InputError(f"{name} is not 0; such models are not supported")
    kept = without_prefixes({n: x for n, x in weights.items() if n.endswith(_ROTARY) or not is_constant(n)})
    for old, new in _RENAMED.items():
        kept = {name.replace(old, new): value for name, value in kept.items()}
    return kept


def is_constant(name: str) -> bool:
    """Whether this is no parameter of the network, under any prefix."""
    return name.endswith((_ROTARY, *_CONSTANTS)) or name.startswith("teacher")


def from_official(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `Transformer` from arrays under the reference's names, which `check_shapes` has checked, or from
    those of `fold`. The rotary table, a constant, may be missing."""
    flat, count = {}, len(_blocks(weights))
    for path, name in _NAMES.items():
        values = [np.asarray(weights[name.format(i)]) for i in range(count) if name.format(i) in weights]
        values = [value.T if path.endswith("kernel") else value for value in values]
        if (layer := path.rpartition("/")[0]) in _FUSED:
            values = [value.reshape(*value.shape[:-1], _FUSED[layer], -1) for value in values]
        if values:
            flat[path] = np.stack(values) if path.startswith("blocks/") else values[0]
    return unflatten_dict(flat, sep="/")


def fold(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a network that takes no noise level, without modulation: what it is at sigma = 0, or for RADD the
    biases of norms, goes into the products. A scale goes into the norm, a shift through the product behind it into that
    one's bias (so q, k and v have one), a gate into the product before it. In float64, rounded to float32."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    condition = None
    if f"{_SIGMA}.0.weight" in w:
        condition = np.repeat([1.0, 0.0], 128)  # cosines, then sines, of 0
        for layer in (f"{_SIGMA}.0", f"{_SIGMA}.2"):
            condition = w.pop(f"{layer}.weight") @ condition + w.pop(f"{layer}.bias")
            condition *= (1 + np.tanh(condition / 2)) / 2  # silu

    def modulation(layer: str, count: int) -> np.ndarray:
        """[count, dim]: shift, scale and gate of attention and MLP, or shift and scale of the head."""
        if condition is None:
            return np.outer(np.arange(count) % 3 == 2, np.ones(w[EMBEDDING].shape[1]))
        kernel, bias = (w.pop(f"{layer}.adaLN_modulation.{kind}") for kind in ("weight", "bias"))
        return (kernel @ condition + bias).reshape(count, -1)

    def shift(norm: str, product: str, shift: np.ndarray, scale: np.ndarray) -> None:
        shift = shift + w.pop(f"{norm}.bias", 0) * (1 + scale)
        w[f"{norm}.weight"] *= 1 + scale
        w[f"{product}.bias"] = w.get(f"{product}.bias", 0) + w[f"{product}.weight"] @ shift

    for block in (f"blocks.{i}" for i in _blocks(w)):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, 6)
        shift(f"{block}.norm1", f"{block}.attn_qkv", shift1, scale1)
        w[f"{block}.attn_out.weight"] *= gate1[:, None]
        shift(f"{block}.norm2", f"{block}.mlp.0", shift2, scale2)
        w[f"{block}.mlp.2.weight"] *= gate2[:, None]
        w[f"{block}.mlp.2.bias"] *= gate2
    shift("output_layer.norm_final", HEAD, *modulation("output_layer", 2))
    with np.errstate(over="ignore"):
        return {name: value.astype(np.float32) for name, value in w.items()}


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_official`, bit for bit, without constants. Raises InputError if they are not SEDD's."""
    flat = flatten_dict(params, sep="/")
    if odd := sorted((_NAMES.keys() - {"blocks/qkv/bias", "classes"}) ^ flat.keys()):
        word = "with" if odd[0] in flat else "without"
        raise InputError(f"the official implementation knows no model {word} the parameter {odd[0]}")
    return {name: np.ascontiguousarray(value) for name, value in _to_official(jax.device_get(params)).items()}


def _to_official(params: Mapping[str, Any]) -> dict[str, Any]:
    weights = {}
    for path, values in flatten_dict(params, sep="/").items():
        for i, value in enumerate(values if path.startswith("blocks/") else [values]):
            value = value.reshape(*value.shape[:-2], -1) if path.rpartition("/")[0] in _FUSED else value
            weights[_NAMES[path].format(i)] = value.T if path.endswith("kernel") else value
    return weights


def check_shapes(weights: Mapping[str, np.ndarray], config: ConfigDict, *, num_states: int) -> None:
    """Raises InputError if arrays by the reference's names do not fit config.model. num_states: with MASK, if any."""
    model = build(Transformer, "model", config, num_states=num_states, parent=None, name=None).clone(attention="plain")
    blocks = _blocks(weights)
    # First, since the tree below has an entry per block, and a config may claim any number of them.
    if blocks != {str(i) for i in range(min(model.num_layers, len(blocks) + 1))}:
        what = f"the weights have {len(blocks)} blocks, and n_blocks={model.num_layers} in their config"
        raise InputError(f"{what}; their first name is {min(weights, default=None)!r}")
    # What is yet to be folded may have a modulation, or norms with biases.
    conditioned = model.time_conditioning or f"{_SIGMA}.0.weight" in weights
    model, biases = model.clone(time_conditioning=conditioned, qkv_bias=False, parametrisation="score"), {}
    inputs = jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones(1)
    shapes = jax.eval_shape(lambda: _to_official(nn.unbox(model.init(*inputs)["params"])))
    expected = {_ROTARY: (model.dim // model.num_heads // 2,)} | {name: leaf.shape for name, leaf in shapes.items()}
    if config.model.get("qkv_bias"):
        biases = {name.replace("weight", "bias"): shape for name, shape in expected.items() if "norm" in name}
    for name, shape in reversed((biases | expected).items()):  # sorted by name: first the embedding, which tells most
        if name in weights and weights[name].shape != shape:
            found = list(weights[name].shape)
            raise InputError(f"{name} is {found}, and {list(shape)} by the config; they are of two models")
    if missing := expected.keys() - weights.keys() - {_ROTARY}:
        raise InputError(f"the weights have no {min(missing)!r}; they are not those of the model in their config")
    if odd := weights.keys() - expected.keys() - biases.keys():
        raise InputError(f"the weights have {min(odd)!r}, which the model in their config does not have")


def _blocks(weights: Mapping[str, Any]) -> set[str]:
    return {name.split(".")[1] for name in weights if name.startswith("blocks.")}
