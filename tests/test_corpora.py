import json
import re

import pytest

from sedd_jax.data import corpora
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
    corpus = corpora.read("embedded", valid_fraction=fraction)
    assert "".join(corpus.train) + "".join(corpus.valid) == whole
    assert len("".join(corpus.valid)) == round(len(whole) * fraction)
    assert all(corpus.train) and all(corpus.valid)


def test_only_the_document_at_the_cut_is_divided(write):
    for name, text in (("a.txt", "aaaa"), ("b.txt", "bbbb"), ("c.txt", "cc")):
        source = write(name, text)
    pattern = source.replace("c.txt", "*.txt")
    assert corpora.read(pattern, valid_fraction=0.4) == corpora.Corpus(("aaaa", "bb"), ("bb", "cc"))
    assert corpora.read(pattern, valid_fraction=0.2) == corpora.Corpus(("aaaa", "bbbb"), ("cc",))
    assert corpora.read(write("one", "0123456789")) == corpora.Corpus(("012345678",), ("9",))


def test_a_validation_source_is_read_whole(write):
    assert corpora.read(write("a", "train"), valid_source=write("b", "valid")) == corpora.Corpus(("train",), ("valid",))


def test_files_are_read_exactly_in_sorted_order_without_empty_ones_and_directories(write, tmp_path):
    write("b.txt", "\ufeffsecond\r\n\x00\u2028é")
    write("a.txt", " first\n")
    write("c.txt", "")
    (tmp_path / "d.txt").mkdir()
    assert corpora.documents(f"{tmp_path}/*.txt") == (" first\n", "\ufeffsecond\r\n\x00\u2028é")


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

    def deny(path):
        raise PermissionError(13, "Permission denied")

    # Taking the permission away would not stop root, as whom containers run tests.
    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    with refused("secret.txt: Permission denied"):
        corpora.documents(source)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_fractions_outside_zero_to_one_are_refused(fraction):
    with refused(f"valid_fraction={fraction}"):
        corpora.read("embedded", valid_fraction=fraction)


def test_text_too_short_to_divide_is_refused(write):
    with refused("of 3 characters leaves a part empty"):
        corpora.read(write("a", "abc"), valid_fraction=0.1)
