"""LLaMA-shaped models (Touvron et al. 2023, arXiv 2302.13971) in the GGUF files of llama.cpp, to judge samples: RMS
norm, rotary positions, SwiGLU, heads that share keys and values in groups, and no biases. Weights of any quantisation
that the library `gguf` reads become float32. What is not implemented here is refused by its name."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.data.tokenizers import HuggingFace, Tokenizer
from sedd_jax.devices.sharding import constrain
from sedd_jax.errors import InputError, explained
from sedd_jax.interop.causal import Config, assemble, gathered, look_up, product
from sedd_jax.transformer import attention

# Where words end, by the names of llama.cpp.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = {"smollm": [{"type": "Digits", "individual_digits": True}, _BYTES], "gpt-2": [_BYTES]}
# Types of tokens: symbols that no text has, and those that are looked for in the text first.
_ADDED = _CONTROL, _USER_DEFINED = 3, 4
_SIZES = {"context_length": "n_positions", "embedding_length": "dim", "block_count": "layers"}
_SIZES |= {"feed_forward_length": "inner", "attention.head_count": "heads", "attention.head_count_kv": "groups"}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "epsilon", "rope.freq_base": "base"}


def hidden(params: Mapping[str, Any], config: Config, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """The input of the head: activations after the last normalisation. L is at most n_positions."""
    width = config.dim // config.heads
    turns = np.arange(tokens.shape[1])[:, None, None] * config.base ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.epsilon) * weight

    def rotate(x):
        # The pairs are neighbours: in GGUF the rows of q and k are in this order, and not in that of Hugging Face.
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    def block(x, weights):
        w = gathered(weights)
        linear = lambda x, part: product(x, w[f"{part}.weight"].T)  # noqa: E731
        h = norm(x, w["attn_norm.weight"])
        q, k, v = (linear(h, f"attn_{part}").reshape(*x.shape[:2], -1, width) for part in "qkv")
        k, v = (jnp.repeat(a, config.heads // config.groups, axis=2) for a in (rotate(k), v))
        x = x + linear(attention.xla(rotate(q), k, v, causal=True).reshape(x.shape), "attn_output")
        h = norm(x, w["ffn_norm.weight"])
        h = linear(jax.nn.silu(linear(h, "ffn_gate")) * linear(h, "ffn_up"), "ffn_down")
        return constrain(x + h, "batch", None, None), None

    params = jax.tree.map(jnp.asarray, params)
    x, _ = jax.lax.scan(block, constrain(look_up(params["wte"], tokens), "batch", None, None), params["blocks"])
    return norm(x, gathered(params["norm"]))


def load(path: str) -> tuple[dict[str, Any], Config, Tokenizer]:
    """Weights (float32), sizes and tokenizer. Raises InputError for a file that is damaged or not supported."""
    with explained(f"{path} needs the extra 'judge'", "pip install 'sedd_jax[judge]'", ImportError):
        import gguf
    if not os.path.isfile(path):
        raise InputError(f"{path} is no file; give a GGUF file")
    damage = (ValueError, LookupError, TypeError, OverflowError, RecursionError, OSError)
    with explained(f"{path} is damaged, cut off or no GGUF file", "get a sound copy", *damage):
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("its numbers are big-endian")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        found = {tensor.name: tensor for tensor in reader.tensors}
    config, tokenizer = _config(fields, path), _tokenizer(fields, path)

    def read(name: str) -> np.ndarray | None:
        with explained(f"{path}: {name}", "get it as Q8_0 or F16", NotImplementedError), np.errstate(all="ignore"):
            tensor = found.pop(name, None)
            return tensor and np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    vocab, dim, inner, shared = config.vocab_size, config.dim, config.inner, config.dim // config.heads * config.groups
    shapes = {"attn_norm": (dim,), "attn_q": (dim, dim), "attn_k": (shared, dim), "attn_v": (shared, dim)}
    shapes |= {"attn_output": (dim, dim), "ffn_norm": (dim,), "ffn_gate": (inner, dim), "ffn_up": (inner, dim)}
    shapes |= {"ffn_down": (dim, inner)}
    shapes = {f"{part}.weight": shape for part, shape in shapes.items()}
    top = {"wte": ("token_embd.weight", vocab, dim), "norm": ("output_norm.weight", dim)}
    if "output.weight" in found:
        top["lm_head"] = ("output.weight", vocab, dim)
    params = assemble(path, read, top, shapes, [f"blk.{i}" for i in range(config.layers)])
    if found:
        raise InputError(f"{path}: {min(found)} is not implemented; give another model")
    return params, config, tokenizer


def _config(fields: Mapping[str, Any], path: str) -> Config:
    if (kind := fields.get("general.architecture")) != "llama":
        raise InputError(f"{path}: general.architecture is {kind!r}; only 'llama' can judge")
    own = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    own = {"attention.head_count_kv": own.get("attention.head_count"), **own}
    sizes = {field: own.pop(name, None) for name, field in _SIZES.items()}
    numbers = {field: own.pop(name) for name, field in _NUMBERS.items() if name in own}
    whole = all(type(size) is int and size > 0 for size in sizes.values())
    if not whole or sizes["dim"] % (2 * sizes["heads"]) or sizes["heads"] % sizes["groups"]:
        raise InputError(f"{path}: the sizes {sizes} make no LLaMA; get a sound copy")
    epsilon, base = numbers.get("epsilon"), numbers.get("base", 1.0)
    if not (isinstance(epsilon, float) and 0 < epsilon < 1 and isinstance(base, float) and 0 < base < math.inf):
        raise InputError(f"{path}: {numbers} are no epsilon and base; get a sound copy")
    tokens, width = fields.get("tokenizer.ggml.tokens"), sizes["dim"] // sizes["heads"]
    count = len(tokens) if isinstance(tokens, list) else 0
    fixed = {"vocab_size": count, "rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
    fixed |= dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), width)
    for name, value in own.items():
        if name not in fixed or value != fixed[name]:
            only = f", only {fixed[name]!r}" if name in fixed else ""
            raise InputError(f"{path}: llama.{name}={value!r:.60} is not supported{only}; give another model")
    return Config(vocab_size=count, **sizes, **numbers)


def _tokenizer(fields: Mapping[str, Any], path: str) -> Tokenizer:
    """Byte-level BPE, as the `tokenizer.json` that it was made from."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    for name, known in {"model": ["gpt2"], "pre": [*_WORDS], "add_bos_token": [False, None]}.items():
        if own.get(name) not in known:
            only = f"only {' and '.join(map(repr, known[:2]))}"
            raise InputError(f"{path}: tokenizer.ggml.{name}={own.get(name)!r:.60} is not supported, {only}")
    damage = LookupError, TypeError, ValueError, InputError
    with explained(f"{path} has no sound tokenizer", "get a sound copy", *damage):
        tokens, kinds, merges = own["tokens"], own["token_type"], own["merges"]
        if len(set(tokens)) != len(tokens):
            raise ValueError("it names a token twice")
        made = {*"".join(tokens), *(merge.replace(" ", "") for merge in merges)}
        if odd := [name for name, kind in zip(tokens, kinds, strict=True) if kind == 1 and name not in made]:
            raise ValueError(f"its merges do not make {min(odd)!r}")
        named = enumerate(zip(tokens, kinds, strict=True))
        added = [{"id": i, "content": name, "special": kind == _CONTROL} for i, (name, kind) in named if kind in _ADDED]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content = {
            "added_tokens": [token | flags for token in added],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _WORDS[own["pre"]]},
            "decoder": _BYTES,
            "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(tokens)}, "merges": merges},
        }
        end = {"eos_token": tokens[own["eos_token_id"]]}
        tokenizer = HuggingFace(json.dumps(content).encode(), json.dumps(end).encode())
        if tokenizer.vocab_size != len(tokens):
            raise ValueError("its ids have gaps")
        return tokenizer
