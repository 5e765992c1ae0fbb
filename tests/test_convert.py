"""Weights of the PyTorch implementation, read from real files, give its log-scores and come back bit for bit."""

import io
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
import sentencepiece
import yaml
from etils import epath
from running import files, make_config, run, start, write_text

from sedd_jax.config import build
from sedd_jax.data import tokenizers
from sedd_jax.errors import InputError
from sedd_jax.files import new_directory
from sedd_jax.interop import load_official, save_official, torch_files
from sedd_jax.interop.official_config import from_official_config
from sedd_jax.interop.sources import read_safetensors
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.trained import load_trained, write_workdir
from sedd_jax.transformer import Transformer

GOLDEN = pathlib.Path(__file__).parent / "golden"
CHECKPOINT = pathlib.Path(__file__).parent / "torch_files" / "checkpoint.pth"


def official_config(kind, **model):
    """The fields of the published config.json."""
    sizes = {"hidden_size": 64, "cond_dim": 32, "length": 32, "n_blocks": 2, "n_heads": 4, "dropout": 0.1} | model
    return {
        "ngpus": 8,
        "tokens": 50,
        "training": {"batch_size": 512, "n_iters": 1300001, "ema": 0.9999},
        "graph": {"type": kind, "file": "data", "report_all": False},
        "noise": {"type": "loglinear" if kind == "absorb" else "geometric", "sigma_min": 1e-4, "sigma_max": 20},
        "model": {
            "name": "small",
            "type": "ddit",
            **sizes,
            "scale_by_sigma": kind == "absorb",
            "dropout": 0.1,
            **model,
        },
    }


def figures(kind):
    with np.load(GOLDEN / f"model_{kind}.npz") as file:
        return dict(file)


def golden_weights(kind):
    return {name.removeprefix("param/"): v for name, v in figures(kind).items() if name.startswith("param/")}


