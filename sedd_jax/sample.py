"""Text from a trained model: python -m sedd_jax.sample --workdir=DIR [--prefix=.. --suffix=..] [--template=..]

Any positions can be given: text at the start (--prefix), at the end (--suffix), or anywhere (--template, where [[12]]
stands for 12 tokens to fill, [[~5]] for as many tokens as about 5 words take, [[3-12]] for a length that the model
chooses first, and [[4-9:/a|b+/]] for a text that keeps a rule, docs/constrained.md). The model always fills a window of
the length it was trained with; the part behind a template is sampled too, and cut off. --templates=FILE fills each of
its templates --num times. In a template [[eot]] is the end of a text; \\[[ and \\]] are brackets of the text itself;
\\\\[[3]] is a backslash and a hole. The AR baseline (objective 'ar') writes left to right, so it takes a prefix only.
Texts go to stdout, then one JSON line; with --output also to a file for `python -m sedd_jax.judge`."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from absl import flags

from sedd_jax import cli, sampling
from sedd_jax.devices import processes
from sedd_jax.errors import InputError
from sedd_jax.files import write_atomically
from sedd_jax.generation import infilling, rules, views
from sedd_jax.generation.generate import Generated, Generator
from sedd_jax.generation.templates import parse_windows
from sedd_jax.generation.trajectory import Frame, Trajectory
from sedd_jax.training.options import SamplingOptions
from sedd_jax.training.trained import load_trained

cli.define_model()
cli.define_processes()
flags.DEFINE_integer("num", None, "How many texts; by default sampling.num of the run's config.")
flags.DEFINE_integer("steps", None, "Reverse steps; by default sampling.steps of the config.")
flags.DEFINE_string("method", None, f"One of {', '.join(sampling.METHODS)}; by default sampling.method of the config.")
flags.DEFINE_string("grid", None, f"Of the times: one of {', '.join(sampling.GRIDS)}; by default of the config.")
flags.DEFINE_integer("corrector_steps", None, "Corrector steps after each step; by default of the config.")
flags.DEFINE_float("corrector_size", None, "Their size, as a fraction of the step; by default of the config.")
flags.DEFINE_float("entropy_budget", None, "Nats that a call of method 'entropy' may fill; by default of the config.")
flags.DEFINE_integer("remask", None, "Tokens that a call of method 'confidence' masks again; by default of the config.")
flags.DEFINE_float("temperature", None, "Below 1 narrows the distribution, a bias; by default of the config.")
flags.DEFINE_integer("top_k", None, "Only the k likeliest tokens, a bias; 0 for all; by default of the config.")
flags.DEFINE_float("top_p", None, "Only the likeliest tokens of this mass, a bias; 1 for all; by default the config's.")
flags.DEFINE_string("precision", None, "'exact', or 'reference' for draws that cut off rare tokens as in PyTorch SEDD.")
flags.DEFINE_integer("label", None, "Class of the texts, for a model with model.num_classes.")
flags.DEFINE_float("guidance", None, "Towards the class; 1 is the model as it is, above 1 favours what is typical.")
flags.DEFINE_integer("batch_size", 64, "Texts at a time; the texts do not depend on it.", lower_bound=1)
flags.DEFINE_string("prefix", None, "Text that the window starts with.")
flags.DEFINE_string("suffix", None, "Text that the window ends with.")
flags.DEFINE_string("template", None, "Text with holes: [[12]] is 12 tokens to fill, [[~5]] about 5 words; \\[[ is [[.")
flags.DEFINE_bool("lengths", False, "Print how likely each length of holes like [[3-12]] is.")
flags.DEFINE_integer("length_draws", 128, "Network calls for that, of each length.", lower_bound=2)
cli.define_path("templates", "File with a template per line, or with a record per line (.jsonl).")
flags.DEFINE_string("text_field", "text", "Field of a .jsonl record that holds the template.")
cli.define_path("output", "File for the texts, one JSON object with a field 'text' per line.", output=True)
flags.DEFINE_bool("live", False, "Show on stderr how the texts come about.")
cli.define_path("html", "File for an animated page of that.", output=True)
cli.define_path("gif", "File for an animated GIF of that, for the first texts.", output=True)
flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=2**32 - 1)

# What does not apply to the AR baseline.
DIFFUSION = {"suffix", "template", "templates", "lengths", "live", "html", "gif", "steps", "method", "grid"}
DIFFUSION |= {"precision", "corrector_steps", "corrector_size", "entropy_budget", "remask"}


def watch(generator: Generator, trajectory: Trajectory, title: str) -> Generated:
    """Samples step by step; shows and writes on the first process what the flags ask for."""
    values, shows = flags.FLAGS, list[Callable[[Frame], None]]()
    html, animated = (values[name].value if processes.is_leader() else None for name in ("html", "gif"))
    with ExitStack() as stack:
        if values.live and processes.is_leader():
            shows.append(stack.enter_context(views.screen(trajectory)))
        if html or animated:
            shows.append(trajectory.add)
        windows = np.stack([window.tokens for window in trajectory.windows])
        show = lambda frame: [show(frame) for show in shows]  # noqa: E731
        generated = generator.watch(windows, steps=generator.options.steps, seed=values.seed, show=show)
    if html:
        write_atomically(html, views.page(trajectory, title="Text by discrete diffusion", text=title))
    if animated:
        views.gif(trajectory, animated)
    return generated


def main() -> dict[str, Any]:
    values = flags.FLAGS
    trained = load_trained(cli.path(), log=processes.say, mesh=values.mesh)
    causal, tokenizer = trained.experiment.model.causal, trained.tokenizer
    for name in DIFFUSION if causal else ():
        if values[name].value not in (None, False):
            what = f"--{name} does not apply: the model of this --workdir is autoregressive, and writes left to right"
            raise InputError(f"{what}, one token per call; it takes --prefix, --temperature, --top_k and --top_p")
    fields = [field.name for field in dataclasses.fields(SamplingOptions) if field.name in values]
    options = dataclasses.replace(trained.experiment.sampling, **cli.given(*fields))
    options.check_label(trained.experiment.model.num_classes)
    given = {name: values[name].value for name in ("prefix", "suffix", "template", "templates", "text_field")}
    named = parse_windows(trained.config.data.length, tokenizer, **given)
    language = None
    if found := dict.fromkeys(rule for _, window in named for rule in window.rules if rule):
        options = options if values.method else dataclasses.replace(options, method="first_hitting")
        language = rules.language(found, tokenizer, trained.experiment.graph.vocab_size)
    if not causal:
        options.check(trained.experiment.graph, options.steps, constrained=language is not None)
    possible = [infilling.alternatives(template or "", window, tokenizer, language) for template, window in named]
    how = {"draws": values.length_draws, "seed": values.seed}
    chosen = [infilling.choose(trained, windows, options.num, **how) for windows in possible]
    each = [window for windows, _ in chosen for window in windows]
    windows = np.stack([window.tokens for window in each])
    how = "from left to right" if causal else f"by the method {options.method!r} in {options.steps} steps"
    title = f"{len(windows)} x {windows.shape[1]} tokens {how}"
    processes.say(f"sampling {title}")
    generator = Generator(trained, options, values.batch_size, language and language.constraint(each))
    if values.live or values.html or values.gif:
        generated = watch(generator, Trajectory(tokenizer, each), title)
    else:
        generated = generator.generate(windows, steps=options.steps, seed=values.seed)
    shown = zip(generated.tokens.tolist(), each, strict=True)
    texts = [tokenizer.decode(tokens[: window.shown]) for tokens, window in shown]
    num, about = options.num, list[dict[str, Any]]()
    for i, (template, window) in enumerate(named):
        part = slice(i * num, (i + 1) * num)
        about.append({"template": template, "holes": list(window.holes), "samples": texts[part]})
        if lengths := chosen[i][1]:
            about[-1]["lengths"] = lengths
        if language:
            mean, error, weights = sampling.probability(*(array[part] for array in generated.weights))
            about[-1] |= {"probability": mean, "probability_stderr": error, "weights": weights.tolist()}
    if processes.is_leader():
        if values.output:
            write_atomically(values.output, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        for row in [row for one in about for row in one.get("lengths", ()) if values.lengths]:
            print(f"{row['holes']} tokens: {row['probability']:.4f} +- {row['probability_stderr']:.4f}")
        for i, text in enumerate(texts):
            print(f"=== sample {i} ===\n{text}")
    answer = {"samples": texts, "tokens_per_second": windows.size / generated.seconds, "seconds": generated.seconds}
    answer |= {"network_evaluations": generated.calls, "clipped_fraction": generated.clipped, "step": trained.step}
    return answer | ({} if named[0][0] is None else {"templates": about})


if __name__ == "__main__":
    cli.run(main)
