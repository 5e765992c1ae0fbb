"""Shards hold the tokens of their text; damaged or hostile ones are refused."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from running import losses, train_here, write_text

from sedd_jax.data import dataset, mixture, preparation, shards
from sedd_jax.data.loader import Loader
from sedd_jax.data.mixture import Mixture
from sedd_jax.data.packing import Stream
from sedd_jax.data.preparation import Plan
from sedd_jax.errors import InputError


def refused(message: str):
    return pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(message)}[^\n]*\Z")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt", 20_000)
    lines = path.read_text().splitlines(keepends=True)
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path.with_suffix(".jsonl")


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "shards"
    preparation.prepare(Plan(str(text), valid_fraction=0.1, shard_bytes=3_000, record_tokens=100), str(output))
    return output


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


@pytest.fixture(scope="module")
def both(text, prepared):
    """The same corpus from its text, and from shards."""
    options = dict(length=32, valid_fraction=0.1)
    return dataset.load(source=str(text), **options), dataset.load(source=f"shards:{prepared}", **options)


def batches(loader: Loader, count: int) -> np.ndarray:
    return np.stack(list(itertools.islice(loader, count)))


@pytest.mark.parametrize("length", [1, 99, 100, 101, 1000, 7000])
def test_any_window_reads_as_from_memory_across_records_and_shards_and_the_end(both, length):
    memory, disk = both
    assert len(memory.train) == len(disk.train) and memory.train.tokens_per_byte == disk.train.tokens_per_byte
    generator = np.random.default_rng(length)
    ends = [0, 1, 99, 100, len(memory.train) - 1, len(memory.train) - length]
    starts = np.array([*ends, *generator.integers(len(memory.train), size=20)])
    np.testing.assert_array_equal(disk.train.read(starts, length), memory.train.read(starts, length))


def test_batches_are_those_of_the_text_on_any_number_of_hosts_and_at_any_position(both):
    memory, disk = both
    options = dict(length=32, batch_size=8, seed=3)
    complete = batches(Loader(memory.train, **options), 100)
    np.testing.assert_array_equal(batches(Loader(disk.train, **options), 100), complete)
    for rows in ([0, 2, 4, 6], [7, 1]):
        share = batches(Loader(disk.train, **options, rows=rows, position=90), 10)
        np.testing.assert_array_equal(share, complete[90:, rows])


def test_training_on_shards_is_training_on_the_text_and_keeps_their_tokenizer(text, prepared, tmp_path):
    steps = dict(train__steps=3, train__eval_every=3, train__sample_every=0, data__valid_fraction=0.1)
    one = train_here(tmp_path / "text", data__source=str(text), **steps)
    other = train_here(tmp_path / "shards", data__source=f"shards:{prepared}", **steps)
    assert losses(tmp_path / "text") == losses(tmp_path / "shards")
    assert one["eval_bits_per_byte"] == other["eval_bits_per_byte"]
    assert (tmp_path / "shards" / "tokenizer.json").read_text() == (prepared / "tokenizer/tokenizer.json").read_text()


def test_fingerprint_tells_shards_apart(both, text, tmp_path):
    plan = Plan(str(text), valid_fraction=0.2)
    preparation.prepare(plan, str(tmp_path / "other"))
    other = dataset.load(source=f"shards:{tmp_path / 'other'}", length=32)
    again = dataset.load(source=f"shards:{tmp_path / 'other'}", length=32)
    assert other.fingerprint == again.fingerprint != both[1].fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokenizer="sentencepiece", vocab_size=300), "these shards were made with 'bytes' of 257 tokens"),
        (dict(vocab_size=300), "these shards were made with 'bytes' of 257 tokens"),
        (dict(length=100_000), "length=100000 exceeds"),
    ],
)
def test_a_config_that_does_not_fit_the_shards_is_refused(prepared, options, message):
    with refused(message):
        dataset.load(**{"source": f"shards:{prepared}", "length": 32, **options})


def edit(copy, change):
    content = json.loads((copy / "manifest.json").read_text())
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content))


def first(content: dict) -> dict:
    return content["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=2), "is of format version 2"),
        (lambda content: content.update(dtype="uint32"), "is damaged: its figures do not agree"),
        (lambda content: content.update(record_tokens=0), "is damaged"),
        (lambda content: content.update(record_tokens="many"), "is damaged"),
        (lambda content: content.pop("splits"), "is damaged"),
        (lambda content: content.update(made_from=[]), "is damaged"),
        (lambda content: content["splits"]["valid"].update(shards=[]), "is damaged"),
        (lambda content: content["splits"]["train"].update(tokens=1), "is damaged"),
        (
            lambda content: first(content).update(name="../train-00000-00000.array_record"),
            "is damaged: shard name '../",
        ),
        (lambda content: first(content).update(name="/etc/passwd"), "is damaged: shard name '/etc/passwd'"),
        (lambda content: first(content).update(tokens=-5), "is damaged"),
        (lambda content: first(content).update(evil=1), "is damaged"),
        (lambda content: content["splits"]["train"]["shards"].append(first(content)), "is damaged"),
        (lambda content: content["tokenizer"].update(fingerprint="0"), "is not the tokenizer that made these shards"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, message):
    edit(copy, change)
    with refused(message):
        shards.load(str(copy))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"version": 1}'])
def test_a_damaged_manifest_is_refused(copy, content):
    (copy / "manifest.json").write_text(content)
    with refused("manifest.json is damaged"):
        shards.load(str(copy))


def test_missing_truncated_and_flipped_shards_are_refused(copy):
    path = sorted(copy.glob("train*"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with refused(f"has {len(content) - 1} bytes instead of {len(content)}"):
        shards.load(str(copy))
    path.unlink()
    with refused(f"cannot read {path}"):
        shards.load(str(copy))
    (offset,) = [match.start() for match in itertools.islice(re.finditer(rb"\w\x00\w\x00", content), 1)]
    path.write_bytes(content[:offset] + b"#" + content[offset + 1 :])
    stream = shards.load(str(copy)).train
    with refused(f"{path.name} is damaged"):
        stream.read(np.arange(0, len(stream), 50), 50)
    with refused(f"{path.name} is damaged"):
        batches(Loader(stream, length=32, batch_size=8, seed=0), 100)
    # A sound file, but of other records than those of the manifest.
    other = sorted(copy.glob("train*"))[2]
    edit(copy, lambda content: content["splits"]["train"]["shards"][1].update(size=other.stat().st_size))
    path.write_bytes(other.read_bytes())
    stream = shards.load(str(copy)).train
    with refused("records of another length"):
        stream.read(np.arange(0, len(stream), 50), 50)


def test_no_shards_there(tmp_path):
    with refused("give a directory in which `prepare` has come to its end"):
        shards.load(str(tmp_path))


def constant(value: int, size: int) -> Stream:
    return Stream(tokens=np.full(size, value, np.uint16), num_bytes=size, num_documents=1)


def test_a_mixture_gives_each_stream_its_share_whatever_their_sizes():
    mixed = Mixture((constant(0, 1000), constant(1, 50), constant(2, 300)), (5.0, 3.0, 2.0))
    rows = batches(Loader(mixed, length=5, batch_size=10, seed=0), 40)[:, :, 0].ravel()
    shares = np.stack([np.cumsum(rows == number) for number in range(3)])
    # Nested rounding: at most one row off for each of the other streams.
    assert np.abs(shares - np.outer([0.5, 0.3, 0.2], np.arange(1, 401))).max() < 2


def test_a_mixture_uses_each_stream_in_epochs_and_resumes_at_any_position():
    streams = tuple(
        Stream(tokens=np.arange(start, start + size, dtype=np.uint16), num_bytes=size, num_documents=1)
        for start, size in ((0, 60), (1000, 20))
    )
    options = dict(length=5, batch_size=6, seed=1, shift=False)
    complete = batches(Loader(Mixture(streams, (2.0, 1.0)), **options), 12)
    for start, chunks in ((0, 12), (1000, 4)):
        rows = [row for row in complete.reshape(-1, 5)[:, 0].tolist() if start <= row < start + 60]
        for epoch in range(len(rows) // chunks):
            found = sorted(rows[epoch * chunks : (epoch + 1) * chunks])
            assert found == list(range(start, start + 5 * chunks, 5))
    for position in range(10):
        resumed = Loader(Mixture(streams, (2.0, 1.0)), **options, position=position, rows=[5, 0])
        np.testing.assert_array_equal(batches(resumed, 2), complete[position : position + 2, [5, 0]])


def test_mixtures_of_shards_and_text_have_one_tokenizer_and_the_first_validation_part(prepared, text, tmp_path):
    found = dataset.load(source=f"mix:3*shards:{prepared},0.5*{text}", length=32, valid_fraction=0.1)
    assert found.train.weights == (3.0, 0.5)
    np.testing.assert_array_equal(found.train.streams[0].read(np.arange(9), 9), found.train.streams[1].tokens[:17][
        np.arange(9)[:, None] + np.arange(9)
    ])  # fmt: skip
    assert found.valid.num_bytes == shards.load(str(prepared)).valid.num_bytes
    plan = Plan(str(text), tokenizer="sentencepiece", vocab_size=300)
    preparation.prepare(plan, str(tmp_path / "pieces"))
    with refused("made with different tokenizers"):
        dataset.load(source=f"mix:1*shards:{prepared},1*shards:{tmp_path}/pieces", length=32)


UNFIT = ("0", "-1", "nan", "inf", "1e-320", "1e-16", "1e16", "1e308", "1e999", "9" * 400)


@pytest.mark.parametrize(
    "source",
    ["mix:", "mix:text.txt", "mix:2*", "mix:1*mix:1*a", *(f"mix:1*b,{weight}*a" for weight in UNFIT)],
)
def test_a_malformed_mixture_is_refused(source):
    with refused("is not WEIGHT*SOURCE"):
        mixture.parse(source)


@pytest.mark.parametrize("small", ["1e-15", "3", "1e15"])
def test_weights_of_any_fit_size_are_interleaved(small):
    weights = tuple(weight for weight, _ in mixture.parse(f"mix:{small}*a,1e15*b"))
    mixed = Mixture((constant(0, 1000), constant(1, 50)), weights)
    shares = batches(Loader(mixed, length=5, batch_size=8, seed=0), 5)[:, :, 0].mean()
    assert shares == pytest.approx(weights[1] / sum(weights), abs=0.03)