def write_folder(folder, weights, config, *, format="safetensors"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if format == "safetensors":
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
    else:
        torch_files.save(epath.Path(folder / "pytorch_model.bin"), weights)
    return folder


def read_folder(folder):
    """Weights of a folder, by name, however they are stored."""
    if (folder / "model.safetensors").exists():
        return safetensors.numpy.load_file(folder / "model.safetensors")
    file = torch_files.load(folder / "pytorch_model.bin")
    return file.read(file.tree)


def same_bits(left, right):
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def require_golden_scores(score_fn, kind):
    golden = figures(kind)
    log_score = score_fn(jnp.asarray(golden["x"][:2]), jnp.asarray(golden["sigma"][:2]))
    np.testing.assert_allclose(log_score, golden["log_score"], atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A SentencePiece model of the 50 tokens that the golden weights are for."""
    folder, output = tmp_path_factory.mktemp("tokenizer"), io.BytesIO()
    text = write_text(folder / "text.txt").read_text(encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.lower().split("\n")),
        model_writer=output,
        model_type="bpe",
        vocab_size=50,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "fifty.model").write_bytes(output.getvalue())
    return folder / "fifty.model"


@pytest.fixture(scope="module", params=["absorb", "uniform"])
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    weights = golden_weights("absorb") | {"rotary_emb.inv_freq": np.ones(8, np.float32)}
    return write_folder(tmp_path / "hf", weights, official_config("absorb"))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_golden_scores_and_bits_through_files(tmp_path, kind, format):
    weights = golden_weights(kind)
    params, config = load_official(write_folder(tmp_path / "hf", weights, official_config(kind), format=format))
    model = build(Transformer, "model", config, num_states=50 + (kind == "absorb"), parent=None, name=None)
    model = model.clone(attention="plain")
    require_golden_scores(lambda x, sigma: model.apply({"params": params}, x, sigma), kind)
    save_official(tmp_path / "back", params, config, format=format)
    assert same_bits(read_folder(tmp_path / "back"), weights)
    again, config_again = load_official(tmp_path / "back")
    assert config_again == config
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_golden_scores_through_a_workdir(tmp_path, kind, tokenizer_file):
    source = write_folder(tmp_path / "hf", golden_weights(kind), official_config(kind))
    write_workdir(
        epath.Path(tmp_path / "run"), *load_official(source), tokenizers.make("sentencepiece", path=str(tokenizer_file))
    )
    trained = load_trained(epath.Path(tmp_path / "run"), log=pytest.fail)
    assert type(trained.experiment.graph).__name__.lower().startswith(kind)
    require_golden_scores(trained.experiment.score_fn(trained.params), kind)


def test_commands_there_and_back(tmp_path, tokenizer_file):
    source = write_folder(tmp_path / "hf", golden_weights("absorb"), official_config("absorb"))
    text = write_text(tmp_path / "text.txt", 2000)
    workdir, back = tmp_path / "run", tmp_path / "back"
    flags = ["--tokenizer=sentencepiece", f"--tokenizer_path={tokenizer_file}"]
    out, _ = run("convert", "--from=auto", f"--input={source}", f"--output={workdir}", *flags, real=True)
    answer = json.loads(out)
    weights = golden_weights("absorb")
    assert answer["output"] == str(workdir)
    assert answer["parameters"] == sum(value.size for value in weights.values())
    processes = [
        start("evaluate", f"--workdir={workdir}", f"--data={text}", "--num_times=2", "--num_sequences=2"),
        start("sample", f"--workdir={workdir}", "--num=1", "--steps=2"),
        start("convert", "--to=official", f"--input={workdir}", f"--output={back}", "--format=torch"),
        start("evaluate", f"--workdir={workdir}"),
    ]
    outs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 2], outs
    evaluated, sampled, _ = [json.loads(out.splitlines()[-1]) for out, _ in outs[:3]]
    assert evaluated["bits_per_token"] > 0 and len(sampled["samples"]) == 1
    assert "give --data" in outs[3][1]
    assert same_bits(read_folder(back), weights)


def test_training_checkpoint_gives_its_averages(tmp_path):
    sizes = {"hidden_size": 4, "cond_dim": 1, "n_blocks": 1, "n_heads": 1}
    official = official_config("absorb", **sizes) | {"tokens": 5}
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints-meta").mkdir(parents=True)
    (run_folder / ".hydra").mkdir()
    (run_folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(official))
    path = run_folder / "checkpoints-meta" / "checkpoint.pth"
    shutil.copy(CHECKPOINT, path)
    for source in (path, run_folder):
        params, config = load_official(source)
        assert config.train.steps == 7 and config.data.vocab_size == 5
        # Parameter number n holds n + i / 1024 at its place i, and its average half a unit more.
        assert params["embedding"][1, 2] == 0.5 + 6 / 1024
        assert params["blocks"]["norm1"]["scale"][0, 3] == 5.5 + 3 / 1024
        assert params["blocks"]["qkv"]["kernel"].shape == (1, 4, 3, 4)
        assert params["blocks"]["qkv"]["kernel"][0, 1, 2, 3] == 6.5 + (11 * 4 + 1) / 1024
        assert params["modulation"]["bias"][1, 3] == 19.5 + 7 / 1024
    (tmp_path / "elsewhere").mkdir()
    alone = shutil.copy(CHECKPOINT, tmp_path / "elsewhere")
    with pytest.raises(InputError, match="checkpoint.pth has no config.json"):
        load_official(alone)
    official["graph"]["type"] = "uniform"
    official["model"]["scale_by_sigma"] = False
    (tmp_path / "config.json").write_text(json.dumps(official))
    with pytest.raises(InputError, match=r"vocab_embed.embedding is \[6, 4\], and \[5, 4\] by the config"):
        load_official(alone, config_file=tmp_path / "config.json")


@pytest.mark.parametrize("format", ["safetensors", "torch"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.backbone.", "module." * 3]
)
def test_prefixes_of_wrappers_in_any_order(tmp_path, prefix, format):
    weights = golden_weights("absorb")
    wrapped = {prefix + name: value for name, value in weights.items()}
    params, _ = load_official(write_folder(tmp_path / "hf", wrapped, official_config("absorb"), format=format))
    np.testing.assert_array_equal(params["embedding"], weights["vocab_embed.embedding"])


def test_other_prefixes_are_named(tmp_path):
    odd = {f"net.{name}": value for name, value in golden_weights("absorb").items()}
    with pytest.raises(InputError, match=r"0 blocks, .* first name is 'net.blocks.0.adaLN_modulation.bias'"):
        load_official(write_folder(tmp_path / "hf", odd, official_config("absorb")))


def shard(folder, *, index=None):
    """Turns a folder of one file into one of two shards. index: changes of the index, name -> file."""
    file = next(file for file in folder.iterdir() if file.stem in ("model", "pytorch_model"))
    weights = read_folder(folder)
    places = {name: f"{file.stem}-0000{1 + i % 2}-of-00002{file.suffix}" for i, name in enumerate(sorted(weights))}
    file.unlink()
    for name in set(places.values()):
        own = {key: value for key, value in weights.items() if places[key] == name}
        if file.suffix == ".bin":
            torch_files.save(epath.Path(folder / name), own)
        else:
            safetensors.numpy.save_file(own, folder / name)
    places |= index or {}
    kept = {name: place for name, place in places.items() if place is not None}
    (folder / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    return folder


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_shards_with_an_index(tmp_path, format):
    config = official_config("absorb")
    whole = write_folder(tmp_path / "whole", golden_weights("absorb"), config, format=format)
    expected, _ = load_official(whole)
    found, _ = load_official(shard(whole))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


HEAD, FIRST, SECOND = "output_layer.linear.bias", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({HEAD: "../model.safetensors"}, "no weight_map"),
        ({HEAD: "/etc/passwd"}, "no weight_map"),
        ({HEAD: ".."}, "no weight_map"),
        ({HEAD: "model.safetensors.index.json"}, "no weight_map"),
        ({HEAD: 1}, "no weight_map"),
        ({HEAD: "model-3.safetensors"}, r"1 of 3 shards are missing \(model-3.safetensors\)"),
        ({HEAD: None}, f"{FIRST} has {HEAD}"),
        ({HEAD: SECOND}, f"{FIRST} has {HEAD}"),
        ({"extra": FIRST}, f"{FIRST} has extra"),
    ],
)
def test_indices_that_do_not_describe_their_shards(folder, index, named):
    shard(folder, index=index)
    with pytest.raises(InputError, match=named) as refusal:
        load_official(folder)
    assert "model.safetensors.index.json" in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_damaged_indices(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        load_official(folder)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_in_both_directions(tmp_path, folder, number):
    params, config = load_official(folder)
    weights = golden_weights("absorb")
    weights["blocks.1.mlp.0.weight"][3, 4] = number
    with pytest.raises(InputError, match=r"model.safetensors: blocks.1.mlp.0.weight has numbers that are NaN"):
        load_official(write_folder(tmp_path / "odd", weights, config=official_config("absorb")))
    params["blocks"]["mlp_in"]["kernel"] = params["blocks"]["mlp_in"]["kernel"].at[1, 4, 3].set(number)
    with pytest.raises(InputError, match=r"blocks.1.mlp.0.weight has numbers that are NaN"):
        save_official(tmp_path / "back", params, config)
    assert not (tmp_path / "back").exists()


def safetensors_file(path, **tensors):
    """tensors: (type, shape, begin, end). The data are zeros up to the last end."""
    header = {name: {"dtype": t, "shape": s, "data_offsets": [b, e]} for name, (t, s, b, e) in tensors.items()}
    content = json.dumps(header).encode()
    length = max(end for *_, end in tensors.values())
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(length))
    return path


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_types_that_numpy_lacks_are_named(tmp_path, kind):
    path = safetensors_file(
        tmp_path / "file.safetensors", a=("F32", [2], 0, 8), b=(kind, [2], 8, 8 + 2 // (1 + (kind == "F4")))
    )
    with pytest.raises(InputError, match=rf"file.safetensors: b is of the type {kind}"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["I32", "U8", "BOOL", "F64", "C64"])
def test_types_that_are_no_weights_are_named(folder, kind):
    size = {"I32": 4, "U8": 1, "BOOL": 1, "F64": 8, "C64": 8}[kind]
    weights = golden_weights("absorb")
    ends = np.cumsum([size * value.size for value in weights.values()]).tolist()
    places = zip([0, *ends], ends, strict=False)
    tensors = {name: (kind, list(weights[name].shape), *place) for name, place in zip(weights, places, strict=True)}
    safetensors_file(folder / "model.safetensors", **tensors)
    with pytest.raises(InputError, match=r"model.safetensors: \S+ is of the type \w+; expected float32"):
        load_official(folder)


@pytest.mark.parametrize(
    "second",
    [("F32", [2], 0, 8), ("F32", [2], 4, 12), ("F32", [2], 12, 20), ("F32", [1], 8, 16), ("F32", [0, 1 << 62], 8, 8)],
    ids=["the same data", "overlapping", "with a gap", "of another size", "too large"],
)
def test_tensors_that_do_not_tile_their_file_are_refused(tmp_path, second):
    with pytest.raises(InputError, match=r"file.safetensors is absent, damaged"):
        read_safetensors(safetensors_file(tmp_path / "file.safetensors", a=("F32", [2], 0, 8), b=second))


def test_narrow_types(tmp_path):
    weights = golden_weights("absorb")
    narrow = {name: value.astype("float16") for name, value in weights.items()}
    params, _ = load_official(write_folder(tmp_path / "narrow", narrow, official_config("absorb")))
    assert params["embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["embedding"], weights["vocab_embed.embedding"].astype("float16"))
    wide = {name: value.astype("float64") for name, value in weights.items()}
    with pytest.raises(InputError, match="of the type float64"):
        load_official(write_folder(tmp_path / "wide", wide, official_config("absorb")))


def test_bad_files_are_one_line_and_exit_code_2(tmp_path, folder):
    inputs = {name: tmp_path / name for name in ("truncated", "wrong", "hostile", "absent", "short", "tokens")}
    for name in ("truncated", "wrong", "hostile", "short", "tokens"):
        shutil.copytree(folder, inputs[name])
    weights = inputs["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (inputs["wrong"] / "config.json").write_text(json.dumps(official_config("absorb", hidden_size=128)))
    (inputs["hostile"] / "model.safetensors").unlink()
    with zipfile.ZipFile(inputs["hostile"] / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x09\x00\x00\x00touch run\x85R.")
    (inputs["short"] / "model.safetensors").unlink()
    torch_files.save(epath.Path(inputs["short"] / "pytorch_model.bin"), golden_weights("absorb"))
    weights = inputs["short"] / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1000])
    named = {
        "truncated": "truncated/model.safetensors is absent, damaged",
        "wrong": "[51, 64], and [51, 128] by the config",
        "hostile": "'posix.system'",
        "absent": "absent does not exist",
        "short": "short/pytorch_model.bin is cut short",
        "tokens": "257 tokens and the weights are for 50",
    }
    before = files(tmp_path)
    output = f"--output={tmp_path / 'new' / 'run'}"
    for names in ("truncated", "wrong", "hostile"), ("absent", "short", "tokens"):
        argv = ["--from=official", output, "--tokenizer=bytes"]
        processes = {name: start("convert", *argv, f"--input={inputs[name]}") for name in names}
        for name, process in processes.items():
            out, err = process.communicate(timeout=300)
            assert (process.returncode, out) == (2, ""), err
            (line,) = err.splitlines()
            assert line.startswith("error: ") and named[name] in line
    after = files(tmp_path)
    assert after.keys() - before.keys() <= {"new"} and before.items() <= after.items()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": None}, "tokens=None"),
        ({"tokens": True}, "tokens=True"),
        ({"tokens": 0}, "tokens=0"),
        ({"graph": {"type": "star"}}, "graph.type='star'"),
        ({"graph": "absorb"}, "graph.type is missing"),
        ({"noise": {"type": "cosine"}}, "noise.kind='cosine'"),
        ({"noise": {"type": "geometric", "sigma_min": 20, "sigma_max": 1}}, "noise.sigma_max=1.0 must be above 20"),
        ({"noise": {"type": "geometric", "sigma_min": float("nan"), "sigma_max": 1}}, "noise.sigma_min=nan"),
        (official_config("absorb", dropout="inf"), "model.dropout='inf'"),
        ({"noise": {"type": "geometric", "sigma_min": "low", "sigma_max": 1}}, "noise.sigma_min='low'"),
        ({"model": {}}, "model.n_blocks is missing"),
        (official_config("absorb", n_blocks=10**12), "model.n_blocks=1000000000000"),
        (official_config("absorb", n_blocks=2.0), "model.n_blocks=2.0"),
        (official_config("absorb", dropout="much"), "model.dropout='much'"),
        (official_config("uniform", scale_by_sigma=True), "model.scale_by_sigma=True"),
    ],
    ids=str,
)
def test_configs_that_do_not_describe_a_model(change, named):
    with pytest.raises(InputError) as refusal:
        from_official_config(official_config("absorb") | change)
    assert named in str(refusal.value)


@pytest.mark.parametrize("model", [{"n_blocks": 3}, {"n_blocks": 10**9}, {"n_heads": 2}, {"cond_dim": 16}])
def test_configs_of_another_model(folder, model):
    (folder / "config.json").write_text(json.dumps(official_config("absorb", **model)))
    with pytest.raises(InputError, match=r"model.safetensors: .* config"):
        load_official(folder)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(64)) + "tokens: *a64"
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(64))


@pytest.mark.parametrize("content", [LAUGHS, MERGES, "a: &a [*a]", "a: " + "x" * (1 << 20)], ids=range(4))
def test_yaml_that_grows_or_is_long_is_refused(folder, content):
    (folder / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config.yaml is not a config: it (has an alias|is longer)"):
        load_official(folder, config_file=folder / "config.yaml")


def test_configs_with_integers_that_python_does_not_print(folder):
    for field in "tokens", "graph":
        (folder / "config.yaml").write_text(f"tokens: 3\ngraph: {{type: absorb}}\n{field}: 0x{'f' * 5000}")
        with pytest.raises(InputError, match="config.yaml: "):
            load_official(folder, config_file=folder / "config.yaml")


@pytest.mark.parametrize("source", ["/dev/zero", "/dev/null"])
def test_configs_without_an_end_or_content(folder, source):
    with pytest.raises(InputError, match=f"{source} is not a config"):
        load_official(folder, config_file=source)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" + "b" * 5000, "/dev/zero", "x/" * 3000])
def test_names_that_are_no_weights(name):
    with pytest.raises(InputError):
        load_official(name)


@pytest.mark.parametrize("value", ["!!int ''", "!!bool x", "!!timestamp x", "1" + ":1" * 500 + ".5", "!!binary é"])
def test_values_of_another_tag(folder, value):
    (folder / "config.yaml").write_text(f"tokens: {value}")
    with pytest.raises(InputError, match="config.yaml is not a config"):
        load_official(folder, config_file=folder / "config.yaml")


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000])
def test_damaged_configs(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json is not a config"):
        load_official(folder)
    (folder / "config.yaml").write_text(content)
    with pytest.raises(InputError, match="config.yaml is not a config"):
        load_official(folder, config_file=folder / "config.yaml")


def test_yaml_is_data(folder):
    (folder / "config.yaml").write_text("!!python/object/apply:os.system ['touch run']")
    with pytest.raises(InputError, match="config.yaml is not a config"):
        load_official(folder, config_file=folder / "config.yaml")


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ([1, 2], "neither weights by name"),
        ({1: 2}, "neither weights by name"),
        ({"embedding": 3}, "a int under 'embedding'"),
        ({"model": {}, "ema": {}, "step": "7"}, "step='7'"),
        ({"model": {}, "ema": {}, "step": 7}, "no averaged weights"),
        ({"model": {}, "ema": {"shadow_params": [1]}, "step": 7}, "1 averaged weights"),
        ({"model": {"a": {}}, "ema": {"shadow_params": [1]}, "step": 7}, "a dict under 'a'"),
        ({}, "the weights have 0 blocks"),
    ],
)
def test_other_contents_of_torch_files(folder, tree, named):
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(tree, 2))
    with pytest.raises(InputError) as refusal:
        load_official(folder)
    assert named in str(refusal.value) and "pytorch_model.bin" in str(refusal.value)


@pytest.mark.parametrize("step", [b"\x85" * 50_000, b"q\x00h\x00\x86" * 100], ids=["deep", "laughs"])
def test_a_nested_value_is_one_line(folder, step):
    (folder / "model.safetensors").unlink()
    content = b"\x80\x02}(X\x05\x00\x00\x00modelNX\x03\x00\x00\x00emaNX\x04\x00\x00\x00step)" + step + b"u."
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", content)
    with pytest.raises(InputError, match="has step="):
        load_official(folder)


@pytest.mark.parametrize("size", [1 << 30, 1 << 31])
def test_huge_sizes_are_one_line(folder, size):
    official = official_config("absorb", hidden_size=size, cond_dim=size) | {"tokens": size}
    (folder / "config.json").write_text(json.dumps(official))
    with pytest.raises(InputError, match=r"by the config|must lie between"):
        load_official(folder)


def test_without_a_network_the_hub_is_one_line(tmp_path, monkeypatch):
    # Nothing listens there: as without a network, at once.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as refusal:
        load_official("louaaron/sedd-small")
    assert "louaaron/sedd-small is not a path here, and could not be had from the hub" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_outputs_are_complete_or_absent(tmp_path):
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="full is there already"), new_directory(tmp_path / "full"):
        pass
    with new_directory(tmp_path / "empty") as folder:
        (folder / "file").touch()
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "broken") as folder:
        (folder / "file").touch()
        raise KeyboardInterrupt
    assert files(tmp_path).keys() == {"full", "full/file", "empty", "empty/file"}
    with pytest.raises(InputError, match="cannot be written"), new_directory(tmp_path / "full" / "file" / "below"):
        pass


def test_models_that_the_official_code_cannot_run(tmp_path, folder):
    params, config = load_official(folder)
    config.noise.eps = 1e-4
    with pytest.raises(InputError, match="noise.eps=0.0001"):
        save_official(tmp_path / "back", params, config)
    config.noise.eps = 1e-3
    config.model.mlp_ratio = 2
    with pytest.raises(InputError, match="model.mlp_ratio=2"):
        save_official(tmp_path / "back", params, config)
    config.model.mlp_ratio = 4
    with pytest.raises(InputError, match="with the parameter extra"):
        save_official(tmp_path / "back", params | {"extra": np.zeros(1)}, config)
    without = {name: value for name, value in params.items() if name != "sigma_in"}
    with pytest.raises(InputError, match="without the parameter sigma_in/bias"):
        save_official(tmp_path / "back", without, config)
    with pytest.raises(InputError, match="format='onnx'"):
        save_official(tmp_path / "back", params, config, format="onnx")
    assert not (tmp_path / "back").exists()


def test_a_model_from_here_goes_out_and_comes_back(tmp_path):
    ours = make_config()
    experiment = make_experiment(ours, 257, jax.devices()[:1])
    state = experiment.init_state(jax.random.key(0))
    save_official(tmp_path / "out", state.params, ours)
    params, config = load_official(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, state.params))
    assert (config.data.vocab_size, config.data.length) == (257, 32)
    for field in ("num_layers", "dim", "num_heads", "cond_dim", "dropout"):
        assert config.model[field] == ours.model[field]
    assert config.model.scale_by_sigma
