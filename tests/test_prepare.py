"""Preparing depends on the documents and the plan alone, and an interrupted preparation continues."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from running import ENVIRONMENT, ROOT, files, run, write_text

from sedd_jax.data import corpora, dataset, preparation, shards
from sedd_jax.data.packing import chunks, tokenize
from sedd_jax.data.preparation import Plan
from sedd_jax.errors import InputError


def refused(message: str):
    return pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(message)}[^\n]*\Z")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text of three files, two of them of many documents."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = write_text(folder / "c.txt", 30_000).read_text().splitlines()
    for name, part in (("a.jsonl", lines[:300]), ("b.jsonl", lines[300:])):
        (folder / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    return Plan(f"{folder}/*", valid_fraction=0.2, shard_bytes=5_000, record_tokens=256)


@pytest.fixture(scope="module")
def prepared(plan, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "shards"
    preparation.prepare(plan, str(output))
    return output


def tokens_of(stream) -> np.ndarray:
    return chunks(stream, 1)[0][:, 0]


def test_shards_hold_the_tokens_that_training_on_the_text_would_see(plan, prepared):
    found = shards.load(str(prepared))
    train, valid = corpora.read(plan.data, valid_fraction=plan.valid_fraction)
    for split, stream, texts in (("train", found.train, train), ("valid", found.valid, valid)):
        expected = tokenize(texts, found.tokenizer)
        np.testing.assert_array_equal(tokens_of(stream), expected.tokens)
        assert (stream.num_bytes, stream.num_documents) == (expected.num_bytes, expected.num_documents)
        assert found.manifest.counts(split)["characters"] == sum(map(len, texts))
    assert len(found.manifest.shards["train"]) > 5


def test_output_does_not_depend_on_the_number_of_workers(plan, prepared, tmp_path):
    preparation.prepare(plan, str(tmp_path / "two"), workers=2)
    assert files(tmp_path / "two") == files(prepared)


def test_sound_shards_are_kept_and_the_others_replaced(plan, prepared, tmp_path):
    output = tmp_path / "shards"
    preparation.prepare(plan, str(output))
    count = sum(map(len, shards.read_manifest(output).shards.values()))
    assert preparation.prepare(plan, str(output))[1] == count
    paths = sorted(output.glob("*.array_record"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    content = bytearray(paths[2].read_bytes())
    content[500] ^= 1
    paths[2].write_bytes(content)
    assert preparation.prepare(plan, str(output))[1] == count - 3
    assert files(output) == files(prepared)


def test_an_interruption_loses_the_unfinished_shard_only(plan, prepared, tmp_path, monkeypatch):
    output = tmp_path / "shards"
    write, made = shards.write_records, []

    def write_three(path, *arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path.name)
        write(path, *arguments)

    monkeypatch.setattr(shards, "write_records", write_three)
    for round in range(1, 4):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare(plan, str(output))
        assert len(list(output.glob("*.array_record"))) == 3 * round
        with refused("no"):
            shards.load(str(output))
    # As if the journal had been cut off in the middle of a line, and a shard in the middle of a record.
    journal = output / preparation.JOURNAL
    journal.write_text(journal.read_text()[:-20])
    (output / ".train-00000-00000.array_record.1.tmp").write_bytes(b"half")
    monkeypatch.undo()
    assert preparation.prepare(plan, str(output))[1] == 8
    assert files(output) == files(prepared)


def test_killed_at_any_moment_leaves_complete_shards_and_no_processes(plan, prepared, tmp_path):
    output = tmp_path / "shards"
    code = (
        "import sys; from sedd_jax.data import preparation; from sedd_jax.data.preparation import Plan\n"
        "if __name__ == '__main__': preparation.prepare(Plan(*eval(sys.argv[1])), sys.argv[2], workers=2)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    arguments = [sys.executable, str(script), repr(dataclasses.astuple(plan)), str(output)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(output.glob("*.array_record")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    with refused(f"--output={output} is in use by process {process.pid} on "):
        preparation.prepare(plan, str(output))
    process.send_signal(signal.SIGKILL)
    # Its end of stderr closes when the last worker has ended.
    process.communicate(timeout=60)
    complete = files(prepared)
    left = {name: content for name, content in files(output).items() if name.endswith(".array_record")}
    assert left
    assert all(complete[name] == content for name, content in left.items() if not name.startswith("."))
    preparation.prepare(plan, str(output))
    assert files(output) == complete


def test_another_corpus_in_the_output_is_left_alone(plan, prepared, folder, tmp_path):
    before = files(prepared)
    for change in ({"data": f"{folder}/a.jsonl"}, {"valid_fraction": 0.3}, {"record_tokens": 99}):
        with refused(f"holds another corpus: {next(iter(change))} is"):
            preparation.prepare(dataclasses.replace(plan, **change), str(prepared))
    assert files(prepared) == before
    (tmp_path / "file").write_text("mine")
    with refused("holds other files"):
        preparation.prepare(plan, str(tmp_path))
    with refused("is a file"):
        preparation.prepare(plan, str(tmp_path / "file"))
    with refused("cannot be made a directory"):
        preparation.prepare(plan, str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("content", [b"\xff\n", b"[" * 100_000 + b"\n", b"{}\n[]\n", b"{}\n{}\n", b"7\n", None])
def test_a_damaged_journal_is_refused(plan, tmp_path, content):
    (tmp_path / "out").mkdir()
    journal = tmp_path / "out" / preparation.JOURNAL
    journal.mkdir() if content is None else journal.write_bytes(content)
    with refused("progress.jsonl is damaged: "):
        preparation.prepare(plan, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == [journal]


def test_changed_text_is_refused(tmp_path):
    source = write_text(tmp_path / "text.txt")
    plan = Plan(str(source), valid_fraction=0.5)
    preparation.prepare(plan, str(tmp_path / "out"))
    next((tmp_path / "out").glob("*.array_record")).unlink()
    source.write_text(source.read_text() + "more")
    with refused("has changed since it was prepared"):
        preparation.prepare(plan, str(tmp_path / "out"))


def test_a_trained_tokenizer_is_saved_and_used_again(folder, tmp_path):
    plan = Plan(f"{folder}/c.txt", tokenizer="sentencepiece", vocab_size=400, valid_fraction=0.1)
    preparation.prepare(plan, str(tmp_path / "out"))
    first = files(tmp_path / "out")
    found = shards.load(str(tmp_path / "out"))
    text = (folder / "c.txt").read_text()
    decoded = [found.tokenizer.decode(tokens_of(stream)) for stream in (found.train, found.valid)]
    assert "".join(part.removesuffix("<|endoftext|>") for part in decoded) == text
    directly = dataset.load(
        source=f"{folder}/c.txt", length=8, tokenizer="sentencepiece", vocab_size=400, valid_fraction=0.1
    )
    assert directly.tokenizer.fingerprint == found.tokenizer.fingerprint
    next((tmp_path / "out").glob("train*")).unlink()
    preparation.prepare(plan, str(tmp_path / "out"))
    assert files(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere/*.txt"}, "'nowhere/*.txt' matches no file"),
        ({"valid_data": "nowhere.txt"}, "'nowhere.txt' matches no file"),
        ({"data": ""}, "data source '' matches no file"),
        ({"valid_data": ""}, "data source '' matches no file"),
        ({"separator": ""}, "separator=''"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
        ({"tokenizer": "wordpiece"}, "'wordpiece'"),
        ({"text_field": "body"}, "no field 'body'"),
    ],
)
def test_bad_input_leaves_nothing_behind(plan, tmp_path, change, message):
    with refused(message):
        preparation.prepare(dataclasses.replace(plan, **change), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command_answers_in_one_line(folder, tmp_path):
    argv = ["--tokenizer=bytes", "--workers=1", f"--output={tmp_path}/out"]
    out, _ = run("prepare", f"--data={folder}/c.txt", f"--valid_data={folder}/a.jsonl", *argv, real=True)
    answer = json.loads(out)
    text = (folder / "c.txt").read_text()
    assert answer["train"] == {
        "tokens": len(text.encode()) + 1,
        "documents": 1,
        "bytes": len(text.encode()),
        "characters": len(text),
    }
    assert answer["shards"] == 2 and answer["vocab_size"] == 257
    _, err = run("prepare", f"--data={folder}/b.jsonl", *argv, expect=2)
    assert err.count("\n") == 1 and "holds another corpus" in err


def test_blocks_are_neighbouring_documents_up_to_a_size():
    found = list(preparation.part_blocks("train", 3, ["aa", "", "bb", "c", "dddd", "e"], 3))
    assert [block.texts for block in found] == [("aa", "bb"), ("c", "dddd"), ("e",)]
    assert found[1].name == "train-00003-00001.array_record"
    assert os.path.basename(found[0].name) == found[0].name
