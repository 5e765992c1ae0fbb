"""Text from a trained model: python -m sedd_jax.sample --workdir=DIR [--prefix=.. --suffix=..] [--template=..]

Any positions can be given: text at the start (--prefix), at the end (--suffix), or anywhere (--template, where [[12]]
stands for 12 tokens to fill, and [[~5]] for as many as about 5 words take). The model always fills a window of the
length it was trained with, so that what it sees is what it knows; of a template's window, the part behind the template
is drawn too, and cut off. --templates=FILE fills each of its templates --num times.
The autoregressive twin (objective 'ar') writes from left to right, so it can be given a prefix alone.
Texts go to stdout, then one JSON line; with --output also to a file for `python -m sedd_jax.judge`.
--live shows on stderr how the texts come about; --html and --gif keep that.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from sedd_jax import cli, sampling
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.devices import processes
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.files import write_atomically
from sedd_jax.generation import gif, page, terminal
from sedd_jax.generation.film import Film, Frame, Script
from sedd_jax.generation.generate import Drawing, Drawn
from sedd_jax.generation.templates import Window, parse_template, parse_window, read_templates
from sedd_jax.training.experiment import SamplingOptions, load_trained

cli.define_workdir("Directory of a trained model.")
cli.define_processes()
flags.DEFINE_integer("num", None, "How many texts; by default sampling.num of the run's config.")
flags.DEFINE_integer("steps", None, "Reverse steps; by default sampling.steps of the config.")
flags.DEFINE_string("method", None, f"One of {', '.join(sampling.METHODS)}; by default sampling.method of the config.")
flags.DEFINE_string("grid", None, f"Of the times: one of {', '.join(sampling.grids.GRIDS)}; by default of the config.")
flags.DEFINE_integer("corrector_steps", None, "Corrector steps after each step; by default of the config.")
flags.DEFINE_float("corrector_size", None, "How far they go, in parts of the step; by default of the config.")
flags.DEFINE_float("temperature", None, "Below 1 narrows the distribution, a bias; by default of the config.")
flags.DEFINE_integer("top_k", None, "Only the k likeliest tokens, a bias; 0 for all; by default of the config.")
flags.DEFINE_float(
    "top_p", None, "Only the likeliest tokens of this mass, a bias; 1 for all; by default of the config."
)
flags.DEFINE_string("precision", None, "'exact', or 'reference' for draws that cut off rare tokens as in PyTorch SEDD.")
flags.DEFINE_integer("batch_size", 64, "Texts at a time; the texts do not depend on it.", lower_bound=1)
flags.DEFINE_string("prefix", None, "Text that the window starts with.")
flags.DEFINE_string("suffix", None, "Text that the window ends with.")
flags.DEFINE_string("template", None, "Text with holes: [[12]] is 12 tokens to fill, [[~5]] about 5 words.")
flags.DEFINE_string("templates", None, "File with a template per line, or with a record per line (.jsonl).")
flags.DEFINE_string("text_field", "text", "Field of a .jsonl record that holds the template.")
flags.DEFINE_string("output", None, "File for the texts, one JSON object with a field 'text' per line.")
flags.DEFINE_bool("live", False, "Show on stderr how the texts come about.")
flags.DEFINE_string("html", None, "File for an animated page of how the texts come about.")
flags.DEFINE_string("gif", None, "File for an animated GIF of how the first texts come about.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=2**32 - 1)


def asked_windows(values: flags.FlagValues, length: int, tokenizer: Tokenizer) -> list[tuple[str | None, Window]]:
    """Templates, None for what is none, each with its window."""
    if values.templates is None:
        given = {name: values[name].value for name in ("prefix", "suffix", "template")}
        return [(values.template, parse_window(length, tokenizer, **given))]
    for name in ("prefix", "suffix", "template"):
        if values[name].value is not None:
            raise InputError(f"--templates already says what is given; leave --{name} out")
    named = []
    for number, template in enumerate(read_templates(values.templates, values.text_field), 1):
        flag = f"--templates={values.templates}: template {number}"
        named.append((template, parse_template(template, tokenizer, length=length, flag=flag)))
    return named


def check_flags(given: Iterable[str]) -> None:
    """Raises InputError where a flag that is given says nothing to the autoregressive twin. given: their names."""
    text = ("suffix", "template", "templates", "live", "html", "gif")
    for name in {*text, "steps", "method", "grid", "corrector_steps", "corrector_size", "precision"}.intersection(
        given
    ):
        raise InputError(
            f"--{name} does not apply: the model of this --workdir is autoregressive and writes from left to right, "
            "one token per network call; it takes --prefix, --temperature, --top_k and --top_p"
        )


def sampling_options(values: flags.FlagValues, defaults: SamplingOptions) -> SamplingOptions:
    """The defaults, with what flags of the same names say."""
    given = {field.name: values[field.name].value for field in dataclasses.fields(defaults) if field.name in values}
    return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})


def output_file(name: str) -> pathlib.Path | None:
    """The value of a flag that names a file to write. Raises InputError if that cannot be."""
    value = flags.FLAGS[name].value
    if value is None:
        return None
    path = pathlib.Path(value)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--{name}={value} cannot be written; give a file in a folder that is there")
    return path


def watch(
    drawing: Drawing,
    script: Script,
    seed: int,
    title: str,
    *,
    live: bool,
    html: pathlib.Path | None,
    animated: pathlib.Path | None,
) -> Drawn:
    """Draws step by step, and shows and writes what is asked for, on the first process."""
    windows = np.stack([window.tokens for window in script.windows])
    film, shows = Film(script), list[Callable[[Frame], None]]()
    with ExitStack() as stack:
        if processes.is_leader():
            shows += [stack.enter_context(terminal.screen(script))] if live else []
            shows += [film.add] if html or animated else []
        drawn = drawing.watch(
            windows, steps=drawing.options.steps, seed=seed, show=lambda frame: [show(frame) for show in shows]
        )
    if html and processes.is_leader():
        html.write_text(page.render(film, title="Text by discrete diffusion", text=title), encoding="utf-8")
    if animated and processes.is_leader():
        gif.write(film, animated)
    return drawn


def main() -> dict[str, Any]:
    values = flags.FLAGS
    output, html, animated = map(output_file, ("output", "html", "gif"))
    trained = load_trained(cli.workdir(), log=say)
    causal = trained.experiment.model.causal
    if causal:
        check_flags(name for name in values if values[name].value not in (None, False))
    options = sampling_options(values, trained.experiment.sampling)
    if not causal:
        options.check(trained.experiment.graph, options.steps)
    named = asked_windows(values, trained.config.data.length, trained.tokenizer)
    script = Script(trained.tokenizer, [window for _, window in named for _ in range(options.num)])
    windows = np.stack([window.tokens for window in script.windows])
    how = "from left to right" if causal else f"by the method {options.method!r} in {options.steps} steps"
    title = f"{len(windows)} x {windows.shape[1]} tokens {how}"
    say(f"drawing {title}")
    drawing = Drawing(trained, options, values.batch_size)
    if values.live or html or animated:
        drawn = watch(drawing, script, values.seed, title, live=values.live, html=html, animated=animated)
    else:
        drawn = drawing.draw(windows, steps=options.steps, seed=values.seed)
    texts = [
        trained.tokenizer.decode(tokens[: window.shown])
        for tokens, window in zip(drawn.tokens.tolist(), script.windows, strict=True)
    ]
    if output and processes.is_leader():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        write_atomically(epath.Path(output), lines)
    for i, text in enumerate(texts if processes.is_leader() else ()):
        print(f"=== sample {i} ===\n{text}")
    answer = {
        "samples": texts,
        "tokens_per_second": windows.size / drawn.seconds,
        "seconds": drawn.seconds,
        "network_evaluations": drawn.calls,
        "clipped_fraction": drawn.clipped,
        "step": trained.step,
    }
    if values.template is not None or values.templates is not None:
        num = options.num
        answer["templates"] = [
            {"template": template, "holes": list(window.holes), "samples": texts[i * num : (i + 1) * num]}
            for i, (template, window) in enumerate(named)
        ]
    return answer


if __name__ == "__main__":
    cli.run(main)
