"""An exported file answers without the package as `sample` does; its reader spells as every tokenizer does."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import test_vocabularies
from running import ENVIRONMENT, run

from sedd_jax import exported
from sedd_jax.data import corpora, tokenizers

TEMPLATE, TEXT = "ab[[20]]c", "It's 12 cafés,\n  or <none>."
# The file's own reader, where the package cannot be imported.
ALONE = """
import json, runpy, sys
sys.modules["sedd_jax"] = None
sampler = runpy.run_path(sys.argv[1], run_name="reader")["Sampler"](sys.argv[1])
print(json.dumps([sampler.fill(sys.argv[2], **numbers) for numbers in json.loads(sys.argv[3])]))
"""
COOL = {"seed": 4294967295, "steps": 7, "temperature": 0.3}


@pytest.fixture(scope="module")
def file(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.zip"
    out, _ = run("export", f"--workdir={models / 'diffusion'}", f"--output={path}", "--method=first_hitting", "--num=3")
    answer = json.loads(out)
    assert answer["platforms"] == ["cpu", "cuda", "tpu"] and answer["bytes"] == path.stat().st_size
    return path


def python(*argv, expect=0):
    ended = subprocess.run([sys.executable, *map(str, argv)], env=ENVIRONMENT, cwd="/", capture_output=True, text=True)
    assert ended.returncode == expect, ended.stderr
    return ended.stdout if expect == 0 else ended.stderr


def test_without_the_package_it_gives_the_texts_of_sample(file, models):
    settings = {"seed": 5, "steps": 4, "temperature": 1.0}, COOL
    found = json.loads(python("-I", "-c", ALONE, file, TEMPLATE, json.dumps(settings)))
    for texts, numbers in zip(found, settings, strict=True):
        flags = [f"--{name}={value}" for name, value in numbers.items()] + ["--method=first_hitting", "--num=3"]
        out, _ = run("sample", f"--workdir={models / 'diffusion'}", f"--template={TEMPLATE}", *flags)
        assert texts == json.loads(out.splitlines()[-1])["samples"] and len(set(texts)) == 3


def test_it_is_a_command_itself_and_holds_nothing_pickled(file):
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                assert np.lib.format.read_array(archive.open(name), allow_pickle=False).dtype == np.float32
    for wrong, line in (
        ("[[33]]", "33 tokens, more than the model's 32"),
        ("--steps=0", "steps=0"),
        ("--temperature=nan", "temperature=nan"),
        ("--seed=x", "invalid int value: 'x'"),
    ):
        assert line in python("-I", file, wrong, expect=2).splitlines()[-1]


def test_what_cannot_be_exported_is_refused(models, tmp_path):
    for flags, line in (
        (["--output=model.zip"], "--workdir is missing"),
        ([f"--workdir={models / 'diffusion'}"], "--output is missing"),
        ([f"--workdir={tmp_path}", f"--output={tmp_path / 'm'}"], "holds no run"),
        ([f"--workdir={tmp_path}", f"--output={tmp_path / 'no' / 'm'}"], "cannot be written"),
        (["--platform=abacus"], "<cpu|cuda|tpu>"),
        ([f"--workdir={models / 'diffusion'}", f"--output={tmp_path / 'm'}", "--label=1"], "label=1 is unknown"),
        ([f"--workdir={models / 'diffusion'}", f"--output={tmp_path / 'm'}", "--top_p=2"], "top_p=2"),
    ):
        err = run("export", *flags, expect=2)[1]
        assert line in err.splitlines()[-1] and not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["bytes", "text8", "sentencepiece", "gpt2", "byte_level", "bert"])
def test_its_reader_spells_as_the_tokenizer(kind, tmp_path):
    if kind == "sentencepiece":
        tokenizer = tokenizers.train_sentencepiece(corpora.documents("embedded")[:20], 400)
    elif kind in ("bytes", "text8"):
        tokenizer = tokenizers.make(kind)
    elif kind == "gpt2":
        tokenizer = tokenizers.make(kind, path=str(test_vocabularies.write_gpt2(tmp_path / "gpt2")))
    else:
        tokenizer = tokenizers.HuggingFace(getattr(test_vocabularies, kind)().to_str().encode())
    tokenizer.padding = 2
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        for name, content in ({"about.json": b'{"weights": []}'} | tokenizer.portable()).items():
            archive.writestr(name, content)
    reader, text = exported.Sampler(tmp_path / "file"), "in the cafe" if kind == "text8" else TEXT
    tokens = tokenizer.encode(text)
    assert reader.encode(text) == tokens.tolist()
    tokens = [*tokens, tokenizer.vocab_size + 1, *[tokenizer.eot] * (tokenizer.eot is not None), *tokens]
    if kind != "bert":
        assert reader.decode(tokens) == tokenizer.decode(tokens)
    assert "".join(reader.decode(tokens).split()) == "".join(tokenizer.decode(tokens).split())
