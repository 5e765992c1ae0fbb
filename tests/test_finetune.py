"""A run that begins from another's weights: its first figure is the other's last, and it resumes without it."""

import json
import shutil
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from running import losses, make_config, metrics, run, saved_states

from sedd_jax.data import dataset, tokenizers
from sedd_jax.data.loader import Loader
from sedd_jax.data.packing import chunks
from sedd_jax.errors import InputError
from sedd_jax.interop import save_official
from sedd_jax.training import origin
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.loop import train
from sedd_jax.training.trained import load_trained

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


def test_weights_of_another_implementation_are_a_source(models, tmp_path, fields):
    known = load_trained(epath.Path(models / "diffusion"), log=print)
    save_official(tmp_path / "official", jax.device_get(known.params), known.config)
    tune(tmp_path / "run", tmp_path / "official", **fields | {"train__steps": 1})
    expected, found = metrics(models / "diffusion")[-1], metrics(tmp_path / "run")[0]
    assert found["eval_nats_per_token"] == expected["eval_nats_per_token"]


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
    with pytest.raises(InputError, match="has no weights"):
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
    source, fingerprint = origin.read(init, None, config, known, tokenizers.Bytes())
    tokenizer = Grown()
    tokenizer.__dict__["fingerprint"] = "another"
    with pytest.raises(InputError, match="the first 257 of 260 tokens of this run: give --init_rows=mean"):
        origin.read(init, None, config, grown, tokenizer)
    params, same = origin.read(init, "mean", config, grown, tokenizer)
    assert same == fingerprint
    x, sigma = jnp.array([[257, 1, 257, 65]]), jnp.ones(1)
    before = known.score_fn(source)(x, sigma)
    after = grown.score_fn(params)(jnp.where(x == 257, 260, x), sigma)
    np.testing.assert_allclose(after[..., :257], before[..., :257], atol=1e-5)
    mean = source["embedding"][:257].mean(0)
    np.testing.assert_allclose(params["embedding"][257:260], np.tile(mean, (3, 1)), atol=1e-6)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, grown.abstract_state().params)


