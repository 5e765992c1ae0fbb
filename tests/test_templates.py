"""Texts with holes become windows, from the command line and from files."""

import gzip
import json

import numpy as np
import pytest

from sedd_jax.data.tokenizers import Bytes
from sedd_jax.errors import InputError
from sedd_jax.generation.templates import FREE, parse_template, read_templates, tokens_per_word


def test_holes_are_free_and_the_rest_is_given():
    window = parse_template("ab[[3]]c[[~2]]", Bytes(), length=32)
    words = round(2 * tokens_per_word(Bytes()))
    assert window.holes == (3, words) and window.shown == 6 + words
    np.testing.assert_array_equal(window.tokens[:6], [97, 98, FREE, FREE, FREE, 99])
    assert (window.tokens[6:] == FREE).all()


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
