"""A run that begins from another's weights: its first figure is the other's last, and it resumes without it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from running import losses, make_config, metrics, saved_states

from sedd_jax.data import tokenizers
from sedd_jax.errors import InputError
from sedd_jax.training import origin
from sedd_jax.training.experiment import load_trained, make_experiment
from sedd_jax.training.loop import train

EVERY_STEP = {"train__checkpoint_every": 1, "train__sample_every": 0}


def tune(workdir, init, init_rows=None, **fields):
    return train(make_config(**fields), epath.Path(workdir), init=init and str(init), init_rows=init_rows)


@pytest.fixture(scope="module")
def fields(models):
    return {"data__source": str(models / "text.txt"), "train__steps": 3} | EVERY_STEP


@pytest.fixture(scope="module")
def tuned(models, tmp_path_factory, fields):
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    tune(workdir, models / "diffusion", **fields)
    return workdir


def test_before_its_first_step_it_has_the_bound_of_what_it_began_from(models, tuned):
    last, first = metrics(models / "diffusion")[-1], metrics(tuned)[0]
    assert first["step"] == 0
    figures = {name: value for name, value in last.items() if name.startswith("eval")}
    assert {name: first[name] for name in figures} == figures
    assert losses(tuned)[0] != losses(models / "diffusion")[0]


def test_interrupted_it_resumes_bit_for_bit_without_its_source(models, tuned, tmp_path, fields):
    source = shutil.copytree(models / "diffusion", tmp_path / "source")
    tune(tmp_path / "run", source, **fields | {"train__steps": 1})
    shutil.rmtree(source)
    tune(tmp_path / "run", source, **fields | {"train__steps": 2})
    tune(tmp_path / "run", None, **fields)
    assert saved_states(tmp_path / "run") == saved_states(tuned)
    assert losses(tmp_path / "run") == losses(tuned)
    names = "config.json", "checkpoints/3/record/metadata"
    config, record = (json.loads((tmp_path / "run" / name).read_text()) for name in names)
    fingerprint = load_trained(epath.Path(models / "diffusion"), log=print).fingerprint
    assert config["init"] == record["config"]["init"] == {"source": str(source), "fingerprint": fingerprint}


def test_another_source_than_the_run_began_from_is_refused(models, tuned, fields):
    with pytest.raises(InputError, match=r"began from .*/diffusion, not from --init=.*/ar: leave --init out"):
        tune(tuned, models / "ar", **fields)
    with pytest.raises(InputError, match="began from random weights"):
        tune(models / "diffusion", tuned, **fields)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"model__dim": 16}, "has model.dim=32 and this run 16"),
        ({"graph__kind": "uniform"}, "graph.kind='absorbing' and this run 'uniform'"),
        ({"objective": "ar"}, "objective='sedd' and this run 'ar'"),
        ({"model__parametrisation": "mean"}, "model.parametrisation='score' and this run 'mean'"),
        ({"data__tokenizer": "sentencepiece", "data__vocab_size": 300}, "not of the kind"),
    ],
)
def test_weights_that_would_mean_nothing_are_refused(models, tmp_path, fields, changed, line):
    with pytest.raises(InputError, match=line):
        tune(tmp_path / "run", models / "diffusion", **fields | changed)
    with pytest.raises(InputError, match="holds no checkpoint; give the directory"):
        tune(tmp_path / "run", tmp_path, **fields)
    assert not (tmp_path / "run").exists()


class Grown(tokenizers.Bytes):
    """Bytes, an end of text and three more."""

    vocab_size = 260

    def _decode(self, ids):
        return super()._decode(ids) if (ids < 256).all() else "new"


def test_rows_of_new_tokens_are_the_mean_and_leave_the_others_as_they_were(models):
    config, init = make_config(data__source="text.txt"), str(models / "diffusion")
    known, grown = (make_experiment(config, size) for size in (257, 260))
    source = origin.read(init, None, config, known, tokenizers.Bytes())
    tokenizer = Grown()
    tokenizer.__dict__["fingerprint"] = "another"
    with pytest.raises(InputError, match="the first 257 of 260 tokens of this run: give --init_rows=mean"):
        origin.read(init, None, config, grown, tokenizer)
    params = origin.read(init, "mean", config, grown, tokenizer).params
    x, sigma = jnp.array([[257, 1, 257, 65]]), jnp.ones(1)
    before = known.score_fn(source.params)(x, sigma)
    after = grown.score_fn(params)(jnp.where(x == 257, 260, x), sigma)
    np.testing.assert_allclose(after[..., :257], before[..., :257], atol=1e-5)
    mean = source.params["embedding"][:257].mean(0)
    np.testing.assert_allclose(params["embedding"][257:260], np.tile(mean, (3, 1)), atol=1e-6)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, grown.abstract_state().params)
