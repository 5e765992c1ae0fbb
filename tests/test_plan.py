"""The plan of a topology: bounds that no program is below, and a choice as good as its neighbours."""

import importlib.util
import json
import random

import pytest
from running import SMALL, run

from sedd_jax import cli
from sedd_jax.aot import plan
from sedd_jax.aot.plan import Choice

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot; Linux on x86-64 only)"
)
FIELDS = {
    "objective": "ar",
    "model.num_heads": 1,
    "model.num_layers": 2,
    "model.dropout": 0.0,
    "train.batch_size": 4,
}  # quick to compile
TINY = [f"--config.{name}={value}" for name, value in (SMALL | FIELDS).items()]
COMMAND = ["--plan", "--config=configs/baseline.py", *TINY, "--vocab_size=256", "--topology=v5e:2x2"]


def read(overrides):
    return cli.read_config("configs/baseline.py", [*TINY, *overrides])


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    output = tmp_path_factory.mktemp("plan") / "kept"
    command = [*COMMAND, "--price=v5e:1.5", f"--output={output}"]
    return output, command, *run("compile", *command, real=True)


def kept(output):
    """The figures of every choice that was compiled."""
    for path in (output / "points").iterdir():
        fsdp, tensor, microbatches, remat = path.stem.split("-")[-4:]
        yield Choice(int(fsdp), int(tensor), int(microbatches), remat), json.loads(path.read_text())


def test_no_program_is_faster_or_smaller_than_its_bound(planned):
    least = plan.space(read, "v5e:2x2", 1, 256)
    found = dict(kept(planned[0]))
    assert {choice.remat for choice in found} == {"none", "dots", "blocks"}
    for choice, figures in found.items():
        held = figures["bytes_per_chip"]
        assert least[choice] <= figures["roofline"]["step_seconds_serial"]
        assert held["params"] + held["ema"] + held["moments"] <= held["total"]


def test_the_plan_says_what_to_append_and_what_it_takes(planned):
    output, _, out, err = planned
    lines = json.loads(out.splitlines()[-1])["plans"]["v5e:2x2"]
    seconds = sorted(figures["roofline"]["step_seconds_serial"] for _, figures in kept(output))
    assert [line["ms_serial"] / 1e3 for line in lines] == pytest.approx(seconds)
    best = lines[0]
    assert best["fits"] and best["hours"] == pytest.approx(6 * seconds[0] / 3600)
    assert best["tokens_per_second"] == pytest.approx(4 * 32 / seconds[0])
    assert best["cost"] == pytest.approx(1.5 * 4 * best["hours"])
    assert f"| {best['overrides']} | True | " in err
    assert f"compiled {len(lines)} of " in err and "assumed: " in err


def test_what_was_compiled_is_not_compiled_again(planned):
    _, command, out, _ = planned
    again, err = run("compile", *command)
    assert again == out
    assert err.count(": done already") == len(json.loads(out.splitlines()[-1])["plans"]["v5e:2x2"])
    _, err = run("compile", *command, "--config.model.dropout=0.2", expect=2)
    assert "is of a run whose model.dropout is 0.0 and not 0.2" in err


@pytest.mark.parametrize("seed", range(5))
def test_no_neighbour_of_the_choice_is_faster(seed):
    """With the times of all choices known, and some that do not fit."""
    draw = random.Random(seed)
    space = [
        Choice(f, t, m, r) for f in (1, 2, 4) for t in (1, 2) for m in (1, 2, 4) for r in ("none", "dots", "blocks")
    ]
    least = {choice: draw.uniform(1, 2) for choice in space}
    times = {choice: least[choice] * draw.uniform(1, 2) for choice in space if draw.random() < 0.7}
    asked = []

    def entry(name, make):
        *numbers, remat = name.split("-")[-4:]
        asked.append(choice := Choice(*map(int, numbers), remat))
        seconds = times.get(choice)
        roof = {"step_seconds": seconds, "step_seconds_serial": seconds}
        return {"fits": seconds is not None, "headroom": 0.0, "roofline": roof}

    lines = plan.plan(read, least, entry, None, topology="v5e:2x2", num_slices=1, vocab_size=256)
    best = min((choice for choice in asked if choice in times), key=times.get)
    assert lines[0]["fits"] and lines[0]["ms_serial"] == pytest.approx(1e3 * times[best])
    assert all(times[choice] >= times[best] for choice in times if choice.is_neighbour(best))
    assert len(asked) == len(set(asked)) == len(lines) < len(space)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--topology=v5e:2x2,nonsense"], "--topology=nonsense is not known"),
        (["--price=v5e:cheap"], "--price=v5e:cheap"),
        (["--price=v6e:1"], "--price=v6e:1: give a price of each version in --topology"),
        (["--what=train"], "leave --what=train out"),
        (["--config.train.batch_size=3"], "no mesh divides train.batch_size=3"),
        (["--noplan"], "--output belongs to --plan"),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments, named, tmp_path):
    _, err = run("compile", *COMMAND, f"--output={tmp_path}", *arguments, expect=2)
    assert named in err.splitlines()[-1]


def test_several_topologies_are_for_a_plan():
    _, err = run("compile", *COMMAND, "--noplan", "--topology=v5e:2x2,v5e:4x4", expect=2)
    assert "--topology=v5e:2x2,v5e:4x4 is not known" in err
    assert (
        "--topology is missing"
        in run("compile", "--plan", "--config=configs/baseline.py", "--vocab_size=9", expect=2)[1]
    )
