"""What quality costs: python -m sedd_jax.frontier --workdir=DIR [--methods=LIST --steps=LIST --temperatures=LIST]

Draws --num texts by each method, with each number of steps, at each temperature, and says how likely a judge finds them
(--judge: the workdir of an autoregressive twin, or a GPT-2), how diverse they are, and what they cost. Without a judge
the figure is the model's own bound: it tells how much the model likes its samples, and nothing of the data.
Leaves results.{json,csv,md,png} in --output and every point with its texts in points/. The same command goes on where
it stopped, and a longer list adds its points to those that are there.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Int
from tqdm import tqdm

from sedd_jax import cli
from sedd_jax.config import build
from sedd_jax.data import dataset
from sedd_jax.data.packing import chunks
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.evaluation import perplexity, quality, tables
from sedd_jax.evaluation.judging import judge_samples, load_judge
from sedd_jax.evaluation.ledger import Ledger
from sedd_jax.generation.generate import Drawing
from sedd_jax.generation.templates import FREE
from sedd_jax.training.experiment import SamplingOptions, Trained, load_trained

# Tokens [B, L] -> how likely and how diverse they are.
Measure = Callable[[Int[np.ndarray, "b l"]], dict[str, Any]]

FIGURES = (
    "bits_per_token",
    "bits_per_token_stderr",
    "generative_perplexity",
    "generative_perplexity_stderr",
    *(
        name + end
        for name in ("unigram_entropy", *(f"distinct_{n}" for n in quality.N_GRAMS))
        for end in ("", "_stderr")
    ),
)
COSTS = ("network_evaluations", "seconds", "clipped_fraction")
# What stands for a method in the row of the data.
DATA = "data"

cli.define_workdir("Directory of a trained diffusion model.")
flags.DEFINE_list("methods", ["analytic"], "METHOD or METHOD:GRID, as in analytic,analytic:cosine,first_hitting.")
flags.DEFINE_list("steps", ["8", "16", "32", "64", "128"], "Numbers of reverse steps.")
flags.DEFINE_list("temperatures", ["1"], "Below 1 narrows the distribution, a bias.")
flags.DEFINE_integer("num", 16, "Texts per point.", lower_bound=1)
flags.DEFINE_integer("batch_size", 16, "Texts per network call; the texts do not depend on it.", lower_bound=1)
flags.DEFINE_string("judge", None, "Folder or hub id of a GPT-2, or the workdir of an autoregressive twin.")
flags.DEFINE_string("tokenizer_path", None, "Folder of GPT-2's vocabulary; by default that of --judge.")
flags.DEFINE_integer("num_times", 128, "Noise levels per text for the bound, where there is no judge.", lower_bound=2)
flags.DEFINE_bool("data", False, "A row for as many sequences of the validation text, by the same measure.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_string("output", None, "Directory of the results; by default frontier/ in --workdir.")


@dataclasses.dataclass(frozen=True)
class Point:
    """options: the sampler, its number of steps among them."""

    options: SamplingOptions

    @property
    def name(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.fields.values())

    @property
    def fields(self) -> dict[str, Any]:
        return {field: getattr(self.options, field) for field in ("method", "grid", "temperature", "steps")}


def parse_points(
    methods: Iterable[str], temperatures: Iterable[str], steps: Iterable[str], defaults: SamplingOptions
) -> list[Point]:
    """Each method at each temperature with each number of steps, the steps running fastest; what is named twice, once.

    Raises InputError for what no sampler can be.
    """
    numbers = [_number("steps", value, int) for value in dict.fromkeys(steps)]
    warmth = [_number("temperatures", value, float) for value in dict.fromkeys(temperatures)]
    points = []
    for method, temperature, count in itertools.product(dict.fromkeys(methods), warmth, numbers):
        name, _, grid = method.partition(":")
        given = {"method": name, "grid": grid or "uniform", "temperature": temperature, "steps": count}
        points.append(Point(dataclasses.replace(defaults, **given)))
    if not points:
        raise InputError("--methods, --temperatures and --steps must each name at least one")
    return points


def _number(flag: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"--{flag}: {text!r} is not a number") from error


def make_measure(trained: Trained, values: flags.FlagValues) -> Measure:
    """By the judge, in its tokens, or by the bound, in the model's. Raises InputError as `load_judge` does."""
    if values.judge is not None:
        judge = load_judge(values.judge, values.tokenizer_path, flag="judge")
        decode = trained.tokenizer.decode
        return lambda tokens: judge_samples(judge, [decode(row) for row in tokens.tolist()], values.batch_size)

    def measure(tokens):
        bounds = perplexity.of_rows(
            trained, tokens, num_times=values.num_times, batch_size=values.batch_size, seed=values.seed
        )
        counts = np.full(len(tokens), tokens.shape[1])
        return quality.perplexity(bounds.total, counts) | quality.diversity(list(tokens))

    return measure


def as_row(fields: dict[str, Any], measured: dict[str, Any], costs: dict[str, Any]) -> dict[str, Any]:
    bits = {f"bits_per_token{end}": measured[f"nats_per_token{end}"] / np.log(2) for end in ("", "_stderr")}
    known = measured | bits | costs
    return cli.plain(fields | {name: known.get(name) for name in (*FIGURES, *COSTS)})


