"""Two models on one text: the same sequences and noise, hence a difference whose error is smaller than theirs."""

import json
import shutil

import pytest
from running import run


def answer(*argv: str) -> dict:
    return json.loads(run("compare", *argv)[0].splitlines()[-1])


def test_a_model_does_not_differ_from_itself_and_does_from_another(models, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models / "diffusion", copy)
    given = (f"--workdir={models / 'diffusion'}", f"--data={models / 'text.txt'}", "--num_sequences=40")
    same = answer(*given, f"--other={copy}", "--num_times=2")
    assert (same["difference_nats_per_token"], same["difference_nats_per_token_stderr"]) == (0, 0)
    assert same["workdir"]["nats_per_token"] == same["other"]["nats_per_token"] and not same["beyond_two_errors"]
    found = answer(*given, f"--other={models / 'ar'}", "--num_times=2")
    difference = found["other"]["nats_per_token"] - found["workdir"]["nats_per_token"]
    assert found["difference_nats_per_token"] == pytest.approx(difference, rel=1e-9)
    assert found["num_sequences"] == 40 and found["difference_nats_per_token_stderr"] > 0


def test_models_of_other_lengths_are_refused(models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models / "diffusion", other)
    config = json.loads((other / "config.json").read_text())
    config["data"]["length"] //= 2
    (other / "config.json").write_text(json.dumps(config))
    _, err = run("compare", f"--workdir={models / 'diffusion'}", f"--other={other}", expect=2)
    assert "another tokenizer or data.length" in err.splitlines()[-1]
