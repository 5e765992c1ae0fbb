"""The recipes in configs/: what they say holds together, and their smoke form trains from here to the end."""

import importlib
import json
import pathlib

import pytest
import real_text
from etils import epath
from ml_collections import ConfigDict
from running import ROOT, run

from sedd_jax.config import build
from sedd_jax.data import dataset, packing, tokenizers
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.flops import train_flops_per_token
from sedd_jax.training.loop import train
from sedd_jax.training.trained import load_trained

RECIPES = ("fineweb_edu", "lm1b", "medium", "small", "small_tpu", "text8")
# What is told in docs/recipes.md, in hours on 8 H100 at 40 % of their peak of 989 TFLOP/s.
HOURS = {"fineweb_edu": 7.9, "lm1b": 3.8, "medium": 44.6, "small": 15.7, "small_tpu": 15.7, "text8": 6.2}


def get(name: str, form: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(form)


def test_every_config_but_those_for_a_laptop_is_a_recipe():
    names = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert names == {*RECIPES, "tiny", "baseline", "ar", "smoke", "study"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_eight_devices_and_says_how_long_it_takes(name):
    config = get(name)
    experiment = make_experiment(config, config.data.vocab_size)
    experiment.train.check(experiment.mesh)
    assert config.data.tokenizer in tokenizers.KINDS
    tokens = config.train.batch_size * config.data.length * config.train.steps
    hours = train_flops_per_token(experiment.model, config.data.length) * tokens / (8 * 989e12 * 0.4) / 3600
    assert hours == pytest.approx(HOURS[name], abs=0.05)
    documented = (ROOT / "docs" / "recipes.md").read_text()
    assert f"`configs/{name}.py`" in documented and f"| {HOURS[name]} h |" in documented


@pytest.mark.parametrize("name", RECIPES)
def test_the_smoke_form_of_a_recipe_keeps_its_graph_noise_and_mesh(name):
    config, whole = get(name, "smoke"), get(name)
    assert all(config[section] == whole[section] for section in ("graph", "noise", "mesh"))


# Recipes that differ in their data alone have one smoke form.
@pytest.mark.parametrize("name", {str(get(name, "smoke")): name for name in RECIPES}.values())
def test_the_smoke_form_of_a_recipe_trains(name, tmp_path):
    config = get(name, "smoke")
    config.train.update({"steps": 4, "log_every": 1, "eval_every": 4, "sample_every": 4})
    config.eval.update({"num_times": 2, "num_sequences": 8})
    config.sampling.steps = 2
    final = train(config, epath.Path(tmp_path))
    assert final["step"] == 4 and 0 < final["eval_bits_per_byte"] < 20
    assert len(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])) > 1
    trained = load_trained(epath.Path(tmp_path), log=pytest.fail)
    assert trained.step == 4 and trained.tokenizer.lossless


def test_another_form_is_refused(tmp_path):
    _, err = run("train", "--config=configs/small.py:smok", f"--workdir={tmp_path / 'run'}", expect=2)
    (line,) = err.splitlines()
    assert line.startswith("error: ") and "smok" in line


def test_text8_of_the_recipe_has_one_token_per_character(tmp_path, monkeypatch):
    prefix = real_text.find("text8.prefix").read_bytes()
    monkeypatch.chdir(tmp_path)
    # Of the right size: the true file begins with this, and has other text thereafter.
    pathlib.Path("text8").write_bytes((prefix * 15)[:100_000_000])
    data = build(dataset.load, "data", get("text8"))
    assert (len(data.train.tokens), len(data.valid.tokens)) == (90_000_000, 5_000_000)
    assert data.valid.tokens_per_byte == 1 and data.tokenizer.eot is None
    rows, dropped = packing.chunks(data.valid, data.length)
    assert (len(rows), dropped) == (19531, 64)
    text = (prefix * 15)[90_000_000 : 90_000_000 + data.length].decode()
    assert data.tokenizer.decode(rows[0]) == text
