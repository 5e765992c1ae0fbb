"""The pipeline makes byte for byte what one process makes."""

import json

import pytest
from running import files, write_text

beam = pytest.importorskip("apache_beam", reason="needs the extra beam", exc_type=ImportError)

from sedd_jax.data import preparation  # noqa: E402
from sedd_jax.data.beam import prepare  # noqa: E402
from sedd_jax.data.preparation import Plan  # noqa: E402
from sedd_jax.errors import InputError  # noqa: E402

# Beam's own, when it is imported and run.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def plan(tmp_path):
    lines = write_text(tmp_path / "valid.txt").read_text().splitlines()
    for name, part in (("a.jsonl", lines[:200]), ("b.jsonl", lines[200:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    return Plan(f"{tmp_path}/*.jsonl", f"{tmp_path}/valid.txt", shard_bytes=2_000, record_tokens=256)


def test_a_pipeline_makes_the_same_shards(plan, tmp_path):
    made = prepare(plan, str(tmp_path / "beam"), options=["--runner=DirectRunner"])
    expected, _ = preparation.prepare(plan, str(tmp_path / "one"))
    assert made == expected
    assert files(tmp_path / "beam") == files(tmp_path / "one")
    with pytest.raises(InputError, match="holds shards"):
        prepare(plan, str(tmp_path / "beam"), options=[])


@pytest.mark.parametrize("change", [{"valid_data": None}, {"vocab_size": 300}])
def test_a_pipeline_needs_validation_data_and_a_tokenizer(plan, tmp_path, change):
    with pytest.raises(InputError, match="a Beam pipeline"):
        prepare(Plan(**{**vars(plan), **change}), str(tmp_path / "beam"), options=[])
    assert not (tmp_path / "beam").exists()
