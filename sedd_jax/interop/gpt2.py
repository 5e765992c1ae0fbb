"""GPT-2 (Radford et al. 2019), to judge samples: its weights as Hugging Face publishes them, and its logits. It is not
our Transformer: positions are learned, all layers have biases, the head may be tied to the embedding."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.devices.sharding import constrain
from sedd_jax.errors import InputError, explained
from sedd_jax.files import read_json
from sedd_jax.interop.causal import Config, assemble, gathered, look_up, product
from sedd_jax.interop.sources import download, read_safetensors, without_prefixes
from sedd_jax.transformer import attention

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FILES = ("config.json", *_WEIGHTS, "model-*.safetensors", "vocab.json", "merges.txt", "tokenizer.json")
_OURS = {"n_embd": "dim", "n_layer": "layers", "n_head": "heads"}
# Options of Hugging Face's GPT-2, and the only value that `hidden` implements.
_FIXED = {"activation_function": "gelu_new", "scale_attn_weights": True}
_FIXED |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def hidden(params: Mapping[str, Any], config: Config, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """The input of the head: activations after the last normalisation. L is at most n_positions."""

    def norm(x, w, part):
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.epsilon)
        return x * w[f"{part}.weight"] + w[f"{part}.bias"]

    def block(x, weights):
        w = gathered(weights)
        linear = lambda x, part: product(x, w[f"{part}.weight"]) + w[f"{part}.bias"]  # noqa: E731
        qkv = linear(norm(x, w, "ln_1"), "attn.c_attn")
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, config.heads, -1), 2, 0)
        x = x + linear(attention.xla(q, k, v, causal=True).reshape(x.shape), "attn.c_proj")
        h = jax.nn.gelu(linear(norm(x, w, "ln_2"), "mlp.c_fc"), approximate=True)
        return constrain(x + linear(h, "mlp.c_proj"), "batch", None, None), None

    params = jax.tree.map(jnp.asarray, params)
    x = constrain(look_up(params["wte"], tokens) + params["wpe"][: tokens.shape[1]], "batch", None, None)
    x, _ = jax.lax.scan(block, x, params["blocks"])
    return norm(x, gathered({name: params[name] for name in ("ln_f.weight", "ln_f.bias")}), "ln_f")


def load(name: str) -> tuple[dict[str, Any], Config, Path]:
    """Weights (float32), sizes, and the folder: `name` itself, or downloaded from the hub by the id `name`. Raises
    InputError for a folder or file that is absent or damaged, another architecture, or weights that do not fit."""
    folder = Path(name)
    if not os.path.exists(folder) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        folder = download(name, _FILES)
    config, paths = _read_config(folder / "config.json"), [folder / name for name in _WEIGHTS]
    path = paths[os.path.exists(paths[1]) and not os.path.exists(paths[0])]
    weights = without_prefixes(read_safetensors(path))
    # A model with a head has this prefix before all names but that of the head.
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    dim, inner = config.dim, config.inner
    shapes = {"ln_1": (dim,), "attn.c_attn": (dim, 3 * dim), "attn.c_proj": (dim, dim)}
    shapes |= {"ln_2": (dim,), "mlp.c_fc": (dim, inner), "mlp.c_proj": (inner, dim)}
    blocks = {f"{part}.weight": shape for part, shape in shapes.items()}
    blocks |= {f"{part}.bias": shape[-1:] for part, shape in shapes.items()}
    top = {"wte": ("wte.weight", config.vocab_size, dim), "wpe": ("wpe.weight", config.n_positions, dim)}
    top |= {name: (name, dim) for name in ("ln_f.weight", "ln_f.bias")}
    if "lm_head.weight" in weights:
        top["lm_head"] = ("lm_head.weight", config.vocab_size, dim)
    params = assemble(path, weights.get, top, blocks, [f"h.{i}" for i in range(config.layers)])
    return params, config, folder


def _read_config(path: Path) -> Config:
    with explained(f"{path} cannot be read", "give a Hugging Face folder of GPT-2", OSError):
        fields = read_json(path, remedy="get a sound copy")
    if fields.get("model_type") != "gpt2":
        raise InputError(f"{path}: model_type is {fields.get('model_type')!r}; only 'gpt2' can judge")
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise InputError(f"{path}: {name}={fields[name]!r} is not supported, only {value!r}")
    with explained(f"{path} is damaged, or not a GPT-2's", "get a sound copy", KeyError, TypeError, ValueError):
        sizes = {_OURS.get(name, name): fields[name] for name in ("vocab_size", "n_positions", *_OURS)}
        sizes["inner"] = fields.get("n_inner") or 4 * sizes["dim"]
        if not all(type(size) is int and size > 0 for size in sizes.values()) or sizes["dim"] % sizes["heads"]:
            raise ValueError(f"the sizes {sizes} make no GPT-2")
        if not 0 <= (epsilon := float(fields.get("layer_norm_epsilon", 1e-5))) < 1:
            raise ValueError(f"layer_norm_epsilon={epsilon}")
        return Config(**sizes, groups=sizes["heads"], epsilon=epsilon)
