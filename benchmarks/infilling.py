"""Infilling measured: held-out windows of which a part is given.

python -m benchmarks.infilling --workdirs=runs/study/absorbing,runs/study/uniform,runs/study/ar [--judge=FILE.gguf]

For each model, share and place of what is given, on the first --num windows of the validation text:
* conditional bits per hidden token (diffusion: the conditional bound, 8 noise levels per window);
* with --judge, its bits per byte of windows whose hidden part is drawn anew, and in the row `data` of the true ones;
* how often the likeliest draw for a hole of 1, 2 and 4 tokens in the middle is the true text.
The AR baseline can be given a prefix alone: its exact matches know what is left of the hole. A table on stderr, and one
JSON line.
"""

import dataclasses
import json

import jax
import numpy as np
from absl import app, flags
from etils import epath

from sedd_jax.data.packing import chunks
from sedd_jax.devices.processes import say
from sedd_jax.evaluation import perplexity, quality, results
from sedd_jax.evaluation.judging import Judge, judge_samples, load_judge
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import FREE
from sedd_jax.rates import Absorbing
from sedd_jax.training.options import EvalOptions
from sedd_jax.training.trained import Trained, load_trained
from sedd_jax.typing import Batch

SHARES = (0.25, 0.5, 0.75)
HOLES = (1, 2, 4)

flags.DEFINE_list("workdirs", None, "Of models with the same data and tokenizer.", required=True)
flags.DEFINE_string("judge", None, "See python -m sedd_jax.judge --model.")
flags.DEFINE_integer("num", 128, "Windows.", lower_bound=2)
flags.DEFINE_integer("batch_size", 32, "Windows per network call.", lower_bound=1)
flags.DEFINE_integer("steps", 128, "Reverse steps of the draws for the judge.", lower_bound=1)

COLUMNS: results.Columns = {
    "model": lambda line: line["model"],
    "given": lambda line: line["given"],
    "bits per hidden token": results.number("bits", ".3f"),
    "judge's bits per byte": results.number("judged", ".3f"),
} | {f"hole of {n} matched, %": results.number(f"match_{n}", ".1f") for n in HOLES}
EMPTY = dict.fromkeys(("bits", "judged", *(f"match_{n}" for n in HOLES)))


def given(place: str, share: float, shape: tuple[int, int]) -> np.ndarray:
    """[B, L], where a window is given: a share of it as prefix, at both ends, or at scattered positions."""
    length, rng = shape[1], np.random.default_rng(0)
    num, number = round(share * length), np.arange(length)
    if place == "scattered":
        return rng.permuted(np.broadcast_to(number < num, shape), axis=1)
    left = num if place == "prefix" else num // 2
    return np.broadcast_to((number < left) | (number >= length - num + left), shape)


def draws(trained: Trained, windows: np.ndarray, known: np.ndarray, steps: int, **options) -> np.ndarray:
    options = dataclasses.replace(trained.experiment.sampling, **options)
    generator = Generator(trained, options, flags.FLAGS.batch_size)
    return generator.generate(np.where(known, windows, FREE), steps=steps, seed=0).tokens


def judged(judge: Judge | None, trained: Trained, windows: np.ndarray) -> dict[str, float]:
    if judge is None:
        return {}
    texts = list(map(trained.tokenizer.decode, windows.tolist()))
    found = judge_samples(judge, texts, flags.FLAGS.batch_size)
    scale = found["tokens_judged"] / sum(len(text.encode()) for text in texts) / np.log(2)
    return {f"judged{end}": found[f"nats_per_token{end}"] * scale for end in ("", "_stderr")}


def measure(trained: Trained, name: str, windows: np.ndarray, judge: Judge | None) -> list[dict]:
    options = EvalOptions(num_times=8, batch_size=flags.FLAGS.batch_size)
    causal, table = trained.experiment.model.causal, []
    for place in ("prefix",) if causal else ("prefix", "ends", "scattered"):
        for share in SHARES:
            known = given(place, share, windows.shape)
            batch = Batch(windows, given=known)
            line = EMPTY | {"model": name, "given": f"{place}, {share:.0%}"}
            if causal or isinstance(trained.experiment.graph, Absorbing):  # others have no conditional bound
                nats = perplexity.bounds(trained, batch, options, seed=0, name=f"{name}, {place} {share}").total
                rate, error = quality.ratio(np.asarray(nats, np.float64), (~known).sum(1))
                line |= {"bits": rate / np.log(2), "bits_stderr": error / np.log(2)}
            filled = draws(trained, windows, known, flags.FLAGS.steps) if judge else windows
            table.append(line | judged(judge, trained, filled))
    line = EMPTY | {"model": name, "given": "left of the hole" if causal else "all but the hole"}
    for size in HOLES:
        known = np.ones(windows.shape, bool)
        start = (windows.shape[1] - size) // 2
        known[:, start : start + size] = False
        same = (draws(trained, windows, known, 1 if causal else 64, temperature=0.01) == windows).all(1)
        line |= {f"match_{size}": 100 * same.mean(), f"match_{size}_stderr": 100 * same.std(ddof=1) / len(same) ** 0.5}
    return [*table, line]


def main(_) -> None:
    values, table = flags.FLAGS, []
    judge = load_judge(values.judge, flag="judge") if values.judge else None
    for workdir in map(epath.Path, values.workdirs):
        trained = load_trained(workdir, log=say)
        stream = perplexity.validation_stream(trained, workdir, remedy="")
        windows = chunks(stream, trained.config.data.length, limit=values.num)[0]
        if not table and judge:
            table.append(EMPTY | {"model": "data", "given": "all"} | judged(judge, trained, windows))
        table += measure(trained, workdir.name, windows, judge)
    say(results.markdown(table, COLUMNS))
    print(json.dumps({"num": len(windows), "device": jax.devices()[0].device_kind, "table": table}))


if __name__ == "__main__":
    app.run(main)
