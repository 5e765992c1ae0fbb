"""lm-evaluation-harness measures a run: tasks from files, by its own command line, without a network."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import running
import scipy.special
from etils import epath
from running import run

from sedd_jax.errors import InputError
from sedd_jax.evaluation import perplexity
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import FREE
from sedd_jax.training.trained import load_trained
from sedd_jax.typing import Batch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'sedd_jax[lm-eval]'")

QUESTIONS = [
    {"context": "The cat sat on", "choices": [" the mat", " a"], "label": 0, "text": "é" * 40},
    {
        "context": "",
        "choices": ["one", "two three"],
        "label": 1,
        "text": "Once upon a time there was a very long text.",
    },
    {"context": "long " * 20 + "long", "choices": [" a", " b"], "label": 1, "text": "x"},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
target_delimiter: ""
"""
KINDS = {
    "multiple_choice": "doc_to_choice: choices\ndoc_to_target: label\n",
    "loglikelihood_rolling": 'doc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n',
    "generate_until": 'doc_to_target: "{{text}}"\ngeneration_kwargs: '
    '{until: ["e"], max_gen_toks: 12, do_sample: true, temperature: 0.7}\n'
    "metric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.json").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for kind, rest in KINDS.items():
        name = f"tiny_{kind}"
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, file=folder / "data.json") + rest)
    return folder


def answers(workdir, tasks, output):
    """Of every task the figures, and the answers to each document."""
    names = ",".join(f"tiny_{kind}" for kind in KINDS)
    model = ["--model", "sedd_jax", "--model_args", f"workdir={workdir},draws=4,steps=3", "--batch_size", "2"]
    more = ["--tasks", names, "--include_path", str(tasks), "--output_path", str(output), "--log_samples"]
    run("lm_eval", *model, *more)
    (results,) = output.rglob("results_*.json")
    lines = {kind: next(output.rglob(f"samples_tiny_{kind}_*.jsonl")) for kind in KINDS}
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    resps = {
        kind: [line["resps"] for line in sorted(read(path), key=lambda line: line["doc_id"])]
        for kind, path in lines.items()
    }
    return json.loads(results.read_text())["results"], resps


@pytest.mark.parametrize("model", ["diffusion", "ar"])
def test_tasks_by_the_command_line(models, tasks, tmp_path, monkeypatch, model):
    monkeypatch.setitem(running.ENVIRONMENT, "HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(running.ENVIRONMENT, "HF_HOME", str(tmp_path / "hf"))
    figures, resps = answers(models / model, tasks, tmp_path / "out")
    trained = load_trained(epath.Path(models / model), log=pytest.fail)
    eot, encode = trained.tokenizer.eot, lambda text: trained.tokenizer.encode(text).tolist()
    pairs = [(encode(q["context"]) or [eot], encode(choice)) for q in QUESTIONS for choice in q["choices"]]
    pairs = [(context[max(0, len(context) + len(text) - 32) :], text) for context, text in pairs]
    found = [float(choice[0][0]) for line in resps["multiple_choice"] for choice in line]
    tokens = np.stack([np.pad(context + text, (0, 32 - len(context + text))) for context, text in pairs])
    place = np.arange(32)
    given = np.stack([place < len(context) for context, _ in pairs])
    behind = np.stack([place >= len(context + text) for context, text in pairs])
    options = trained.experiment.eval.__class__(num_times=4, batch_size=2)
    expected = perplexity.bounds(
        trained, Batch(tokens.astype(np.int32), given=given, never=behind), options, seed=0, name="texts"
    )
    np.testing.assert_allclose(found, -expected.total, rtol=1e-4)
    greedy = [choice[0][1] == "True" for line in resps["multiple_choice"] for choice in line]
    masked = tokens if model == "ar" else np.where(given, tokens, trained.experiment.graph.mask)
    sigma = (
        jnp.zeros(len(tokens)) if model == "ar" else jnp.full(len(tokens), trained.experiment.noise.total(jnp.ones(())))
    )
    logits = np.asarray(trained.experiment.score_fn(trained.params)(jnp.asarray(masked), sigma))
    asked, best = ~(given | behind), logits[..., : trained.tokenizer.vocab_size].argmax(-1)
    assert greedy == [bool(np.all((row == ids)[at])) for row, ids, at in zip(best, tokens, asked, strict=True)]
    if model == "ar":
        logs = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
        exact = np.take_along_axis(logs, tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(found, [row[at].sum() for row, at in zip(exact, asked, strict=True)], rtol=1e-4)
        text = [eot, *encode(QUESTIONS[1]["text"])]
        # 44 letters: 31 behind the end of text, and the other 13 given the 19 before them.
        windows = [(text[:32], 1), (text[-32:], 19)]
        total = 0.0
        for window, first in windows:
            row = np.asarray(trained.experiment.score_fn(trained.params)(jnp.asarray(window)[None], jnp.zeros(1)))[0]
            row = scipy.special.log_softmax(row.astype(np.float64), axis=-1)
            total += sum(row[i, window[i]] for i in range(first, 32))
        assert float(resps["loglikelihood_rolling"][1][0][0]) == pytest.approx(total, rel=1e-4)
    rolling = figures["tiny_loglikelihood_rolling"]["bits_per_byte,none"]
    letters = sum(len(q["text"].encode()) for q in QUESTIONS)
    total = sum(float(line[0][0]) for line in resps["loglikelihood_rolling"])
    assert rolling == pytest.approx(-total / letters / np.log(2), rel=1e-4)
    contexts = [trained.tokenizer.encode(q["context"])[-20:] for q in QUESTIONS]
    windows = np.stack([np.pad(context, (0, 32 - len(context)), constant_values=FREE) for context in contexts])
    sampling = dataclasses.replace(trained.experiment.sampling, temperature=0.7, steps=3)
    rows = Generator(trained, sampling, 2).generate(windows, steps=3, seed=0).tokens
    texts = [trained.tokenizer.decode(row[len(c) :][:12]) for row, c in zip(rows, contexts, strict=True)]
    texts = [text.split("e")[0].split("<|endoftext|>")[0] for text in texts]
    assert [text for ((text,),) in resps["generate_until"]] == texts and max(map(len, texts)) > 1


def test_bad_arguments_in_one_line(models, tasks):
    asked = ["--model", "sedd_jax", "--tasks", "tiny_multiple_choice", "--include_path", str(tasks), "--model_args"]
    _, err = run("lm_eval", *asked, "workdir=absent", expect=2)
    assert err.splitlines()[-1].startswith("error: ") and "absent" in err.splitlines()[-1]
    from lm_eval.api.instance import Instance

    from sedd_jax.harness import Run

    wrong = {"stepps": (3, "stepps"), "draws": ("few", "--model_args"), "batch_size": ("big", "'big'")}
    for name, (value, named) in (
        wrong | {"temperature": (-1.0, "temperature=-1"), "method": ("magic", "magic")}
    ).items():
        with pytest.raises(InputError, match=named):
            Run(str(models / "diffusion"), **{name: value})
    empty = Instance("loglikelihood_rolling", {}, ("",), 0)
    assert Run(str(models / "diffusion")).loglikelihood_rolling([empty, empty]) == [0, 0]
    with pytest.raises(InputError, match="a text has 33 tokens, the model's windows 32"):
        Run(str(models / "diffusion")).loglikelihood([Instance("loglikelihood", {}, ("", "a" * 33), 0)])
