"""Corpora are read exactly and divided without loss; what cannot be read is refused by file and line."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sedd_jax.data import corpora, dataset
from sedd_jax.errors import InputError


def refused(message: str):
    """Expects an InputError of one line that contains `message`."""
    return pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(message)}[^\n]*\Z")


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def test_the_embedded_corpus_is_text_and_the_same_at_each_reading():
    found = corpora.documents("embedded")
    assert found == corpora.documents("embedded")
    assert all(found) and sum(map(len, found)) > 300_000


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_the_two_parts_of_a_division_make_up_the_whole(fraction):
    whole = "".join(corpora.documents("embedded"))
    train, valid = corpora.read("embedded", valid_fraction=fraction)
    assert "".join(train) + "".join(valid) == whole
    assert len("".join(valid)) == round(len(whole) * fraction)
    assert all(train) and all(valid)


def test_only_the_document_at_the_cut_is_divided(write):
    for name, text in (("a.txt", "aaaa"), ("b.txt", "bbbb"), ("c.txt", "cc")):
        source = write(name, text)
    pattern = source.replace("c.txt", "*.txt")
    assert corpora.read(pattern, valid_fraction=0.4) == (("aaaa", "bb"), ("bb", "cc"))
    assert corpora.read(pattern, valid_fraction=0.2) == (("aaaa", "bbbb"), ("cc",))
    assert corpora.read(write("one", "0123456789")) == (("012345678",), ("9",))


def test_a_validation_source_is_read_whole(write):
    found = dataset.load(source=write("a", "train"), valid_source=write("b", "valid"), length=6)
    train, valid = found.tokenizer.decode(found.train.tokens), found.tokenizer.decode(found.valid.tokens)
    assert (train, valid) == ("train<|endoftext|>", "valid<|endoftext|>")


def test_files_are_read_exactly_in_sorted_order_without_empty_ones_and_directories(write, tmp_path):
    write("b.txt", "\ufeff second\ufeff\r\n\x00\u2028é")
    write("a.txt", " first\n")
    write("c.txt", "")
    (tmp_path / "d.txt").mkdir()
    assert corpora.documents(f"{tmp_path}/*.txt") == (" first\n", " second\ufeff\r\n\x00\u2028é")


def test_a_file_whose_name_looks_like_a_glob_is_read(write):
    assert corpora.documents(write("a[1].txt", "text")) == ("text",)


def test_each_line_of_jsonl_is_a_document(write):
    texts = ["one\ntwo", "", "line\u2028separator", "🙂"]
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=False) for text in texts]
    source = write("a.jsonl", "\n".join([*lines, "", ""]))
    assert corpora.documents(source, text_field="body") == ("one\ntwo", "line\u2028separator", "🙂")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "invalid JSON"),
        ('["text"]', "a JSON list, not an object"),
        ('{"body": "x"}', "no field 'text'; set text_field to one of 'body'"),
        ('{"text": 3}', "field 'text' is a int, not a string"),
        ('{"text": "\\ud83d"}', "half a surrogate pair at character 0"),
    ],
)
def test_a_bad_record_is_refused_by_file_and_line(write, line, message):
    source = write("a.jsonl", '{"text": "good"}\n\n' + line + "\n")
    with refused(f"a.jsonl:3: {message}"):
        corpora.documents(source)


def test_sources_that_cannot_be_read_are_refused(write, tmp_path):
    with refused("nowhere.txt' matches no file"):
        corpora.documents(f"{tmp_path}/nowhere.txt")
    with refused("is a directory"):
        corpora.documents(str(tmp_path))
    with refused("latin.txt is not UTF-8 at byte 3"):
        corpora.documents(write("latin.txt", "caf\u00e9".encode("latin-1")))
    with refused("empty.txt' holds no text"):
        corpora.documents(write("empty.txt", ""))


def test_an_unreadable_file_is_refused(write, monkeypatch):
    source = write("secret.txt", "text")

    def deny(path, **_):
        raise PermissionError(13, "Permission denied")

    # Taking the permission away would not stop root, as whom containers run tests.
    monkeypatch.setattr("pyarrow.input_stream", deny)
    with refused("secret.txt: Permission denied"):
        corpora.documents(source)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_fractions_outside_zero_to_one_are_refused(fraction):
    with refused(f"valid_fraction={fraction}"):
        corpora.read("embedded", valid_fraction=fraction)


def test_text_too_short_to_divide_is_refused(write):
    with refused("of 3 characters leaves a part empty"):
        corpora.read(write("a", "abc"), valid_fraction=0.1)


TEXTS = ("one\ntwo", "line\u2028separator", "\U0001f642", "x" * 100_000)


def lines_of(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def compress(path, content: bytes) -> bytes:
    """Writes the file as its name says, and returns what it then holds."""
    with pyarrow.output_stream(str(path)) as file:
        file.write(content)
    assert path.stat().st_size < len(content)
    return path.read_bytes()


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, ending):
    member = compress(tmp_path / f"a.jsonl.{ending}", lines_of(TEXTS))
    compress(tmp_path / f"b.txt.{ending}", ("plain é " * 1000).encode())
    assert corpora.documents(f"{tmp_path}/*.{ending}") == (*TEXTS, "plain é " * 1000)
    # Concatenated files are a file.
    (tmp_path / f"a.jsonl.{ending}").write_bytes(member + member)
    assert corpora.documents(f"{tmp_path}/a*") == TEXTS + TEXTS


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"garbage" + content])
def test_damaged_compressed_files_are_refused(tmp_path, ending, damage):
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(damage(compress(path, lines_of(TEXTS))))
    with refused(f"cannot read {path}"):
        corpora.documents(str(path))


def test_rows_of_parquet_are_documents(tmp_path):
    table = pyarrow.table({"body": [*TEXTS, None], "id": range(5)})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert corpora.documents(str(path), text_field="body") == TEXTS
    with refused("a.parquet: no field 'text'; set text_field to one of 'body', 'id'"):
        corpora.documents(str(path))
    with refused("a.parquet, row 1: field 'id' is a int, not a string"):
        corpora.documents(str(path), text_field="id")
    path.write_bytes(path.read_bytes()[:-10])
    with refused("a.parquet"):
        corpora.documents(str(path), text_field="body")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set of the embedded text, built by TFDS."""
    import tensorflow_datasets as tfds

    class EmbeddedText(tfds.core.GeneratorBasedBuilder):
        """Its documents: all but the last ten to train, the last ten to test."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "number": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            texts = list(enumerate(corpora.documents("embedded")))
            return {"train": self._generate_examples(texts[:-10]), "test": self._generate_examples(texts[-10:])}

        def _generate_examples(self, texts):
            for number, text in texts:
                yield number, {"text": text, "number": number}

    folder = tmp_path_factory.mktemp("tfds")
    EmbeddedText(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_data_sets_are_read_by_name_or_folder_and_split(tfds_folder, monkeypatch):
    import tensorflow_datasets as tfds

    whole = corpora.documents("embedded")
    folder = f"tfds:{tfds_folder}/embedded_text/1.0.0"
    train, test = corpora.documents(folder), corpora.documents(f"{folder}@test")
    # TFDS shuffles as it builds.
    assert sorted(train) == sorted(whole[:-10]) and sorted(test) == sorted(whole[-10:])
    assert corpora.documents(f"{folder}@train[:5]+test") == train[:5] + test
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_folder))
    assert corpora.documents("tfds:embedded_text") == train
    parts = corpora.parts(folder, size=100_000)
    assert len(parts) > 3
    assert tuple(text for part in parts for text in part()) == train


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("/embedded_text/1.0.0@valid", "its splits are"),
        ("/embedded_text/2.0.0", "is no TFDS data set"),
    ],
)
def test_what_is_no_tfds_data_set_or_split_is_refused(tfds_folder, rest, message):
    with refused(message):
        corpora.documents(f"tfds:{tfds_folder}{rest}")
    with refused("'tfds:no_such_name' is no TFDS data set"):
        corpora.documents("tfds:no_such_name")
    with refused("set text_field to one of"):
        corpora.documents(f"tfds:{tfds_folder}/embedded_text/1.0.0", text_field="body")
    with refused("'tfds:lm1b' is not in"):
        corpora.documents("tfds:lm1b")


def test_folders_of_hugging_face_datasets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf", exc_type=ImportError)
    one = datasets.Dataset.from_dict({"text": [*TEXTS, None]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "two")
    assert corpora.documents(f"hf:{tmp_path}/one") == corpora.documents(f"hf:{tmp_path}/two") == TEXTS
    assert corpora.documents(f"hf:{tmp_path}/two@test") == TEXTS[1:2]
    with refused("has no split 'valid'"):
        corpora.documents(f"hf:{tmp_path}/two@valid")
    with refused("one part and no splits"):
        corpora.documents(f"hf:{tmp_path}/one@test")
    with refused("no field 'body'"):
        corpora.documents(f"hf:{tmp_path}/one", text_field="body")
    with refused("is no folder that datasets' save_to_disk wrote"):
        corpora.documents(f"hf:{tmp_path}")
