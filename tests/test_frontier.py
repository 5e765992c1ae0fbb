"""The command `frontier`: its points are those of `sample`, it continues where it stopped, and it refuses bad input."""

import json
import math
import os

import pytest
from running import files, run, start
from tiny_llama import write_llama

from sedd_jax import lock

METHODS = "--methods=analytic,analytic:cosine,confidence"


def answer(out):
    return json.loads(out.splitlines()[-1])


def test_points_are_those_of_sample_and_the_command_continues(models, tmp_path):
    workdir, output = models / "diffusion", tmp_path / "points"
    asked = [f"--workdir={workdir}", f"--output={output}", METHODS, "--num=3", "--num_times=4", "--seed=5"]
    out, err = run("frontier", *asked, "--steps=2,4", "--data", JAX_LOG_COMPILES="1")
    found = answer(out)
    assert err.count("Finished XLA compilation of jit(bound)") == 1, err[-2000:]
    assert found["measured_by"] == "the model's own bound" and len(found["points"]) == 7
    data, *points = found["points"]
    assert data["method"] == "data" and data["network_evaluations"] is None
    for line in points:
        assert line["network_evaluations"] == line["steps"] + (line["method"] == "analytic")
        assert line["generative_perplexity"] == pytest.approx(2 ** line["bits_per_token"])
        # 32 tokens have no more than log 32 nats.
        assert 0 < line["unigram_entropy"] <= math.log(32) + 1e-6 and line["seconds"] > 0
    for name in ("results.csv", "results.md"):
        assert len((output / name).read_text().splitlines()) == 7 + (1 if name.endswith("csv") else 2)
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")

    sampled = answer(run("sample", f"--workdir={workdir}", "--num=3", "--steps=4", "--seed=5", "--grid=cosine")[0])
    path = output / "points" / "analytic-cosine-1-4.json"
    assert json.loads(path.read_text())["texts"] == sampled["samples"]

    kept = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir() if file != path}
    path.unlink()
    out, err = run("frontier", *asked, "--steps=2,4,8", "--data")
    assert err.count("done already") == 6
    again = answer(out)["points"]
    assert len(again) == 10 and [line for line in again if line["steps"] in (None, 2)] == [
        line for line in found["points"] if line["steps"] in (None, 2)
    ]
    rebuilt = [line for line in again if (line["grid"], line["steps"]) == ("cosine", 4)]
    before = [line for line in found["points"] if (line["grid"], line["steps"]) == ("cosine", 4)]
    assert rebuilt[0]["bits_per_token"] == pytest.approx(before[0]["bits_per_token"])
    assert kept.items() <= {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}.items()

    _, err = run("frontier", *asked, "--steps=2", "--seed=6", expect=2)
    assert "whose seed is 5 and not 6" in err


def test_one_output_has_one_command(models, tmp_path):
    """And the one that is refused leaves everything as it is."""
    workdir, before = f"--workdir={models}/diffusion", files(tmp_path)
    corpora = ["--suite=zeroshot", f"--corpora=ptb={models}/text.txt", "--num_sequences=1"]
    with lock.hold(tmp_path, "output"):
        commands = [
            start("frontier", workdir, f"--output={tmp_path}"),
            start("evaluate", workdir, *corpora, f"--output={tmp_path}"),
        ]
        for process in commands:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 2 and f"--output={tmp_path} is in use by process {os.getpid()} on" in err
    assert files(tmp_path) == before


def test_a_gguf_judges(models, tmp_path):
    """The figures are those of the command `judge` on the same texts."""
    workdir, judge, samples = models / "diffusion", write_llama(tmp_path / "a.gguf"), tmp_path / "samples.jsonl"
    references = tmp_path / "references.jsonl"
    references.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the cat", "12", "the end", "é")))
    asked = [f"--workdir={workdir}", f"--output={tmp_path}", f"--judge={judge}", "--num=3", "--steps=4"]
    found = answer(run("frontier", *asked, f"--references={references}")[0])
    run("sample", f"--workdir={workdir}", "--num=3", "--steps=4", f"--output={samples}")
    judged = answer(run("judge", f"--samples={samples}", f"--model={judge}", f"--references={references}")[0])
    assert found["measured_by"] == "the judge a.gguf" and "| MAUVE |" in (tmp_path / "results.md").read_text()
    for name in ("generative_perplexity", "unigram_entropy", "distinct_2", "mauve"):
        assert found["points"][0][name] == pytest.approx(judged[name], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "flag", "message"),
    [
        ("diffusion", "--steps=4,0", "steps=0 must be at least 1"),
        ("diffusion", "--temperatures=0", "temperature=0"),
        ("diffusion", "--methods=magic", "'magic' is unknown"),
        ("diffusion", "--steps=few", "must be numbers: invalid literal for int() with base 10: 'few'"),
        ("ar", "--steps=4", "holds an autoregressive model"),
        ("diffusion", "--references=texts", "--references=texts needs a --judge"),
    ],
)
def test_impossible_points_are_refused_before_sampling(models, model, flag, message):
    _, err = run("frontier", f"--workdir={models / model}", flag, expect=2)
    assert message in err and not (models / model / "frontier").exists()
