"""A LLaMA of a few kilobytes as the GGUF file that llama.cpp's converter would write, and its logits in plain NumPy."""

import gguf
import numpy as np
import scipy.special
import tokenizers as library

MERGES = ["t h", "th e", "Ġ the", "1 2"]
LETTERS = sorted(library.pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_end|>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
LAYERS, DIM, INNER, HEADS, GROUPS, EPSILON, BASE = 2, 32, 64, 4, 2, 1e-3, 500.0
WIDTH = DIM // HEADS
KINDS = {"q": "Q8_0", "k": "Q4_1", "v": "F16", "output": "Q8_0", "gate": "Q4_1", "up": "F32", "down": "Q8_0"}
FIELDS = {
    "llama.context_length": 24,
    "llama.embedding_length": DIM,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": GROUPS,
    "llama.attention.layer_norm_rms_epsilon": EPSILON,
    "llama.rope.freq_base": BASE,
    "llama.rope.dimension_count": WIDTH,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, *[1] * (len(TOKENS) - 2)],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": False,
}


def draw_weights():
    """Weights by the names of GGUF. Rows of q and k are in Hugging Face's order: i and i + WIDTH / 2 are a pair."""
    draw, shapes = np.random.default_rng(0), {"token_embd": (len(TOKENS), DIM), "output_norm": (DIM,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}_norm": (DIM,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{name}": (DIM, DIM) for name in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{name}": (DIM * GROUPS // HEADS, DIM) for name in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{name}": (INNER, DIM) for name in ("gate", "up")} | {f"blk.{i}.ffn_down": (DIM, INNER)}
    return {f"{name}.weight": draw.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def write_llama(path, *, fields=None, weights=None):
    """The file, with other fields and weights (None for no such one)."""
    fields = FIELDS | (fields or {})
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for name, value in fields.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
            sub = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(name, value, kind, sub)
    for name, value in (draw_weights() | (weights or {})).items():
        if value is not None:
            matrix = name.removesuffix(".weight").split("_")[-1] if "blk" in name else ""
            kind = gguf.GGMLQuantizationType[KINDS.get(matrix, "F32")]
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                value = value.reshape(-1, 2, WIDTH // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(value, kind):
    """What quantisation leaves of the rows: blocks of 32 numbers of 8 bits with a scale, or of 4 with a least too."""
    blocks = value.astype(np.float64).reshape(-1, 32)
    if kind == "Q8_0":
        scale = np.abs(blocks).max(1, keepdims=True) / 127
        kept = np.round(blocks / scale) * scale.astype(np.float16).astype(np.float64)
    elif kind == "Q4_1":
        least = blocks.min(1, keepdims=True)
        scale = (blocks.max(1, keepdims=True) - least) / 15
        half = lambda a: a.astype(np.float16).astype(np.float64)  # noqa: E731
        kept = np.floor((blocks - least) / scale + 0.5) * half(scale) + half(least)
    else:
        kept = blocks.astype({"F16": np.float16, "F32": np.float32}[kind]).astype(np.float64)
    return kept.reshape(value.shape)


def reference_logits(tokens):
    """For one sequence, position by position and head by head, in float64, with Hugging Face's rotation of halves."""
    weights = draw_weights()
    w = {name[:-7]: value.astype(np.float64) for name, value in weights.items()}
    for name, value in w.items():
        if "blk" in name and value.ndim > 1:
            w[name] = rounded(value, KINDS[name.split("_")[-1]])
    norm = lambda x, name: x / np.sqrt(np.mean(x * x) + EPSILON) * w[name]  # noqa: E731

    def rotate(x, position):
        angle = position * BASE ** (-np.arange(WIDTH // 2) * 2 / WIDTH)
        a, b = x[: WIDTH // 2], x[WIDTH // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    xs = [w["token_embd"][token] for token in tokens]
    for layer in range(LAYERS):
        name, after = f"blk.{layer}.", []
        q, k, v = (
            [(w[f"{name}attn_{part}"] @ norm(x, f"{name}attn_norm")).reshape(-1, WIDTH) for x in xs] for part in "qkv"
        )
        for i, x in enumerate(xs):
            mixed = []
            for head in range(HEADS):
                group = head * GROUPS // HEADS
                query = rotate(q[i][head], i)
                scores = [query @ rotate(k[j][group], j) / np.sqrt(WIDTH) for j in range(i + 1)]
                mixed.append(sum(s * v[j][group] for j, s in enumerate(scipy.special.softmax(scores))))
            x = x + w[f"{name}attn_output"] @ np.concatenate(mixed)
            h = norm(x, f"{name}ffn_norm")
            gate = w[f"{name}ffn_gate"] @ h
            after.append(x + w[f"{name}ffn_down"] @ (gate * scipy.special.expit(gate) * (w[f"{name}ffn_up"] @ h)))
        xs = after
    return np.stack([w["token_embd"] @ norm(x, "output_norm") for x in xs])
