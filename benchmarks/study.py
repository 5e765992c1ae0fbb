"""Samples of the study's three models by one judge: python -m benchmarks.study --judge=FILE.gguf [--runs=runs/study]

Quality against entropy of samplers, steps, temperatures and precisions, on one page: the diffusion models of
configs/study.py, the AR baseline (ancestral, and nucleus with top_p=0.9), and the validation text. --num texts of a
window per point. Writes results.{json,csv,md,png} into --output; the same command continues where it stopped.
"""

import dataclasses
import functools
import itertools
import json
from functools import partial

import numpy as np
from absl import app, flags
from etils import epath
from tqdm import tqdm

from sedd_jax import files
from sedd_jax.data.packing import chunks
from sedd_jax.devices.processes import say
from sedd_jax.evaluation import perplexity, results
from sedd_jax.evaluation.judging import judge_samples, load_judge
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import FREE
from sedd_jax.training.trained import load_trained

flags.DEFINE_string("runs", "runs/study", "Folder of the workdirs absorbing, uniform and ar.")
flags.DEFINE_string("judge", None, "See python -m sedd_jax.judge --model.", required=True)
flags.DEFINE_integer("num", 64, "Texts per point.", lower_bound=2)
flags.DEFINE_integer("batch_size", 32, "Texts per network call.", lower_bound=1)
flags.DEFINE_string("output", "runs/study/frontier", "Directory of the results.")

FEW, MOST = (8, 64), (4, 8, 16, 32, 64, 128, 256, 1024)
# Model, the options of its sampler, numbers of steps.
CURVES = [
    ("absorbing", {}, MOST),
    ("absorbing", {"temperature": 0.8}, (*FEW, 256)),
    ("absorbing", {"method": "first_hitting"}, (8, 32, 128)),
    ("absorbing", {"method": "confidence"}, (8, 32, 128)),
    ("absorbing", {"precision": "reference"}, (*FEW, 1024)),
    ("ar", {}, (1,)),
    ("ar", {"top_p": 0.9}, (1,)),
    ("uniform", {}, (*FEW, 256)),
]
COLUMNS: results.Columns = {
    "model": lambda line: line["model"],
    "sampler": lambda line: line["sampler"],
    "steps": results.number("steps", "d"),
    "calls": results.number("calls", "d"),
    "seconds": results.number("seconds", ".1f"),
    "judge's bits per token": results.number("bits_per_token", ".3f"),
    "unigram entropy": results.number("unigram_entropy", ".3f"),
    "distinct-2": results.number("distinct_2", ".3f"),
}


def plot(path: epath.Path, table: list[dict]) -> None:
    """The judge's bits per token against entropy: a line per curve, a mark per number of steps."""
    with files.plot(path, size=(7.5, 5.5), dpi=130) as (page, axes):
        for (model, sampler), group in itertools.groupby(table, lambda line: (line["model"], line["sampler"])):
            lines = list(group)
            x, y = ([line[name] for line in lines] for name in ("unigram_entropy", "bits_per_token"))
            errors = [line["bits_per_token_stderr"] for line in lines]
            marker = {"data": "*", "ar": "s"}.get(model, "o")
            axes.errorbar(x, y, yerr=errors, marker=marker, markersize=5, linewidth=1, label=f"{model} {sampler}")
            for line, spot in zip(lines, zip(x, y, strict=True), strict=True):
                if line["steps"] and model != "ar":
                    axes.annotate(f"{line['steps']}", spot, xytext=(3, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel="unigram entropy of a text, nats", ylabel="bits per token, by the judge")
        axes.grid(alpha=0.3)
        page.legend(loc="outside lower center", fontsize="small", ncols=3)


def main(_) -> None:
    values = flags.FLAGS
    runs, output = epath.Path(values.runs), epath.Path(values.output)
    load = functools.cache(lambda model: load_trained(runs / model, log=say))
    judge, length = load_judge(values.judge, flag="judge"), load("ar").config.data.length

    def figures(tokens: np.ndarray, tokenizer, fields: dict) -> dict:
        found = judge_samples(judge, list(map(tokenizer.decode, tokens.tolist())), values.batch_size)
        bits = {f"bits_per_token{end}": found[f"nats_per_token{end}"] / np.log(2) for end in ("", "_stderr")}
        kept = ("unigram_entropy", "unigram_entropy_stderr", "distinct_2", "distinct_2_stderr")
        return fields | bits | {name: found[name] for name in kept}

    def data() -> dict:
        stream = perplexity.validation_stream(load("ar"), runs / "ar", remedy="")
        fields = {"model": "data", "sampler": "", "steps": None, "calls": None, "seconds": None}
        return figures(chunks(stream, length, limit=values.num)[0], load("ar").tokenizer, fields)

    def point(model: str, generator: Generator, sampler: str, steps: int) -> dict:
        generated = generator.generate(np.full((values.num, length), FREE), steps=steps, seed=0)
        fields = {"model": model, "sampler": sampler, "steps": steps, "calls": generated.calls}
        return figures(generated.tokens, generator.trained.tokenizer, fields | {"seconds": generated.seconds})

    with results.hold(output, {"judge": values.judge, "num": values.num}) as held:
        table = [held.entry("data", data)]
        for model, options, all_steps in tqdm(CURVES, desc="study", unit="curve"):
            sampler = ", ".join(
                f"{value}" if name == "method" else f"{name} {value}" for name, value in options.items()
            )
            run = load(model)
            generator = Generator(run, dataclasses.replace(run.experiment.sampling, **options), values.batch_size)
            for steps in all_steps:
                name = "-".join([model, run.fingerprint[:8], *map(str, options.values()), str(steps)])
                table.append(held.entry(name, partial(point, model, generator, sampler, steps)))
        text = results.markdown(table, COLUMNS)
        results.write(output, table, text)
        plot(output / "results.png", table)
    say(text)
    print(json.dumps({"output": str(output), "points": len(table)}))


if __name__ == "__main__":
    app.run(main)
