"""The commands as a user types them: what they print, what they write, and what they answer."""

import json
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from running import SMALL, arguments, files, metrics, run, train_here, write_text
from tensorboardX.proto.event_pb2 import Event

from sedd_jax.data import corpora
from sedd_jax.data.packing import chunks, tokenize
from sedd_jax.data.tokenizers import Bytes, Tokenizer, load
from sedd_jax.errors import TrainingError
from sedd_jax.training.trained import load_trained, write_workdir

LENGTH, STEPS = 32, 6
FIGURES = ("bits_per_byte", "bits_per_token", "perplexity")
PARTS = ("prior", "diffusion", "reconstruction")


class Trained(NamedTuple):
    workdir: Path
    argv: list[str]
    out: str
    answer: dict


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def train_on(text: Path, folder: Path, **fields: object) -> Trained:
    argv = arguments(folder / "run", data__source=text, train__steps=STEPS, **fields)
    out, _ = run("train", *argv)
    return Trained(folder / "run", argv, out, last_line(out))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    return train_on(text, tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def trained_on_pieces(tmp_path_factory, text):
    # The uniform graph with the geometric noise is the one whose bound has a reconstruction part.
    fields = {"graph__kind": "uniform", "noise__kind": "geometric"}
    pieces = {"data__tokenizer": "sentencepiece", "data__vocab_size": 400}
    return train_on(text, tmp_path_factory.mktemp("pieces"), **fields, **pieces)


def last_line(out: str) -> dict:
    """The answer of a command: strict JSON, which has no NaN."""
    return json.loads(out.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def evaluate(trained: Trained, *argv: str) -> dict:
    out, _ = run("evaluate", f"--workdir={trained.workdir}", *argv)
    assert len(out.splitlines()) == 1
    return last_line(out)


def sample(trained: Trained, *argv: str) -> dict:
    out, _ = run("sample", f"--workdir={trained.workdir}", "--steps=2", *argv)
    answer = last_line(out)
    printed = "".join(f"=== sample {i} ===\n{text}\n" for i, text in enumerate(answer["samples"]))
    assert universal_newlines(out) == universal_newlines(printed) + out.splitlines(keepends=True)[-1]
    assert answer["tokens_per_second"] > 0
    return answer


def universal_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def validation_documents(text: Path) -> tuple[str, ...]:
    return corpora.read(str(text), valid_fraction=0.1)[1]


def tokens_per_byte(rows: np.ndarray, tokenizer: Tokenizer) -> float:
    return rows.size / len(b"".join(tokenizer.pieces[token] for token in rows.ravel()))


def require_complete_bound(answer: dict, tokens_per_byte: float) -> None:
    """The figures of a bound are all there, and follow from its three parts."""
    nats = sum(answer[f"{part}_nats_per_token"] for part in PARTS)
    # 1e-6: the parts are sums of float32, each rounded once more than their total.
    assert answer["nats_per_token"] == pytest.approx(nats, rel=1e-6)
    bits = answer["nats_per_token"] / math.log(2)
    assert [answer[name] for name in FIGURES] == pytest.approx([bits * tokens_per_byte, bits, 2**bits])
    slopes = [tokens_per_byte / math.log(2), 1 / math.log(2), 2**bits]
    errors = [answer["nats_per_token_stderr"] * slope for slope in slopes]
    assert [answer[f"{name}_stderr"] for name in FIGURES] == pytest.approx(errors)
    assert all(0 < error < math.inf for error in errors)


def scalars(folder: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value of the TensorBoard events: records of a length, its checksum, the event and another."""
    values = {}
    for path in folder.iterdir():
        data, start = path.read_bytes(), 0
        while start < len(data):
            (size,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + size])
            values |= {(event.step, v.tag): v.simple_value for v in event.summary.value if not v.HasField("tensor")}
            start += 16 + size
    return values


def test_train_answers_in_one_line_and_leaves_a_complete_workdir(trained):
    assert len(trained.out.splitlines()) == 1
    assert trained.answer["step"] == STEPS
    for name in ("train_loss", "eval_bits_per_byte", "tokens_per_second", "mfu", "mfu_full"):
        assert 0 < trained.answer[name] < math.inf
    saved = json.loads((trained.workdir / "config.json").read_text())
    assert (saved["model"]["dim"], saved["data"]["length"], saved["train"]["steps"]) == (32, LENGTH, STEPS)
    assert (trained.workdir / "checkpoints" / str(STEPS)).is_dir()
    samples = (trained.workdir / "samples" / f"{STEPS}.txt").read_text()
    assert re.findall("=== sample (.*) ===", samples) == [f"{i} at step {STEPS}" for i in range(2)]
    assert (trained.workdir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_metrics_file_and_tensorboard_tell_the_same(trained):
    lines = metrics(trained.workdir)
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, STEPS + 1))
    reported = {(line["step"], name): value for line in lines for name, value in line.items() if name != "step"}
    # The rate of the first step, which is compilation, is not known.
    missing = {(1, "tokens_per_second"), (1, "mfu"), (1, "mfu_full")}
    assert {entry for entry, value in reported.items() if value is None} == missing
    events = scalars(trained.workdir / "tensorboard")
    assert {entry: events[entry] for entry in reported.keys() - missing} == pytest.approx(
        {entry: reported[entry] for entry in reported.keys() - missing}
    )


def test_same_command_again_changes_nothing_and_answers_the_same(trained):
    before = files(trained.workdir)
    out, err = run("train", *trained.argv)
    assert last_line(out) == trained.answer
    assert f"resuming after step {STEPS}" in err
    after = files(trained.workdir)
    assert all(after[name] == content for name, content in before.items() if name != "loss.png")
    assert all(Path(name).parts[0] == "tensorboard" for name in after.keys() - before.keys())


def test_bound_on_the_validation_part_in_batches_of_any_size(trained, text):
    answer, other = evaluate(trained), evaluate(trained, "--batch_size=50")
    assert (answer["step"], answer["num_times"]) == (STEPS, 2)
    valid = tokenize(validation_documents(text), Bytes())
    assert answer["num_sequences"] == len(valid.tokens) // LENGTH
    rows, _ = chunks(valid, LENGTH)
    require_complete_bound(answer, tokens_per_byte(rows, Bytes()))
    some, _ = chunks(valid, LENGTH, limit=SMALL["eval.num_sequences"])
    during = {name.removeprefix("eval_"): value for name, value in trained.answer.items()}
    require_complete_bound(during, tokens_per_byte(some, Bytes()))
    # Only the order of float32 sums differs: some hundred roundings of 2^-24 each.
    assert other.pop("estimator") == answer.pop("estimator") == "auto"
    assert other == pytest.approx(answer, rel=100 * 2**-24)


def test_bound_of_a_file_for_pieces_and_the_uniform_graph(trained_on_pieces, text, tmp_path):
    file = tmp_path / "held out.txt"
    file.write_text("".join(validation_documents(text)), encoding="utf-8")
    answer = evaluate(trained_on_pieces, f"--data={file}", "--num_times=3", "--num_sequences=5")
    assert (answer["num_times"], answer["num_sequences"]) == (3, 5)
    assert answer["reconstruction_nats_per_token"] > 0
    stream = tokenize([file.read_text()], load(trained_on_pieces.workdir))
    rows, _ = chunks(stream, LENGTH, limit=5)
    assert stream.tokens_per_byte < 1
    require_complete_bound(answer, tokens_per_byte(rows, load(trained_on_pieces.workdir)))


def test_samples_start_and_end_with_what_was_given_and_follow_from_the_seed(trained):
    given = ("--num=3", "--prefix=Once upon é", "--suffix= the end.\n")
    first, again, other = (sample(trained, *given, f"--seed={seed}") for seed in (0, 0, 1))
    for answer in (first, other):
        assert len(answer["samples"]) == 3
        assert all(text.startswith("Once upon é") and text.endswith(" the end.\n") for text in answer["samples"])
        assert answer["network_evaluations"] == 2 + 1
    assert first["samples"] == again["samples"] != other["samples"]


def test_template_keeps_every_given_character_in_its_place(trained):
    answer = sample(trained, "--template=A[[3]]bc[[0]] d[[1]].", "--method=euler")
    assert len(answer["samples"]) == 2
    for text in answer["samples"]:
        # A byte that is no character of its own is shown as one U+FFFD, and two bytes may make one character.
        assert re.fullmatch(r"A.{1,3}bc d.\.", text, re.DOTALL)


def test_holes_keep_rules_and_find_their_length(trained):
    out, _ = run(
        "sample", f"--workdir={trained.workdir}", "--template=in [[1-4:/a+b/]].", "--length_draws=2", "--lengths"
    )
    answer = last_line(out)
    assert all(re.fullmatch(r"in a{1,3}b\.", text) for text in answer["samples"])
    (about,) = answer["templates"]
    assert [row["holes"] for row in about["lengths"]] == [[2], [3], [4]]
    assert out.startswith(f"[2] tokens: {about['lengths'][0]['probability']:.4f} +- ")
    assert 0 < about["probability"] < 0.1 and sum(about["weights"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train", "config workdir init init_rows"),
        (
            "evaluate",
            "workdir data num_times num_sequences batch_size seed suite corpora output mesh prompts estimator orders",
        ),
        (
            "sample",
            "workdir num steps method grid corrector_steps corrector_size entropy_budget remask temperature "
            "top_k top_p precision label guidance batch_size prefix suffix template templates text_field output live "
            "html gif seed mesh lengths length_draws",
        ),
    ],
)
def test_help_names_every_flag(name, flags):
    out, _ = run(name, "--help", real=True)
    processes = {"coordinator", "num_processes", "process_id", "start_timeout", "heartbeat_timeout"}
    assert set(re.findall(r"^  --(?:\[no\])?(\w+):", out, re.MULTILINE)) == processes | set(flags.split())


def test_weights_that_are_not_finite_are_named_at_the_start(models, tmp_path):
    trained = load_trained(epath.Path(models / "diffusion"), log=pytest.fail)
    params, config = jax.tree.map(np.array, trained.params), trained.config
    params["blocks"]["mlp_in"]["kernel"][0, 3, 4] = np.nan
    config.data.vocab_size, config.mesh.data = trained.tokenizer.vocab_size, -1
    write_workdir(epath.Path(tmp_path / "run"), params, config, trained.tokenizer)
    with pytest.raises(TrainingError, match="step 6, weights blocks/mlp_in/kernel: 1 are NaN or infinite"):
        load_trained(epath.Path(tmp_path / "run"), log=pytest.fail)


def test_a_strong_schedule_trains_evaluates_and_samples(text, tmp_path):
    strong = {"noise__kind": "geometric", "noise__sigma_max": 1000.0, "train__steps": 2, "data__source": str(text)}
    for graph in ("absorbing", "uniform"):
        final = train_here(tmp_path / graph, graph__kind=graph, **strong)
        assert 0 < final["eval_bits_per_byte"] < 1000 and (tmp_path / graph / "samples" / "2.txt").exists()


def test_the_model_in_the_box_is_small_and_answers():
    folder = Path(__file__).parent.parent / "models" / "kjv"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    out, _ = run("sample", f"--workdir={folder}", "--template=And the king said unto [[4]].", "--num=1", "--steps=4")
    (text,) = json.loads(out.splitlines()[-1])["samples"]
    assert text.startswith("And the king said unto ") and text.endswith(".")
