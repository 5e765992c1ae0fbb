"""Quality of samples against their cost: python -m sedd_jax.frontier --workdir=DIR [--methods=.. --steps=.. ...]

Generates --num texts by each of --methods, with each number of --steps, at each of --temperatures, and reports how
likely a judge finds them (--judge: a GPT-2, a GGUF file, or the workdir of an AR baseline), how diverse they are, and
what they cost; with --references also MAUVE. Without a judge, the figure is the model's own bound: how likely the model
finds its samples. That says nothing about the data. Writes results.{json,csv,md,png} into --output, and every point
with its texts into points/ there. The same command continues where it stopped, and longer lists add points."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from sedd_jax import cli, files
from sedd_jax.data.packing import chunks
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError, explained
from sedd_jax.evaluation import perplexity, quality, results
from sedd_jax.evaluation.judging import judge_samples, load_judge, make_mauve, read_samples
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import FREE
from sedd_jax.training.options import MOST, EvalOptions, SamplingOptions
from sedd_jax.training.trained import Trained, load_trained
from sedd_jax.typing import TokenRows

FIELDS = ("method", "grid", "temperature", "steps")  # a point: one setting of these options
FIGURES = ("bits_per_token", "generative_perplexity", "unigram_entropy", *(f"distinct_{n}" for n in quality.N_GRAMS))
COSTS = ("network_evaluations", "seconds", "clipped_fraction")
DATA = "data"  # the method in the line of the validation text
COLUMNS: results.Columns = {
    "sampler": lambda line: " ".join(filter(None, (line["method"], line["grid"]))),
    "temperature": results.number("temperature", "g"),
    "steps": results.number("steps", "g"),
    "calls": results.number("network_evaluations", "d"),
    "seconds": results.number("seconds", ".1f"),
    "bits per token": results.number("bits_per_token", ".3f"),
    "unigram entropy": results.number("unigram_entropy", ".3f"),
    "distinct-2": results.number("distinct_2", ".3f"),
}

cli.define_model("Directory of a trained diffusion model.")
flags.DEFINE_list("methods", ["analytic"], "METHOD or METHOD:GRID, as in analytic,analytic:cosine,first_hitting.")
flags.DEFINE_list("steps", ["8", "16", "32", "64", "128"], "Numbers of reverse steps.")
flags.DEFINE_list("temperatures", ["1"], "Below 1 narrows the distribution, a bias.")
flags.DEFINE_integer("num", 16, "Texts per point.", lower_bound=1, upper_bound=MOST)
flags.DEFINE_integer("batch_size", 16, "Texts per network call; the texts do not depend on it.", lower_bound=1)
cli.define_path("judge", "Folder or hub id of a GPT-2, a GGUF file, or the workdir of an AR baseline.")
cli.define_path("tokenizer_path", "Folder of GPT-2's vocabulary; by default that of --judge.")
cli.define_path("references", "File of real texts, JSON lines with a field 'text', for MAUVE by the --judge.")
flags.DEFINE_integer("num_times", 128, "Of noise per text for the bound.", lower_bound=2, upper_bound=MOST)
flags.DEFINE_bool("data", False, "Adds a line for as many sequences of the validation text, by the same measure.")
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**32 - 1)
cli.define_path("output", "Directory of the results; by default frontier/ in --workdir.")


def parse_points(values: flags.FlagValues, defaults: SamplingOptions) -> list[SamplingOptions]:
    """Each method at each temperature with each number of steps, the steps running fastest, without repetitions."""
    points = []
    for method, temperature, steps in itertools.product(values.methods, values.temperatures, values.steps):
        name, _, grid = method.partition(":")
        with explained("--temperatures and --steps must be numbers", "give numbers", ValueError):
            numbers = {"temperature": float(temperature), "steps": int(steps)}
        points.append(dataclasses.replace(defaults, method=name, grid=grid or "uniform", **numbers))
    if not points:
        raise InputError("--methods, --temperatures and --steps must each name at least one")
    return list(dict.fromkeys(points))


def make_measure(trained: Trained, values: flags.FlagValues) -> Callable[[TokenRows], dict[str, Any]]:
    """Tokens [B, L] -> how likely and how diverse they are: by the judge or the bound, in its tokens."""
    if values.judge is not None:
        judge = load_judge(values.judge, values.tokenizer_path, flag="judge", mesh=values.mesh)
        references = values.references and read_samples(epath.Path(values.references), flag="references")
        mauve = make_mauve(judge, references, values.batch_size) if references else lambda texts: {}

        def judged(tokens):
            texts = list(map(trained.tokenizer.decode, tokens.tolist()))
            return judge_samples(judge, texts, values.batch_size) | mauve(texts)

        return judged
    if values.references:
        raise InputError(f"--references={values.references} needs a --judge, whose hidden states MAUVE takes")
    options = EvalOptions(num_times=values.num_times, batch_size=min(values.batch_size, values.num))

    def measure(tokens):
        nats = perplexity.bounds(trained, tokens, options, seed=values.seed, name="samples").total
        return quality.perplexity(nats, np.full(len(tokens), tokens.shape[1])) | quality.diversity(list(tokens))

    return measure


def plot(path: epath.Path, table: Sequence[dict[str, Any]], measured_by: str) -> None:
    """Bits per token against entropy: a line per sampler and temperature, a mark per number of steps."""
    with files.plot(path, size=(7.0, 5.0), dpi=130) as (page, axes):
        for (method, grid, temperature), group in itertools.groupby(table, lambda line: [line[f] for f in FIELDS[:3]]):
            lines = [line for line in group if line["bits_per_token"] is not None]
            spots = [(line["unigram_entropy"], line["bits_per_token"]) for line in lines]
            if spots and method == DATA:
                axes.plot(*spots[0], "k*", markersize=12, label=DATA)
            elif spots:
                name = f"{method} {grid}" + ("" if temperature == 1 else f", temperature {temperature:g}")
                axes.plot(*zip(*spots, strict=True), marker="o", markersize=4, linewidth=1, label=name)
                for spot, line in zip(spots, lines, strict=True):
                    axes.annotate(f"{line['steps']}", spot, xytext=(3, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel="unigram entropy of a text, nats", ylabel=f"bits per token, by {measured_by}")
        page.legend(loc="outside lower center", fontsize="small", ncols=2)


def main() -> dict[str, Any]:
    values, workdir = flags.FLAGS, cli.path()
    output = epath.Path(values.output) if values.output else workdir / "frontier"
    trained = load_trained(workdir, log=say, mesh=values.mesh)
    experiment, length = trained.experiment, trained.length
    if experiment.model.causal:
        raise InputError(f"--workdir={workdir} holds an autoregressive model; give that of a diffusion model")
    points = parse_points(values, experiment.sampling)
    for options in points:
        options.check(experiment.graph, options.steps)
    measure = make_measure(trained, values)
    shared = sorted(dataclasses.asdict(experiment.sampling).items())  # a part of the setting
    setting = {"weights": trained.fingerprint} | {name: values[name].value for name in ("judge", "num", "seed")}
    setting["references"], more = values.references, ["mauve"] if values.references else []
    setting |= {name: value for name, value in shared if name not in (*FIELDS, "num", "rows")}
    setting |= {} if values.judge else {"num_times": values.num_times}
    generators: dict[SamplingOptions, Generator] = {}

    def compute(options: SamplingOptions | None, fields: dict[str, Any]) -> dict[str, Any]:
        if options is None:
            stream = perplexity.validation_stream(trained, workdir, remedy="leave --data out")
            tokens, costs = chunks(stream, length, limit=values.num)[0], {}
        else:
            alike = dataclasses.replace(options, steps=1)  # traced: points that differ in it alone share a program
            generator = generators.setdefault(alike, Generator(trained, options, values.batch_size))
            found = generator.generate(np.full((values.num, length), FREE), steps=options.steps, seed=values.seed)
            tokens, costs = found.tokens, dict(zip(COSTS, (found.calls, found.seconds, found.clipped), strict=True))
        figures, measured = measure(tokens) | costs, [name + end for name in FIGURES for end in ("", "_stderr")]
        figures |= {f"bits_per_token{end}": figures[f"nats_per_token{end}"] / np.log(2) for end in ("", "_stderr")}
        line = fields | {name: figures.get(name) for name in (*measured, *more, *COSTS)}
        return {"row": cli.to_json(line), "texts": [trained.tokenizer.decode(ids) for ids in tokens.tolist()]}

    measured_by = "the model's own bound" if values.judge is None else f"the judge {epath.Path(values.judge).name}"
    with results.hold(output, setting) as held:
        table = []  # options that are None stand for the validation text
        for options in tqdm(([None] if values.data else []) + points, desc="frontier", unit="point"):
            fields = {field: getattr(options, field, None) for field in FIELDS} | ({} if options else {"method": DATA})
            parts = [value for value in fields.values() if value is not None]
            name = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in parts)
            table.append(held.entry(name, partial(compute, options, fields))["row"])
        text = results.markdown(table, COLUMNS | {name.upper(): results.number(name, ".3f") for name in more})
        results.write(output, table, text)
        plot(output / "results.png", table, measured_by)
    say(text)
    return {"points": table, "measured_by": measured_by, "output": str(output)}


if __name__ == "__main__":
    cli.run(main)
