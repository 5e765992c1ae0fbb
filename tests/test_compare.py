"""Two models on one text: the same sequences and noise, hence a difference whose error is smaller than theirs."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from running import run

from sedd_jax.training.trained import load_trained, write_workdir


def answer(*argv: str, real: bool = False) -> dict:
    return json.loads(run("compare", *argv, real=real)[0].splitlines()[-1])


def test_a_model_does_not_differ_from_itself_and_does_from_another(models, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models / "diffusion", copy)
    given = (f"--workdir={models / 'diffusion'}", f"--data={models / 'text.txt'}", "--num_sequences=40")
    same = answer(*given, f"--other={copy}", "--num_times=2", real=True)
    assert (same["difference_nats_per_token"], same["difference_nats_per_token_stderr"]) == (0, 0)
    assert same["workdir"]["nats_per_token"] == same["other"]["nats_per_token"] and not same["beyond_two_errors"]
    found = answer(*given, f"--other={models / 'ar'}", "--num_times=2")
    difference = found["other"]["nats_per_token"] - found["workdir"]["nats_per_token"]
    assert found["difference_nats_per_token"] == pytest.approx(difference, rel=1e-9)
    assert found["num_sequences"] == 40 and found["difference_nats_per_token_stderr"] > 0


def test_models_of_other_lengths_are_refused(models, tmp_path):
    trained = load_trained(epath.Path(models / "diffusion"), log=pytest.fail)
    config, data = trained.config, trained.config.data
    data.length, data.vocab_size, config.mesh.data = data.length // 2, trained.tokenizer.vocab_size, -1
    write_workdir(epath.Path(tmp_path / "other"), jax.tree.map(np.array, trained.params), config, trained.tokenizer)
    _, err = run("compare", f"--workdir={models / 'diffusion'}", f"--other={tmp_path / 'other'}", expect=2)
    assert "another tokenizer or data.length" in err.splitlines()[-1]


def evaluated(workdir, *argv: str) -> dict:
    return json.loads(run("evaluate", f"--workdir={workdir}", *argv)[0].splitlines()[-1])


def test_texts_given_their_prompts(models, tmp_path):
    """Of the AR baseline by the chain rule, exactly; of the diffusion model with a suffix, and in one line what is no
    record."""
    path = tmp_path / "prompts.jsonl"

    def nats(workdir, *records):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        found = evaluated(workdir, f"--prompts={path}", "--num_times=8")
        assert found["bits_per_byte"] == pytest.approx(found["bits"] / sum(len(r["text"].encode()) for r in records))
        return found["nats_per_token"] * found["num_tokens"]

    first, second = "Once é ", "upon a time"
    whole = nats(models / "ar", {"text": first + second})
    parts = nats(models / "ar", {"text": first}, {"prompt": first, "text": second})
    assert parts == pytest.approx(whole, rel=1e-5)
    assert 0 < nats(models / "diffusion", {"prompt": first, "text": second, "suffix": "."}, {"text": second}) < 1000
    for line, message in (("{}", "jsonl:1: 'text'"), ('{"text": ""}', "0 tokens of text"), ("[1]", "jsonl:1:")):
        path.write_text(line)
        _, err = run("evaluate", f"--workdir={models / 'diffusion'}", f"--prompts={path}", expect=2)
        assert message in err.splitlines()[-1]


def test_estimators_agree_where_they_should(models):
    given = (f"--data={models / 'text.txt'}", "--num_sequences=24", "--num_times=32")
    found = {name: evaluated(models / "diffusion", *given, f"--estimator={name}") for name in ("count", "time")}
    error = sum(figures["monte_carlo_nats_per_token_stderr"] ** 2 for figures in found.values()) ** 0.5
    assert found["count"]["nats_per_token"] == pytest.approx(found["time"]["nats_per_token"], abs=5 * error + 0.02)
    assert found["count"]["prior_nats_per_token"] == 0 < found["time"]["prior_nats_per_token"]
    errors = [found[name]["monte_carlo_nats_per_token_stderr"] for name in ("count", "time")]
    assert errors[0] < errors[1]
    weighted = evaluated(models / "diffusion", given[0], "--num_sequences=24", "--estimator=orders", "--orders=4")
    assert weighted["nats_per_token"] < found["count"]["nats_per_token"] + 3 * errors[0]
