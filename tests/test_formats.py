"""Files as they come: what is read, under any name, and what is refused by name. Nothing raw is read in silence."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from sedd_jax.data import corpora, preparation
from sedd_jax.data.preparation import Plan
from sedd_jax.errors import InputError


def refused(message: str):
    """Expects an InputError of one line that contains `message`."""
    return pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(message)}[^\n]*\Z")


def read(path, content: bytes, **options):
    path.write_bytes(content)
    return corpora.documents(str(path), **options)


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


RECORDS = b'{"text": "one two"}\n\n{"id": [], "text": "three"}\n'
TEXTS = ("one two", "three")
MARK = "\ufeff".encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a", "a.json.gz", "a.txt.zst", "a.bz2"])
@pytest.mark.parametrize("before", [b"", MARK, b"\r\n "])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, bz2.compress, lzma.compress])
def test_json_lines_are_known_by_what_is_in_them(tmp_path, name, before, pack):
    if pack is bytes and name.endswith(("gz", "zst", "bz2")):
        with refused(f"cannot read {tmp_path / name}"):
            read(tmp_path / name, RECORDS)
    else:
        assert read(tmp_path / name, pack(before + RECORDS)) == TEXTS


PROSE = [
    '["Stop," he said, "this is a list"] and it was.',
    "[Illustration: a cat]\nOnce a cat sat.",
    "{{Infobox}}\n{a}\n",
    "{} is the empty set.",
    "[[3]] [1] Smith, 1990",
    '"Quoted from the first letter on," she said.',
    "{\n  int x;\n}\n",
    "null",
]


@pytest.mark.parametrize("text", PROSE)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_prose_is_not_taken_for_json(tmp_path, text, pack):
    assert read(tmp_path / "a.txt", pack(text.encode())) == (text,)


WHOLE = [
    '{\n  "text": "one"\n}\n',
    '[{"text": "one"},\n{"text": "two"}]',
    '[\n  "one",\n  "two"\n]\n',
    '["one", "two"]\n["three"]\n',
    '{"text": "cut off',
    "{}\n{}\n",
]


@pytest.mark.parametrize("content", WHOLE)
def test_other_json_is_refused_or_read_as_text_at_will(tmp_path, content):
    for name in ("a.json", "a.txt") if content != WHOLE[-1] else ["a.json"]:
        with refused(f"{name}:1: "):
            read(tmp_path / name, content.encode())
        assert read(tmp_path / name, content.encode(), text_field="") == (content,)
    with refused("`jq -c` writes such lines"):
        read(tmp_path / "a.json", WHOLE[0].encode())


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_null_is_a_document_without_text(tmp_path, name):
    values = ["one", None, "two"]
    if name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / name)
    assert corpora.documents(str(tmp_path / name)) == ("one", "two")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"text": %s}' % ("7" * 5000), "field 'text' is a int, not a string"),
        ('{"text": 1e999}', "field 'text' is a float, not a string"),
        ('{"text": ["a"]}', "field 'text' is a list, not a string"),
        ('{"text": true}', "field 'text' is a bool, not a string"),
        ('{"text": "a", "b": %s' % ("[" * 100_000), "invalid JSON: maximum recursion depth exceeded"),
        ('{"b": ' * 100_000, "invalid JSON: maximum recursion depth exceeded"),
        ('{"text": "a"} {"text": "b"}', "invalid JSON: Extra data"),
        ('{"text": "a"', "invalid JSON"),
    ],
)
def test_records_that_cannot_be_read_are_refused_by_file_and_line(tmp_path, record, message):
    for name in ("a.jsonl", "a.txt"):
        with refused(f"{name}:2: {message}"):
            read(tmp_path / name, b'{"text": "sound"}\n' + record.encode() + b"\n")


def test_numbers_of_any_size_beside_the_text_are_read(tmp_path):
    record = b'{"text": "words", "answer": %s, "low": -%s, "other": 1e99999}' % (b"7" * 5000, b"7" * 5000)
    assert read(tmp_path / "a.jsonl", record) == ("words",)


def test_bytes_in_parquet_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"one"]}), tmp_path / "renamed")
    with refused("renamed, row 1: field 'text' is a bytes, not a string"):
        corpora.documents(str(tmp_path / "renamed"))


def archive(kind: str) -> bytes:
    output = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(output, "w") as file:
            file.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=output, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.txt"))
    return output.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive("zip"), "is a zip archive: unpack it"),
        (archive("tar"), "is a tar archive: unpack it"),
        (gzip.compress(archive("tar"), mtime=0), "is a tar archive: unpack it"),
        ("\ufeffwords".encode("utf-16-le"), "is UTF-16: convert it"),
        ("\ufeffwords".encode("utf-16-be"), "is UTF-16: convert it"),
        ("words".encode("utf-16-le"), "is no text, but largely zeros"),
        (RECORDS.decode().encode("utf-16-be"), "is no text, but largely zeros"),
        (bytes(100_000), "is no text, but largely zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (b"\xff words", "is not UTF-8 at byte 0"),
        (bz2.compress(RECORDS * 100)[:-5], "cannot read"),
        (lzma.compress(RECORDS * 100)[:-5], "cannot read"),
        (zstd(RECORDS * 100)[:-5], "cannot read"),
        (gzip.compress(RECORDS * 100, mtime=0)[:-5], "cannot read"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, content, message):
    for name in ("a.jsonl", "a.txt", "a"):
        with refused(message) as refusal:
            read(tmp_path / name, content)
        assert str(tmp_path / name) in str(refusal.value)


@pytest.mark.parametrize("pack", [gzip.compress, zstd, bz2.compress, lzma.compress])
@pytest.mark.parametrize("unit", [bytes(1000), b"a" * 1000, RECORDS * 20])
def test_bombs_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch, pack, unit):
    monkeypatch.setattr("sedd_jax.data.files._FREE", 1 << 16)
    bomb = pack(unit * 20_000)
    with pytest.raises(InputError, match=r"expands more than 100-fold|largely zeros"):
        read(tmp_path / "a", bomb)


@pytest.mark.parametrize("source", ["/dev/zero", "/dev/null", "/dev/tty", "{fifo}", "{pipe}", "{folder}/f*"])
def test_what_can_be_read_only_once_or_has_no_end_is_refused(tmp_path, source):
    os.mkfifo(tmp_path / "fifo")
    ends = os.pipe()
    source = source.format(fifo=tmp_path / "fifo", pipe=f"/dev/fd/{ends[0]}", folder=tmp_path)
    for read_it in (corpora.documents, lambda name: preparation.prepare(Plan(name), str(tmp_path / "out"))):
        with refused("is a pipe or a device, which cannot be read twice: write it to a file first"):
            read_it(source)
    assert not (tmp_path / "out").exists()
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("source", ["/proc/kmsg", "/proc/version", "/proc/self/mem"])
def test_files_of_proc_hold_no_text(source):
    with refused(f"'{source}' holds no text"):
        corpora.documents(source)


STORIES = "Once a cat sat.\n<|endoftext|>\nOnce a dog ran.\r\n<|endoftext|>\r\nOnce a hen hid.\n<|endoftext|>\n"


def test_text_is_divided_at_its_separator_if_there_is_one(tmp_path, capsys):
    def divided(text, separator):
        return read(tmp_path / "a.txt", text.encode(), separator=separator)

    assert divided(STORIES, "<|endoftext|>") == ("Once a cat sat.", "Once a dog ran.", "Once a hen hid.")
    assert divided("a<|e|> b\n\n<|e|>c", "<|e|>") == ("a", " b\n", "c")
    assert divided("a.b", ".") == ("a", "b")
    assert capsys.readouterr().err == ""
    with refused("separator=''"):
        divided("a", "")
    # Records are documents already.
    assert divided(json.dumps({"text": "a.b"}), ".") == ("a.b",)


def test_without_a_separator_one_line_tells_of_it(tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(STORIES)
    assert corpora.documents(f"{tmp_path}/*.txt") == (STORIES, STORIES)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"texts in {tmp_path} spell <|endoftext|>" in err and "set separator to" in err


def test_shards_are_of_the_divided_text(tmp_path):
    (tmp_path / "a.txt").write_text(STORIES)
    plan = Plan(str(tmp_path / "a.txt"), separator="<|endoftext|>", valid_fraction=0.3)
    manifest, _ = preparation.prepare(plan, str(tmp_path / "out"))
    assert manifest.counts("train")["documents"] == 3  # the third one is divided
    with refused("separator is '<|endoftext|>' there and None here"):
        preparation.prepare(Plan(plan.data, valid_fraction=0.3), str(tmp_path / "out"))
