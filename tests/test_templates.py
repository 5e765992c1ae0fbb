"""Texts with holes become windows, from the command line and from files."""

import gzip
import itertools
import json
import re

import numpy as np
import pytest

from sedd_jax.data.tokenizers import Bytes, Text8
from sedd_jax.errors import InputError
from sedd_jax.generation.templates import FREE, parse_template, read_templates, tokens_per_word


def test_holes_are_free_and_the_rest_is_given():
    window = parse_template("ab[[3]]c[[~2]]", Bytes(), length=32)
    words = round(2 * tokens_per_word(Bytes()))
    assert window.holes == (3, words) and window.shown == 6 + words
    np.testing.assert_array_equal(window.tokens[:6], [97, 98, FREE, FREE, FREE, 99])
    assert (window.tokens[6:] == FREE).all()


@pytest.mark.parametrize(
    ("template", "text", "holes"),
    [
        (r"df\[['a', 'b'\]] = [[2]]", "df[['a', 'b']] = \0\0", (2,)),
        (r"\[[Link\]] is [[1]]", "[[Link]] is \0", (1,)),
        (r"\\[[2]]\\\\[[1]]", "\\\0\0\\\\\0", (2, 1)),
        (r"\\\[[2\\\]]", r"\[[2\]]", ()),
        (r"[[[1]]] \n \\ [0]\]", "[\0] \\n \\\\ [0]\\]", (1,)),
        (r"\[[[[1]]", "[[\0", (1,)),
    ],
)
def test_brackets_can_be_escaped(template, text, holes):
    window = parse_template(template, Bytes(), length=32)
    assert window.holes == holes
    assert bytes(np.maximum(window.tokens[: window.shown], 0).tolist()).decode() == text


def test_any_text_can_be_given_escaped():
    """Every text of up to six of the characters that mean something."""
    for length in range(7):
        for characters in itertools.product("[]\\3", repeat=length):
            text = "".join(characters)
            escaped = re.sub(r"(\\*)(\[\[|\]\])", r"\1\1\\\2", text)
            window = parse_template(escaped, Bytes(), length=8)
            assert window.shown == length and window.tokens[:length].tolist() == list(text.encode()), text


def test_the_end_of_text_can_be_given():
    window = parse_template(r"a[[eot]]b[[2]][[eot]]\[[eot\]]", Bytes(), length=16)
    assert window.holes == (2,)
    assert window.tokens[: window.shown].tolist() == [97, 256, 98, FREE, FREE, 256, *b"[[eot]]"]
    assert Bytes().decode(window.tokens[:3]) == "a<|endoftext|>b"
    with pytest.raises(InputError, match=r"--template has \[\[eot\]\], but the tokenizer 'text8' has no end of text"):
        parse_template("a[[eot]]", Text8(), length=16)


def test_templates_come_from_lines_and_from_records(tmp_path):
    templates = ["a [[2]]", "b\n[[3]]"]
    records = "".join(json.dumps({"text": template}) + "\n" for template in templates)
    (tmp_path / "records.jsonl").write_text(records)
    (tmp_path / "records.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (tmp_path / "lines.txt").write_text("a [[2]]\n\nb [[3]]\n")
    assert read_templates(str(tmp_path / "records.jsonl"), "text") == templates
    assert read_templates(str(tmp_path / "records.jsonl.gz"), "text") == templates
    assert read_templates(str(tmp_path / "lines.txt"), "text") == ["a [[2]]", "b [[3]]"]


@pytest.mark.parametrize("name", ["absent.txt", "empty.txt", "blank.txt", "empty.jsonl"])
def test_files_without_templates_are_refused_by_name(name, tmp_path):
    for empty in ("empty.txt", "empty.jsonl"):
        (tmp_path / empty).touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(InputError, match=name):
        read_templates(str(tmp_path / name), "text")