PROMPTS = {"data__prompt_field": "prompt", "data__label_field": "label", "model__num_classes": 3}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Records of two classes of three."""
    path = tmp_path_factory.mktemp("prompts") / "records.jsonl"
    lines = [{"prompt": f"{i}? ", "text": "ab"[i % 2] * (i % 7 + 1), "label": i % 2} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "", "text": None, "label": 0}]))
    return str(path)


@pytest.mark.parametrize("tail", ["eot", "unknown"])
def test_a_record_is_a_window_whose_prompt_is_given(prompts, tail):
    fields = {"prompt_field": "prompt", "label_field": "label", "tail": tail, "valid_fraction": 0.25}
    data = dataset.load(source=prompts, length=9, **fields)
    assert (len(data.train), len(data.valid), data.num_classes, data.shift) == (30 * 9, 10 * 9, 2, False)
    batch = data.train.windows
    # "10? " and "aaaa", "13? " and "bbbbbbb", which is cut.
    for row, text, label in ((10, b"10? aaaa", 0), (13, b"13? bbbbb", 1)):
        assert batch.tokens[row].tolist() == [*text, 256][:9] and batch.labels[row] == label
        assert batch.given[row].tolist() == [True] * 4 + [False] * 5
    assert batch.tokens[0].tolist() == [*b"0? a"] + [256] * 5
    if tail == "eot":
        assert batch.never is None
    else:
        assert batch.never[0].tolist() == [False] * 5 + [True] * 4
    loader = Loader(data.train, length=9, batch_size=6, seed=0, shift=data.shift)
    assert sorted(np.concatenate([rows.labels for rows in islice(loader, 5)])) == sorted(batch.labels)


def test_records_that_cannot_be_learnt_are_refused(prompts, tmp_path):
    load = lambda **fields: dataset.load(**{"source": prompts, "length": 9, "prompt_field": "prompt"} | fields)  # noqa: E731
    refused = [
        ({"length": 3}, r"records.jsonl:\d+: the prompt has 3 tokens, of 3 with its text"),
        ({"prompt_field": "question"}, r"records.jsonl:1: no field 'question'"),
        ({"label_field": "text"}, r"field 'text' is 'a'; give the number of a class"),
        ({"tail": "none"}, "tail='none' does not go with this tokenizer; give 'eot' or 'unknown'"),
        ({"source": "mix:1*a,1*b"}, "are read from JSON lines"),
    ]
    for fields, line in refused:
        with pytest.raises(InputError, match=line):
            load(**fields)
    fields = {"data__source": prompts} | PROMPTS
    for changed, line in (
        ({"graph__kind": "uniform"}, "need graph.kind='absorbing'"),
        ({"model__num_classes": 1}, "has 2 classes, and model.num_classes=1"),
        ({"sampling__label": 3}, "label=3 is unknown"),
        ({"sampling__guidance": 2.0}, "needs a label"),
    ):
        with pytest.raises(InputError, match=line):
            tune(tmp_path / "run", None, **fields | changed)
    assert not (tmp_path / "run").exists()


def test_texts_are_learnt_given_prompts_and_labels(models, prompts, tmp_path, fields):
    """From weights that know no labels, whose bound a new table does not change."""
    fields = fields | PROMPTS | {"data__source": prompts, "data__tail": "unknown", "data__valid_fraction": 0.25}
    tune(tmp_path / "run", models / "diffusion", **fields)
    first, last = (line for line in metrics(tmp_path / "run") if "eval_nats_per_token" in line)
    assert (first["step"], last["step"]) == (0, 3) and last["eval_nats_per_token"] < first["eval_nats_per_token"]
    tune(tmp_path / "mesh", models / "diffusion", **fields | MESH)
    require_same_metrics(tmp_path / "mesh", tmp_path / "run")
    known, tuned = (load_trained(epath.Path(path), log=print) for path in (models / "diffusion", tmp_path / "run"))
    stream = dataset.load(source=prompts, prompt_field="prompt", tail="unknown", length=32, valid_fraction=0.25).valid
    windows, _ = chunks(stream, 32, limit=4)
    key, bound = jax.random.split(jax.random.key(0), 4)[2], known.experiment.bound_fn(2)
    measure = lambda batch, first: bound(known.params, key, batch.tokens, first, *batch[1:])  # noqa: E731
    found = known.experiment.map_batches(measure, windows, 32)
    np.testing.assert_allclose(first["eval_nats_per_token"], found.total.sum() / len(windows.asked), rtol=1e-5)
    assert (abs(tuned.params["classes"]).sum(1) > 0).tolist() == [True, True, False, True]
    # Guidance 1 is the conditional model, bit for bit: its features, and those of nothing else.
    x, sigma, network = jnp.full((2, 32), 257), jnp.ones(2), tuned.experiment.network
    one, other = (network(tuned.params, labels, 1.0).features(x, sigma) for labels in (1, jnp.array([1, 0])))
    assert one.shape == (2, 32, 32) and (one[0] == other[0]).all() and (one[1] != other[1]).any()


LORA = {"model__lora_rank": 4, "model__lora_alpha": 8.0}


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory, fields):
    """(workdir, a copy of what it adapts)."""
    folder = tmp_path_factory.mktemp("adapted")
    base = shutil.copytree(models / "diffusion", folder / "base")
    tune(folder / "run", base, **fields | LORA)
    return folder / "run", base


def test_adapters_begin_as_nothing_and_the_rest_is_neither_trained_nor_saved(models, adapted):
    last, (first, *_, tuned) = metrics(models / "diffusion")[-1], metrics(adapted[0])
    np.testing.assert_allclose(first["eval_nats_per_token"], last["eval_nats_per_token"], rtol=1e-6)
    assert tuned["eval_nats_per_token"] != first["eval_nats_per_token"]
    leaves = saved_states(adapted[0])[3]
    # Of parameters, averages and two moments: a and b of four products.
    assert sum("lora_" in path for path in leaves) == 4 * 2 * 4
    large = [path for path, leaf in leaves.items() if path != "position" and "lora_" not in path and leaf["shape"]]
    assert large == []


MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


def require_same_metrics(found, expected):
    for line, reference in zip(metrics(found), metrics(expected), strict=True):
        names = {"train_loss", "grad_norm", "eval_nats_per_token"} & line.keys()
        assert [line[name] for name in names] == pytest.approx([reference[name] for name in names], rel=1e-4)


def test_adapters_are_trained_on_a_mesh_as_on_one_axis(adapted, tmp_path, fields):
    workdir, base = adapted
    tune(tmp_path / "run", base, **fields | LORA | MESH)
    require_same_metrics(tmp_path / "run", workdir)


def test_merged_adapters_are_the_model_that_was_trained(adapted, tmp_path, fields):
    workdir, _ = adapted
    trained = load_trained(epath.Path(workdir), log=print)
    assert trained.experiment.model.lora_rank == 0 and trained.config.model.lora_rank == 0
    windows, _ = chunks(dataset.load(source=fields["data__source"], length=32).valid, 32, limit=4)
    key, bound = jax.random.split(jax.random.key(0), 4)[2], trained.experiment.bound_fn(2)
    for where in (workdir, tmp_path / "merged"):
        if where != workdir:
            run("convert", "--to=workdir", f"--input={workdir}", f"--output={where}")
            assert {path.partition("/")[0] for path in saved_states(where)[3]} == {"position", "ema"}
        params = load_trained(epath.Path(where), log=print).params
        measure = lambda batch, first: bound(params, key, batch, first)  # noqa: B023, E731
        found = trained.experiment.map_batches(measure, windows, 32)
        expected = metrics(workdir)[-1]["eval_nats_per_token"]
        np.testing.assert_allclose(found.total.mean() / 32, expected, rtol=1e-5)


def test_adapters_resume_bit_for_bit_and_need_the_model_that_they_adapt(adapted, tmp_path, fields):
    workdir, base = adapted
    fields, other = fields | LORA, tmp_path / "run"
    tune(other, base, **fields | {"train__steps": 1})
    tune(other, None, **fields)
    assert saved_states(other) == saved_states(workdir)
    record = json.loads((other / "config.json").read_text())
    for source, line in (
        (workdir, "adapters to other weights than"),
        (tmp_path / "none", "adapts a model that cannot be read"),
    ):
        (other / "config.json").write_text(json.dumps(record | {"init": record["init"] | {"source": str(source)}}))
        with pytest.raises(InputError, match=line):
            load_trained(epath.Path(other), log=print)
    with pytest.raises(InputError, match="lora_rank=4 needs --init"):
        tune(tmp_path / "none", None, **fields)
    with pytest.raises(InputError, match="with model.lora_rank choose 'adamw'"):
        tune(tmp_path / "none", base, **fields | {"optim__kind": "muon"})
