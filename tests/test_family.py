"""Published networks of SEDD's family: their logits through real files, read in every layout, folded or not.

`logits` is the architecture in NumPy, float64, under its own names; figures of the PyTorch implementations are compared
too where tests/golden/family.npz is (4 MB, not in the repository; tests/golden/README.md).
"""

import json
import pathlib
import pickle
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
import yaml
from etils import epath

from sedd_jax.data import tokenizers
from sedd_jax.errors import InputError
from sedd_jax.interop import load, torch_files
from sedd_jax.interop.official import CLASSES, from_official, plain
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.trained import load_trained, write_workdir

TORCH_FILES = pathlib.Path(__file__).parent / "torch_files"
GOLDEN = pathlib.Path(__file__).parent / "golden" / "family.npz"
SIZES = {"dim": 16, "heads": 2, "blocks": 2, "cond": 4, "rows": 11, "length": 6}
FAMILIES = ("sedd", "mdlm", "radd", "duo", "udlm", "gidd")


def make_weights(family, *, dim, blocks, cond, rows, heads, **_):
    """Random, with activations of order 1, under the names of the family."""
    draw = np.random.default_rng(0)
    shapes = {"vocab_embed.embedding": (rows, dim), "output_layer.linear.weight": (rows, dim)}
    shapes |= {"output_layer.linear.bias": (rows,), "output_layer.norm_final.weight": (dim,)}
    for i in range(blocks):
        wide = {"attn_qkv": (3 * dim, dim), "attn_out": (dim, dim), "mlp.0": (4 * dim, dim), "mlp.2": (dim, 4 * dim)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in wide.items()}
        shapes |= {f"blocks.{i}.mlp.{n}.bias": (k * dim,) for n, k in ((0, 4), (2, 1))}
        shapes |= {f"blocks.{i}.norm{n}.weight": (dim,) for n in (1, 2)}
    if family == "radd":
        shapes |= {name.replace("weight", "bias"): shape for name, shape in shapes.items() if "norm" in name}
    else:
        shapes |= {"sigma_map.mlp.0.weight": (cond, 256), "sigma_map.mlp.2.weight": (cond, cond)}
        shapes |= {f"sigma_map.mlp.{n}.bias": (cond,) for n in (0, 2)}
        for layer, count in [("output_layer", 2), *((f"blocks.{i}", 6) for i in range(blocks))]:
            name = f"{layer}.adaLN_modulation"
            shapes |= {f"{name}.weight": (count * dim, cond), f"{name}.bias": (count * dim,)}
    weights = {name: draw.normal(size=shape) / shape[-1] ** (len(shape) > 1) ** 0.5 for name, shape in shapes.items()}
    weights = {name: (value + ("norm" in name)).astype(np.float32) for name, value in weights.items()}
    return weights | {"rotary_emb.inv_freq": (1e4 ** -np.linspace(0, 1, dim // heads // 2, False)).astype(np.float32)}


def logits(weights, x, told, heads):
    """[B, L, rows]. told: a number per sequence."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)  # noqa: E731
    silu = lambda x: x * scipy.special.expit(x)  # noqa: E731
    angles = np.asarray(told, np.float64)[:, None] * 1e4 ** (-np.arange(128) / 128)
    condition = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    if "sigma_map.mlp.0.weight" in w:
        condition = silu(linear(silu(linear(condition, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
        condition = condition + silu(w[CLASSES][-1] if CLASSES in w else 0)  # of no class
    h = w["vocab_embed.embedding"][x]
    modulation = lambda layer, n: (  # noqa: E731
        np.split(linear(condition, f"{layer}.adaLN_modulation")[:, None], n, -1)
        if f"{layer}.adaLN_modulation.weight" in w
        else [np.float64(i % 3 == 2) for i in range(n)]
    )

    def norm(h, name, shift, scale):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return (h * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)) * (1 + scale) + shift

    def rotated(h):
        half = h.shape[-1] // 2
        angle = np.arange(h.shape[1])[:, None, None] * 1e4 ** (-np.arange(half) / half)
        first, second = h[..., :half], h[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    for block in (f"blocks.{i}" for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")}))):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, 6)
        qkv = linear(norm(h, f"{block}.norm1", shift1, scale1), f"{block}.attn_qkv")
        q, k, v = np.moveaxis(qkv.reshape(*x.shape, 3, heads, -1), 2, 0)
        scores = np.einsum("bqhd,bkhd->bhqk", rotated(q), rotated(k)) / np.sqrt(q.shape[-1])
        mixed = np.einsum("bhqk,bkhd->bqhd", scipy.special.softmax(scores, -1), v).reshape(h.shape)
        h = h + gate1 * linear(mixed, f"{block}.attn_out")
        inside = linear(norm(h, f"{block}.norm2", shift2, scale2), f"{block}.mlp.0")
        inside = 0.5 * inside * (1 + np.tanh(np.sqrt(2 / np.pi) * (inside + 0.044715 * inside**3)))
        h = h + gate2 * linear(inside, f"{block}.mlp.2")
    return linear(norm(h, "output_layer.norm_final", *modulation("output_layer", 2)), "output_layer.linear")


def make_config(family, *, dim, blocks, cond, rows, heads, length):
    """The fields of config.json, as published."""
    nested = {"hidden_size": dim, "cond_dim": cond, "length": length, "n_blocks": blocks, "n_heads": heads}
    flat = {"hidden_dim": dim, "cond_dim": cond, "model_length": length, "n_blocks": blocks, "n_heads": heads}
    flat |= {"dropout": 0.1, "vocab_size": rows, "torch_dtype": "float32"}
    geometric = {"type": "geometric", "sigma_min": 1e-4, "sigma_max": 20}
    gidd = {"hidden_size": dim, "num_hidden_layers": blocks, "num_attention_heads": heads, "timestep_cond_dim": cond}
    gidd |= {"max_seq_len": length, "vocab_size": rows, "t_eps": 1e-4, "p_uniform": 0.0, "model_type": "dit"}
    sedd = {"type": "ddit", "scale_by_sigma": False, "dropout": 0.1}
    return {
        "sedd": {"tokens": rows, "graph": {"type": "simplex"}, "noise": geometric, "model": nested | sedd},
        "radd": {
            "tokens": rows - 1,
            "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
            "model": nested | {"name": "small_radd", "type": "ddit_wot", "dropout": 0.02, "dtype": "float16"},
        },
        "mdlm": flat | {"model_type": "mdlm", "time_conditioning": False, "return_dict": False},
        "duo": flat | {"model_type": "DUO", "causal": False, "time_conditioning": True},
        "udlm": flat | {"model_type": "udlm", "time_conditioning": True, "cfg": False, "cfg_num_classes": -1},
        "gidd": gidd,
    }[family]


def hydra(family, config):
    """The fields of .hydra/config.yaml of a run; the vocabulary is that of its tokenizer."""
    model = {"hidden_size": config["hidden_dim"], "length": config["model_length"], "type": "ddit", "dropout": 0.1}
    model |= {name: config[name] for name in ("cond_dim", "n_blocks", "n_heads")}
    noise = {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20}
    fields = {
        "mdlm": {"diffusion": "absorbing_state", "parameterization": "subs", "time_conditioning": False},
        "udlm": {"diffusion": "uniform", "parameterization": "d3pm", "time_conditioning": True},
        "duo": {"algo": {"name": "duo", "time_conditioning": True, "causal_attention": False}},
    }[family]
    return fields | {"model": model, "noise": {"type": "log-linear", "eps": 1e-3} if family == "duo" else noise}


def write(folder, weights, config, layout="safetensors"):
    """A published model, or a training run. Returns what `load` is given."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    wrapped = {f"backbone.{name}": value for name, value in weights.items()}
    if layout == "safetensors":
        safetensors.numpy.save_file(wrapped, folder / "model.safetensors")
    elif layout == "torch":
        torch_files.save(epath.Path(folder / "pytorch_model.bin"), weights)
    elif layout == "sharded":
        places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(wrapped)}
        for file in set(places.values()):
            part = {name: value for name, value in wrapped.items() if places[name] == file}
            safetensors.numpy.save_file(part, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def told(family, sigma):
    return {"mdlm": 0 * sigma, "gidd": 1 - np.exp(-sigma)}.get(family, sigma)


def found_logits(params, config, x, sigma, labels=None):
    """Those of the network of the experiment."""
    model = make_experiment(config, config.data.vocab_size, jax.devices()[:1]).model
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def apply(x, sigma):
        head = lambda model, *args: model.head(model.features(*args, labels=labels))  # noqa: E731
        return model.apply({"params": params}, x, sigma, method=head)

    return apply(jnp.asarray(x, jnp.int32), jnp.asarray(sigma, jnp.float32))


def require_logits(source, family, x, sigma, expected):
    params, config = load(source)
    found = found_logits(params, config, x, sigma)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    return params, config


@pytest.fixture(scope="module")
def inputs():
    draw = np.random.default_rng(1)
    return draw.integers(SIZES["rows"], size=(3, SIZES["length"])), np.float32([0.05, 0.9, 4.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_through_files(tmp_path, family, inputs):
    x, sigma = inputs
    weights, config = make_weights(family, **SIZES), make_config(family, **SIZES)
    if family == "udlm":
        weights[CLASSES] = np.random.default_rng(2).normal(size=(4, SIZES["cond"])).astype("f4")
    expected, layout = logits(weights, x, told(family, sigma), SIZES["heads"]), "safetensors"
    if family == "sedd":  # names that its uploader gave
        renamed = {"sigma_map": "cond_map", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
        for old, new in renamed.items():
            weights = {name.replace(old, new): value for name, value in weights.items()}
    elif family == "gidd":  # constants, and rows up to a multiple of 128
        for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
            weights[name] = np.concatenate(
                [weights[name], np.ones((128 - SIZES["rows"], *weights[name].shape[1:]), "f4")]
            )
        weights |= {"logit_bias": np.zeros(1, "f4"), "rotary_emb.cos_cached": np.ones((1, 6, 3, 1, 8), "f4")}
    else:
        layout = {"radd": "torch", "duo": "sharded"}.get(family, layout)
    params, config = require_logits(write(tmp_path / "hf", weights, config, layout), family, x, sigma, expected)
    uniform = family in ("sedd", "duo", "udlm")
    assert config.graph.kind == ("uniform" if uniform else "absorbing")
    assert config.data.to_dict() == {"length": 6, "vocab_size": 11 if uniform else 10}
    assert config.noise.to_dict() == {
        "sedd": {"kind": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0},
        "gidd": {"kind": "loglinear", "eps": 1e-4},
    }.get(family, {"kind": "loglinear"})
    law = {"sedd": "score"}.get(family, "plugin" if uniform else "mean")
    assert config.model.get("parametrisation", "score") == law
    assert config.model.get("num_classes", 0) == (3 if family == "udlm" else 0)
    folded = family in ("mdlm", "radd")
    assert ("modulation" not in params) == ("bias" in params["blocks"]["qkv"]) == folded


@pytest.mark.skipif(not GOLDEN.exists(), reason="tests/golden/family.npz is not here; see tests/golden/README.md")
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_logits_of_the_pytorch_implementations(tmp_path, family):
    with np.load(GOLDEN) as file:
        figures = dict(file)
    weights = {name.removeprefix(f"{family}|"): x for name, x in figures.items() if name.startswith(f"{family}|")}
    table = weights.pop(f"backbone.{CLASSES}", None)
    config = make_config(family, dim=64, blocks=3, cond=32, rows=101, heads=4, length=24)
    labelled, figures = figures["udlm_cond>"], (figures["x"], figures["sigma"], figures[f"{family}>"])
    for layout in ("safetensors", "torch", "sharded"):
        params, found = require_logits(write(tmp_path / layout, plain(weights), config, layout), family, *figures)
    if family == "mdlm":  # not folded, and told sigma = 0
        found.model.update({"time_conditioning": True, "qkv_bias": False})
        whole = found_logits(from_official(plain(weights)), found, figures[0], 0 * figures[1])
        np.testing.assert_allclose(whole, figures[2], atol=2e-5)
    if table is not None:
        params, found = load(write(tmp_path / "classes", plain(weights) | {CLASSES: table}, config))
        with_labels = found_logits(params, found, *figures[:2], labels=jnp.array([0, 3, 5]))
        np.testing.assert_allclose(with_labels, labelled, atol=2e-5)
        assert found.model.num_classes == 5
    reference = logits(plain(weights), figures[0], told(family, figures[1]), 4)
    np.testing.assert_allclose(reference, figures[2], atol=2e-5)


@pytest.mark.parametrize("family", ["mdlm", "duo", "udlm"])
def test_layouts_and_configs_of_runs_agree(tmp_path, family):
    weights, published = make_weights(family, **SIZES), make_config(family, **SIZES)
    expected, config = load(write(tmp_path / "hf", weights, published))
    for layout in ("torch", "sharded"):
        params, again = load(write(tmp_path / layout, weights, published, layout), family=family)
        assert again == config
        assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(hydra(family, published)))
    _, again = load(tmp_path / "hf", config_file=tmp_path / "config.yaml")
    assert (again.graph, again.model, again.data) == (config.graph, config.model, config.data)
    assert again.noise.to_dict() == {"kind": "loglinear"} | ({"eps": 1e-3} if family == "duo" else {})


def lightning_run(folder):
    """A run of MDLM's code with torch_files/last.ckpt, of 1 block and width 4."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    sizes = {"dim": 4, "heads": 1, "blocks": 1, "cond": 1, "rows": 6, "length": 8}
    config = yaml.safe_dump(hydra("mdlm", make_config("mdlm", **sizes)))
    (folder / ".hydra" / "config.yaml").write_text(config)
    shutil.copy(TORCH_FILES / "last.ckpt", folder / "checkpoints")
    return folder


def test_a_checkpoint_of_lightning_gives_its_averages(tmp_path):
    params, config = load(lightning_run(tmp_path / "run"))
    assert config.train.steps == 7 and config.data.to_dict() == {"length": 8, "vocab_size": 5}
    # Parameter number n holds n + i / 1024 at its place i, and its average half a unit more.
    assert params["embedding"][1, 2] == 0.5 + 6 / 1024
    tree = torch_files.load(tmp_path / "run" / "checkpoints" / "last.ckpt").tree
    assert type(tree["hyper_parameters"]["tokenizer"]) is torch_files.Opaque
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")[1] == config
    (tmp_path / "run" / ".hydra" / "config.yaml").unlink()
    with pytest.raises(InputError, match="last.ckpt has no config.json or .hydra/config.yaml beside it"):
        load(tmp_path / "run")


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("mdlm", {"model_type": "bd3lm", "block_size": 4}, r"block_size=4: attention by blocks \(BD3LM\)"),
        ("gidd", {"p_uniform": 0.1}, "p_uniform=0.1: masks and uniform noise at once"),
        ("duo", {"causal": True}, "causal=True"),
        ("mdlm", {"model_type": "llama"}, "names no family that is known; say with --from which of sedd, mdlm"),
        ("mdlm", {"time_conditioning": "no"}, "time_conditioning='no' has the wrong type"),
        ("mdlm", {"vocab_size": 12}, r"vocab_embed.embedding is \[11, 16\], and \[12, 16\] by the config"),
        ("mdlm", {"time_conditioning": None, "model_type": "duo", "vocab_size": None}, "vocab_size=None"),
        ("duo", {"n_heads": 4}, r"rotary_emb.inv_freq is \[4\], and \[2\] by the config"),
        ("radd", {"noise": {"type": "cosine"}}, "noise.kind='cosine' is unknown"),
        ("gidd", {"max_seq_len": 1 << 40}, "max_seq_len=1099511627776 must lie between"),
    ],
)
def test_configs_that_are_not_supported(tmp_path, family, change, named):
    source = write(tmp_path / "hf", make_weights(family, **SIZES), make_config(family, **SIZES) | change)
    with pytest.raises(InputError, match=named):
        load(source)


def test_a_block_as_long_as_the_sequences_is_mdlm(tmp_path):
    config = make_config("mdlm", **SIZES)
    expected = load(write(tmp_path / "mdlm", make_weights("mdlm", **SIZES), config))[1]
    blocks = {"model_type": "bd3lm", "block_size": 6}
    assert load(write(tmp_path / "bd3lm", make_weights("mdlm", **SIZES), config | blocks))[1] == expected


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("udlm", {CLASSES: np.ones((6, 5), "f4")}, r"embedding_table.weight is \[6, 5\], and \[6, 4\]"),
        ("mdlm", {CLASSES: np.ones((6, 4), "f4")}, "'cond_map.embedding_table.weight', which the model"),
        ("udlm", {CLASSES: np.ones((), "f4")}, "'cond_map.embedding_table.weight', which the model"),
        ("gidd", {"logit_bias": np.ones(11, "f4")}, "logit_bias is not 0"),
        ("mdlm", {"blocks.0.attn_qkv.extra": np.ones(1, "f4")}, "'blocks.0.attn_qkv.extra', which the model"),
        ("mdlm", {"blocks.1.adaLN_modulation.bias": None}, "no 'blocks.1.adaLN_modulation.bias'"),
        ("mdlm", {"sigma_map.mlp.0.bias": np.full(4, np.nan, "f4")}, "sigma_map.mlp.0.bias has numbers that are NaN"),
        ("mdlm", {"output_layer.linear.weight": np.full((11, 16), 3e38, "f4")}, "bias has numbers that are NaN or inf"),
        ("mdlm", {"vocab_embed.embedding": np.ones((), "f4")}, r"vocab_embed.embedding is \[\]"),
        ("radd", {"blocks.0.norm2.bias": np.ones(3, "f4")}, r"blocks.0.norm2.bias is \[3\], and \[16\]"),
        ("radd", {"output_layer.norm_final.weight": None}, "no 'output_layer.norm_final.weight'"),
        ("duo", {"sigma_map.mlp.0.weight": np.ones((4, 256), "f8")}, "of the type float64"),
        ("duo", {name: None for name in make_weights("duo", **SIZES) if "sigma" in name}, "no 'sigma_map.mlp.0.bias'"),
    ],
    ids=range(13),
)
def test_weights_that_are_not_supported(tmp_path, family, change, named):
    weights = {n: x for n, x in (make_weights(family, **SIZES) | change).items() if x is not None}
    with pytest.raises(InputError, match=named):
        load(write(tmp_path / "hf", weights, make_config(family, **SIZES)))


def test_objects_in_the_place_of_weights_are_refused(tmp_path):
    folder = write(tmp_path / "hf", {"x": np.ones(1, "f4")}, make_config("mdlm", **SIZES))
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "last.ckpt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"state_dict": {"backbone.head": pathlib.PurePosixPath()}}, 2))
    with pytest.raises(InputError, match="last.ckpt holds no weights but a Opaque under 'backbone.head'"):
        load(folder)


def test_names_of_families_and_revisions_are_checked(tmp_path):
    source = write(tmp_path / "hf", make_weights("mdlm", **SIZES), make_config("mdlm", **SIZES))
    with pytest.raises(InputError, match="it is of the family 'mdlm', and not 'duo'; give --from=mdlm"):
        load(source, family="duo")
    with pytest.raises(InputError, match="hf has no revision 'main': only an id on the hub"):
        load(source, revision="main")


def test_the_hub_is_asked_for_the_revision(tmp_path, monkeypatch):
    source, asked = write(tmp_path / "hf", make_weights("mdlm", **SIZES), make_config("mdlm", **SIZES)), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *name, **options: asked.append(options) or source)
    load("kuleshov-group/mdlm-owt", revision="abc")
    assert asked[0]["revision"] == "abc" and "*-of-*.safetensors" in asked[0]["allow_patterns"]


def test_more_rows_than_tokens_are_kept_and_shown(tmp_path):
    sizes = SIZES | {"rows": 258}
    source, workdir = (
        write(tmp_path / "hf", make_weights("duo", **sizes), make_config("duo", **sizes)),
        tmp_path / "run",
    )
    write_workdir(epath.Path(workdir), *load(source), tokenizers.Bytes())
    trained = load_trained(epath.Path(workdir), log=pytest.fail)
    assert (trained.config.graph.padding, trained.config.data.vocab_size) == (1, 257)
    assert trained.experiment.graph.num_states == len(trained.params["embedding"]) == 258
    assert trained.tokenizer.decode([257, 0x61]) == "<|257|>a"


def test_a_tokenizer_of_another_size_leaves_nothing_behind(tmp_path):
    params, config = load(write(tmp_path / "hf", make_weights("duo", **SIZES), make_config("duo", **SIZES)))
    with pytest.raises(InputError, match="the tokenizer has 257 tokens and the weights are for 11"):
        write_workdir(epath.Path(tmp_path / "run"), params, config, tokenizers.Bytes())
    assert not (tmp_path / "run").exists()
