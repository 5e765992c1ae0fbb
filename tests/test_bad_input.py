"""Bad input is one clear line that names it and the exit code 2, and nothing is written."""

import json
import math
import shutil
from pathlib import Path

import pytest
from etils import epath
from running import files, make_config, run, train_here, write_text

from sedd_jax.data.tokenizers import Bytes
from sedd_jax.errors import InputError
from sedd_jax.generation.templates import parse_windows
from sedd_jax.training.loop import train
from sedd_jax.training.trained import load_trained

CONFIG_WITH_UNKNOWN_FIELD = """
from configs import baseline

def get_config():
    config = baseline.get_config()
    config.optim.momentum = 0.9
    return config
"""


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """The current directory, with good and bad texts and configs."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("déjà vu\n".encode("latin1") * 500)
    (tmp_path / "short.txt").write_text("Far too little.")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "unknown.py").write_text(CONFIG_WITH_UNKNOWN_FIELD)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "text.txt")
    train_here(folder / "run", data__source=str(text), train__steps=1, train__eval_every=0, train__sample_every=0)
    return folder / "run"


@pytest.fixture
def copy(trained, tmp_path):
    """A run of one's own, to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def refuse(name: str, *argv: str, folder: Path) -> str:
    """What a command says to bad input. It leaves the folder as it is."""
    before = files(folder)
    out, err = run(name, *argv, expect=2)
    assert out == ""
    assert files(folder) == before
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