def markdown(table: Sequence[dict[str, Any]]) -> str:
    def figure(row: dict[str, Any], name: str, form: str) -> str:
        value, error = row[name], row.get(f"{name}_stderr")
        return "" if value is None else format(value, form) + ("" if error is None else f" ± {error:{form}}")

    head = ["sampler", "temperature", "steps", "calls", "seconds", "bits per token", "unigram entropy", "distinct-2"]
    lines = []
    for row in table:
        sampler = " ".join(filter(None, (row["method"], row["grid"])))
        plain = [sampler, *("" if row[name] is None else f"{row[name]:g}" for name in ("temperature", "steps"))]
        costs = [figure(row, "network_evaluations", "d"), figure(row, "seconds", ".1f")]
        measured = [figure(row, "bits_per_token", ".3f"), figure(row, "unigram_entropy", ".3f")]
        lines.append([*plain, *costs, *measured, figure(row, "distinct_2", ".3f")])
    return tables.as_markdown(head, lines)


def plot(path: epath.Path, table: Sequence[dict[str, Any]], measured_by: str) -> None:
    """Bits per token against entropy: a line per sampler and temperature, a mark per number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    page, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for (method, grid, temperature), group in itertools.groupby(
        table, lambda row: (row["method"], row["grid"], row["temperature"])
    ):
        rows = [row for row in group if row["bits_per_token"] is not None]
        if not rows:
            continue
        if method == DATA:
            axes.plot(rows[0]["unigram_entropy"], rows[0]["bits_per_token"], "k*", markersize=12, label=DATA)
            continue
        spots = [(row["unigram_entropy"], row["bits_per_token"]) for row in rows]
        name = f"{method} {grid}" + ("" if temperature == 1 else f", temperature {temperature:g}")
        axes.plot(*zip(*spots, strict=True), marker="o", markersize=4, linewidth=1, label=name)
        for spot, row in zip(spots, rows, strict=True):
            axes.annotate(f"{row['steps']}", spot, xytext=(3, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel="unigram entropy of a text, nats", ylabel=f"bits per token, by {measured_by}")
    axes.grid(alpha=0.3)
    page.legend(loc="outside lower center", fontsize="small", ncols=2)
    with path.open("wb") as file:
        page.savefig(file, format="png", dpi=130)
    pyplot.close(page)


def main() -> dict[str, Any]:
    values, workdir = flags.FLAGS, cli.workdir()
    output = epath.Path(values.output) if values.output else workdir / "frontier"
    trained = load_trained(workdir, log=say)
    experiment, length = trained.experiment, trained.config.data.length
    if experiment.model.causal:
        raise InputError(
            f"--workdir={workdir} holds an autoregressive model, which takes one step per token: no choice"
        )
    asked = parse_points(values.methods, values.temperatures, values.steps, experiment.sampling)
    for point in asked:
        point.options.check(experiment.graph, point.options.steps)
    if values.data and "source" not in trained.config.data:
        raise InputError(f"--data: --workdir={workdir} has converted weights, without their corpus")
    measure = make_measure(trained, values)
    # What the points have in common; the config's other sampling options among it.
    options = dataclasses.asdict(experiment.sampling).items() - asked[0].fields.items()
    setting = {"weights": trained.fingerprint, "judge": values.judge, "num": values.num, "seed": values.seed}
    setting |= {name: value for name, value in sorted(options) if name not in {*asked[0].fields, "num", "rows"}}
    ledger = Ledger(output, setting if values.judge else setting | {"num_times": values.num_times})
    drawings: dict[SamplingOptions, Drawing] = {}

    def draw(point: Point) -> dict[str, Any]:
        # The number of steps is traced: points that differ in it alone are one program.
        alike = dataclasses.replace(point.options, steps=1)
        drawing = drawings.setdefault(alike, Drawing(trained, point.options, values.batch_size))
        drawn = drawing.draw(np.full((values.num, length), FREE), steps=point.options.steps, seed=values.seed)
        costs = dict(zip(COSTS, (drawn.calls, drawn.seconds, drawn.clipped), strict=True))
        texts = [trained.tokenizer.decode(row) for row in drawn.tokens.tolist()]
        return {"row": as_row(point.fields, measure(drawn.tokens), costs), "texts": texts}

    def real() -> dict[str, Any]:
        stream = build(dataset.load, "data", trained.config, directory=workdir).valid
        rows, _ = chunks(stream, length, limit=values.num)
        fields = dict.fromkeys(asked[0].fields) | {"method": DATA}
        return {
            "row": as_row(fields, measure(rows), {}),
            "texts": [trained.tokenizer.decode(row) for row in rows.tolist()],
        }

    table = [ledger.entry(DATA, real)["row"]] if values.data else []
    for point in tqdm(asked, desc="frontier", unit="point", file=sys.stderr):
        table.append(ledger.entry(point.name, lambda point=point: draw(point))["row"])
    measured_by = "the model's own bound" if values.judge is None else f"the judge {epath.Path(values.judge).name}"
    text = markdown(table)
    tables.write_table(output, table, text)
    plot(output / "results.png", table, measured_by)
    say(text)
    return {"points": table, "measured_by": measured_by, "output": str(output)}


if __name__ == "__main__":
    cli.run(main)
