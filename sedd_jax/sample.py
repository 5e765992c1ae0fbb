"""Text from a trained model: python -m sedd_jax.sample --workdir=DIR [--prefix=.. --suffix=..] [--template=..]

Any positions can be given: text at the start (--prefix), at the end (--suffix), or anywhere (--template, where [[12]]
stands for 12 tokens to fill). The model always fills a window of the length it was trained with, so that what it sees
is what it knows; of a template's window, the part behind the template is drawn too, and cut off.
The autoregressive twin (objective 'ar') writes from left to right, so it can be given a prefix alone.
Texts go to stdout, then one JSON line; with --output also to a file for `python -m sedd_jax.judge`.
"""

import dataclasses
import json
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from sedd_jax import cli, distributed, sampling
from sedd_jax.config import write_atomically
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError
from sedd_jax.training.experiment import SamplingOptions, Trained, load_trained
from sedd_jax.training.report import say

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
flags.DEFINE_string("template", None, "Text with holes: [[12]] is 12 tokens to fill.")
flags.DEFINE_string("output", None, "File for the texts, one JSON object with a field 'text' per line.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=2**32 - 1)

FREE = -1
HOLE = r"\[\[(\d+)\]\]"


def parse_template(template: str, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids [n] of a template, FREE where a token is to be filled in. Raises InputError for a malformed hole."""
    parts = re.split(HOLE, template)
    pieces = []
    for i, part in enumerate(parts):
        if i % 2:
            pieces.append(np.full(int(part), FREE))
        elif "[[" in part or "]]" in part:
            hole = part[max(part.find("[["), 0) :] if "[[" in part else part[: part.find("]]") + 2]
            raise InputError(f"--template has a malformed hole at {hole[:40]!r}; a hole is [[12]], for 12 tokens")
        else:
            pieces.append(tokenizer.encode(part))
    return np.concatenate(pieces).astype(np.int32)


def parse_window(
    length: int, tokenizer: Tokenizer, *, prefix: str | None, suffix: str | None, template: str | None
) -> tuple[np.ndarray, int]:
    """Token ids [length] of the window, FREE where to fill, and how many of them are shown."""
    if template is not None and (prefix is not None or suffix is not None):
        raise InputError("--template already says what is given; leave --prefix and --suffix out")
    holes = sum(map(int, re.findall(HOLE, template or "")))
    if holes > length:
        raise InputError(
            f"--template has holes for {holes} tokens, more than the model's length of {length}; shorten it"
        )
    start = parse_template(template, tokenizer) if template is not None else tokenizer.encode(prefix or "")
    end = tokenizer.encode(suffix or "")
    if len(start) + len(end) > length:
        flag = "--template" if template is not None else "--prefix and --suffix"
        raise InputError(f"{flag} of {len(start) + len(end)} tokens exceeds the model's length of {length}; shorten it")
    window = np.full(length, FREE, np.int32)
    window[: len(start)] = start
    window[length - len(end) :] = end
    return window, length if template is None else len(start)


def check_flags(given: Iterable[str]) -> None:
    """Raises InputError where a flag that is given says nothing to the autoregressive twin. given: their names."""
    foreign = {"suffix", "template", "steps", "method", "grid", "corrector_steps", "corrector_size", "precision"}
    for name in foreign.intersection(given):
        raise InputError(
            f"--{name} does not apply: the model of this --workdir is autoregressive and writes from left to right, "
            "one token per network call; it takes --prefix, --temperature, --top_k and --top_p"
        )


def draw(
    trained: Trained, window: np.ndarray, options: SamplingOptions, batch_size: int, seed: int
) -> tuple[sampling.Sample, float]:
    """The samples, and the seconds that drawing them took after compilation. In slices of batch_size, which give the
    samples that all at once would give."""
    num, batch_size = options.num, min(batch_size, options.num)
    rows = np.broadcast_to(window, (batch_size, len(window)))
    clamp = tuple(map(trained.experiment.place, (rows != FREE, np.maximum(rows, 0))))
    with jax.set_mesh(trained.experiment.mesh):
        arguments = trained.params, jax.random.key(seed), clamp, options.steps
        sample_fn = trained.experiment.sample_fn(options).lower(*arguments, 0).compile()
        distributed.wait("compiled")
        start = time.perf_counter()
        slices = tqdm(
            range(0, num, batch_size), desc="sampling", unit="slice", delay=2, disable=not distributed.is_leader()
        )
        # The last slice is drawn whole, and what is too much of it left out.
        parts = [jax.device_get(sample_fn(*arguments, first)) for first in slices]
    return (
        sampling.Sample(
            tokens=np.concatenate([part.tokens for part in parts])[:num],
            changed=np.concatenate([part.changed for part in parts])[:num],
            calls=np.max([part.calls for part in parts]),
            clipped=np.mean([part.clipped for part in parts]),
        ),
        time.perf_counter() - start,
    )


def write_samples(path: epath.Path, texts: list[str]) -> None:
    """JSON lines with a field 'text', whole or not at all."""
    try:
        write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    except OSError as error:
        raise InputError(f"--output={path} cannot be written: {error.strerror or error}") from error


def main() -> dict[str, Any]:
    values = flags.FLAGS
    if values.output is not None and not epath.Path(values.output).parent.is_dir():
        raise InputError(f"--output={values.output}: its folder does not exist; make it first")
    trained = load_trained(cli.workdir(), log=say)
    causal, defaults = trained.experiment.model.causal, trained.experiment.sampling
    if causal:
        check_flags([name for name in values if values[name].value is not None])
    given = {field.name: values[field.name].value for field in dataclasses.fields(defaults) if field.name in values}
    sampler = dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})
    if not causal:
        sampler.check(trained.experiment.graph, sampler.steps)
    num = sampler.num
    window, shown = parse_window(
        trained.config.data.length,
        trained.tokenizer,
        prefix=values.prefix,
        suffix=values.suffix,
        template=values.template,
    )
    how = "from left to right" if causal else f"by the method {sampler.method!r} in {sampler.steps} steps"
    say(f"drawing {num} x {len(window)} tokens {how}")
    drawn, seconds = draw(trained, window, sampler, values.batch_size, values.seed)
    texts = [trained.tokenizer.decode(tokens[:shown]) for tokens in np.asarray(drawn.tokens).tolist()]
    if values.output is not None and distributed.is_leader():
        write_samples(epath.Path(values.output), texts)
    for i, text in enumerate(texts if distributed.is_leader() else ()):
        print(f"=== sample {i} ===\n{text}")
    return {
        "samples": texts,
        "tokens_per_second": num * len(window) / seconds,
        "seconds": seconds,
        "network_evaluations": int(drawn.calls),
        "clipped_fraction": float(drawn.clipped),
        "step": trained.step,
    }


if __name__ == "__main__":
    cli.run(main)