# Eight virtual devices, so a batch has eight shards unless the mesh says otherwise.
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data__source": "absent.txt"}, "'absent.txt'"),
        ({"data__source": "empty.txt"}, "'empty.txt'"),
        ({"data__source": "latin1.txt"}, "latin1.txt is not UTF-8 at byte 1"),
        ({"data__source": "short.txt"}, "length=32 exceeds the 14 tokens"),
        ({"data__source": "broken.jsonl"}, "broken.jsonl:2"),
        ({"data__source": "folder"}, "'folder' is a directory"),
        ({"data__valid_source": "absent.txt"}, "'absent.txt'"),
        ({"data__valid_fraction": 1.5}, "valid_fraction=1.5"),
        ({"data__length": 0}, "length=0"),
        ({"data__tokenizer": "wordpiece"}, "'wordpiece'"),
        ({"data__tokenizer": "sentencepiece"}, "vocab_size=None"),
        ({"data__tokenizer": "sentencepiece", "data__tokenizer_path": "absent.model"}, "absent.model"),
        ({"graph__kind": "star"}, "graph.kind='star'"),
        ({"noise__kind": "cosine"}, "noise.kind='cosine'"),
        ({"noise__eps": 0.0}, "noise.eps=0.0"),
        ({"noise__kind": "geometric", "noise__sigma_max": 1e-5}, "noise.sigma_max=1e-05"),
        ({"noise__kind": "geometric", "noise__sigma_max": 1e4}, "noise.sigma_max=10000.0"),
        ({"graph__kind": "uniform", "model__time_conditioning": False}, "model.time_conditioning=False"),
        ({"model__time_conditioning": False, "model__scale_by_sigma": False}, "model.time_conditioning=False"),
        ({"model__num_heads": 3}, "model.num_heads=3"),
        *(({f"model__{name}": 0}, f"model.{name}=0 must") for name in ("num_heads", "dim", "num_layers", "cond_dim")),
        ({"model__mlp_ratio": -1}, "model.mlp_ratio=-1 must"),
        ({"model__cond_dim": -(1 << 63) - 1}, "model.cond_dim=-9223372036854775809"),
        ({"model__dim": 1 << 40}, "model.dim=1099511627776 is beyond 32 bits"),
        ({"model__num_heads": None}, "model.num_heads=None: give an integer"),
        ({"model__dtype": "float8"}, "model.dtype='float8'"),
        ({"model__dropout": 1.0}, "model.dropout=1.0"),
        ({"optim__lr": 0.0}, "optim.lr=0.0"),
        ({"optim__lr": math.inf}, "optim.lr=inf"),
        ({"optim__lr": math.nan}, "optim.lr=nan"),
        ({"optim__eps": math.inf}, "optim.eps=inf"),
        ({"optim__clip": math.nan}, "optim.clip=nan"),
        *(
            ({f"optim__{name}": value}, f"optim.{name}={value}")
            for name in ("b1", "b2")
            for value in (1.0, -0.1, math.nan)
        ),
        ({"optim__weight_decay": -1.0}, "optim.weight_decay=-1.0"),
        ({"optim__weight_decay": math.nan}, "optim.weight_decay=nan"),
        ({"optim__warmup_steps": -1}, "optim.warmup_steps=-1"),
        ({"train__steps": 0}, "train.steps=0"),
        ({"train__steps": 1 << 31}, "train.steps=2147483648 must be below 2147483648"),
        ({"train__steps": 10**100}, "beyond 32 bits"),
        ({"train__batch_size": 1 << 31}, "train.batch_size=2147483648 must be at most 1048576"),
        ({"train__seed": -1}, "train.seed=-1"),
        ({"train__ema_decay": 1.0}, "train.ema_decay=1.0"),
        ({"train__log_every": 0}, "train.log_every=0"),
        ({"train__eval_every": -1}, "train.eval_every=-1"),
        ({"train__keep_last": 0}, "train.keep_last=0"),
        ({"train__batch_size": 12}, "train.batch_size=12 must be a multiple of 8"),
        ({"train__batch_size": 8, "train__microbatches": 2}, "train.microbatches=2"),
        ({"mesh__data": 3}, "mesh.data=3"),
        ({"mesh__fsdp": 5}, "mesh.fsdp=5"),
        ({"mesh__data": -1, "mesh__tensor": -1}, "mesh.tensor=-1"),
        ({"mesh__tensor": 4}, "mesh.tensor=4 must divide model.num_heads=2"),
        ({"eval__num_times": 0}, "eval.num_times=0"),
        ({"eval__num_times": 1 << 31}, "eval.num_times=2147483648 must be at most 1048576"),
        ({"eval__num_sequences": -1}, "eval.num_sequences=-1"),
        ({"eval__batch_size": 0}, "eval.batch_size=0"),
        ({"sampling__method": "magic"}, "'magic'"),
        ({"sampling__steps": 0}, "steps=0"),
        ({"sampling__steps": 1 << 31}, "sampling.steps=2147483648 must be at most 1048576"),
        ({"sampling__num": 0}, "sampling.num=0"),
        ({"sampling__num": 1 << 31}, "sampling.num=2147483648 must be at most 1048576"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_training_names_what_does_not_fit(inputs, fields, named):
    before = files(inputs)
    with pytest.raises(InputError) as refusal:
        train_here(inputs / "new" / "run", **fields)
    assert named in str(refusal.value)
    assert files(inputs) == before


@pytest.mark.parametrize("section", ["model", "optim", "data", "sampling"])
def test_sections_and_fields_have_to_be_known_and_there(inputs, section):
    unknown, missing = make_config(), make_config()
    unknown[section].colour = "red"
    del missing[section]
    for config, named in [(unknown, f"config.{section}.colour"), (missing, f"config.{section} is missing")]:
        with pytest.raises(InputError, match=named):
            train(config, epath.Path(inputs / "run"))
    assert not (inputs / "run").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--config=configs/baseline.py", "--workdir=NEW", "--config.model.widht=3"], "--config.model.widht=3"),
        (["--config=configs/baseline.py", "--workdir=NEW", "--config.optim.lr=fast"], "--config.optim.lr=fast"),
        (["--config=configs/baseline.py", "--workdir=NEW", "--stpes=3"], "stpes"),
        (["--config=configs/baseline.py"], "--workdir"),
        (["--workdir=NEW"], "--config"),
        (["--config=absent.py", "--workdir=NEW"], "absent.py"),
        (["--config=INPUTS/broken.py", "--workdir=NEW"], "broken.py, line 1"),
        (["--config=INPUTS/unknown.py", "--workdir=NEW"], "config.optim.momentum"),
        (["--config=configs/baseline.py", "--workdir=INPUTS/text.txt"], "text.txt"),
        (["--config=configs/baseline.py", "--workdir=NEW", "--process_id=0"], "--process_id=0"),
        (["--config=configs/baseline.py", "--workdir=NEW", "--flagfile=/dev/zero"], "--flagfile=/dev/zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_command_line_of_training(inputs, argv, named):
    argv = [part.replace("INPUTS", str(inputs)).replace("NEW", str(inputs / "new")) for part in argv]
    assert named in refuse("train", *argv, folder=inputs)


@pytest.mark.parametrize(
    ("field", "value"), [("model__dim", 64), ("data__length", 16), ("optim__lr", 1e-3), ("train__seed", 1)]
)
def test_workdir_of_another_experiment_is_left_alone(inputs, trained, field, value):
    saved = json.loads((trained / "config.json").read_text())
    source = {"data__source": saved["data"]["source"]}
    before = files(trained)
    with pytest.raises(InputError, match=f"{field.replace('__', '.')} is .* there and {value!r} here"):
        train_here(trained, **source | {field: value})
    assert files(trained) == before


@pytest.mark.parametrize("content", ["{", "[1]", "3", "{}", "\xff\x00"])
def test_damaged_config_of_a_run(copy, content):
    (copy / "config.json").write_text(content, encoding="latin1")
    before = files(copy)
    for use in (lambda: load_trained(epath.Path(copy), log=pytest.fail), lambda: train_here(copy)):
        with pytest.raises(InputError, match="config"):
            use()
    assert files(copy) == before


def test_config_that_is_not_the_checkpoint_s(copy):
    """A digit that no shape depends on."""
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"eps": 0.001', '"eps": 0.002'))
    before = files(copy)
    with pytest.raises(InputError, match=r"config.json has been altered: noise.eps is 0.002 there and 0.001 in the"):
        load_trained(epath.Path(copy), log=pytest.fail)
    assert files(copy) == before


def test_checkpoint_of_another_shape(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["model"]["dim"] = 64
    path.write_text(json.dumps(config))
    source = config["data"]["source"]
    before = files(copy)
    with pytest.raises(InputError, match=r"float32\[.*32.*\] in the checkpoint .* but float32\[.*64.*\] in this run"):
        load_trained(epath.Path(copy), log=pytest.fail)
    assert files(copy) == before
    with pytest.raises(InputError, match="in the checkpoint"):
        train_here(copy, model__dim=64, data__source=source)
    assert files(copy / "checkpoints") == {
        name.removeprefix("checkpoints/"): content
        for name, content in before.items()
        if name.startswith("checkpoints/")
    }


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_folder_without_a_run(tmp_path, name):
    assert str(tmp_path) in refuse(name, f"--workdir={tmp_path}", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "flag", "named"),
    [
        ("evaluate", "--data=absent.txt", "'absent.txt'"),
        ("evaluate", "--num_times=0", "--num_times=0"),
        ("evaluate", "--seed=-1", "--seed=-1"),
        ("sample", "--num=0", "num=0"),
        ("sample", "--steps=0", "steps=0"),
        ("sample", "--method=magic", "'magic'"),
        ("sample", "--template=Hole [[x]].", "'[[x]]"),
        ("sample", "--num=9223372036854775808", "must be at most 1048576"),
        ("sample", "--html=absent/x.html", "--html=absent/x.html"),
        ("frontier", "--num=2147483648", "[1, 1048576]"),
        ("frontier", f"--steps={'9' * 300}", "must be at most 1048576"),
    ],
)
def test_flags_of_the_commands_on_a_run(trained, name, flag, named):
    assert named in refuse(name, f"--workdir={trained}", flag, folder=trained)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"template": "a [[3x]] hole"}, "[[3x]] hole"),
        ({"template": "a [[]] hole"}, "[[]] hole"),
        ({"template": "a [[-3]] hole"}, "[[-3]] hole"),
        ({"template": "a [[~]] hole"}, "[[~]] hole"),
        ({"template": "a [[3~]] hole"}, "[[3~]] hole"),
        ({"template": "[[~99]]"}, "more than the model's length of 32"),
        ({"template": "open [[3"}, "[[3"),
        ({"template": "[[5-3]]"}, "a hole '[[5-3]]' of at least 5 and at most 3 tokens"),
        ({"template": "[[3:]]"}, "[[3:]]"),
        ({"template": "[[3:a[b]]]"}, "[[3:a[b]]]"),
        ({"template": "[[2-33]]"}, "holes for 33 tokens"),
        ({"template": "closed 3]]"}, "closed 3]]"),
        ({"template": "[[[[3]]]]"}, "[["),
        ({"template": "[[33]]"}, "holes for 33 tokens, more than the model's length of 32"),
        ({"template": "[[20]] and more text"}, "34 tokens exceeds the model's length of 32"),
        ({"template": "[[9999999999999]]"}, "9999999999999"),
        ({"template": "[[3]]", "prefix": "a"}, "--prefix"),
        ({"template": "[[3]]", "suffix": ""}, "--suffix"),
        ({"prefix": "p" * 20, "suffix": "s" * 13}, "33 tokens"),
    ],
    ids=lambda value: str(value),
)
def test_what_is_given_to_sampling_has_to_fit(given, named):
    with pytest.raises(InputError) as refusal:
        parse_windows(32, Bytes(), **given)
    assert named in str(refusal.value)
