"""Text from a trained model: python -m sedd_jax.sample --workdir=DIR [--prefix=.. --suffix=..] [--template=..]

Any positions can be given: text at the start (--prefix), at the end (--suffix), or anywhere (--template, where [[12]]
stands for 12 tokens to fill). The model always fills a window of the length it was trained with, so that what it sees
is what it knows; of a template's window, the part behind the template is drawn too, and cut off.
The autoregressive twin (objective 'ar') writes from left to right, so it can be given a prefix alone.
Texts go to stdout, then one JSON line; with --output also to a file for `python -m sedd_jax.judge`.
"""

import json
import re
import time
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from sedd_jax import autoregressive, cli, distributed, sampling
from sedd_jax.config import write_atomically
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError
from sedd_jax.training.experiment import Trained, load_trained
from sedd_jax.training.report import say

cli.define_workdir("Directory of a trained model.")
cli.define_processes()
flags.DEFINE_integer("num", None, "How many texts; by default sampling.num of the run's config.")
flags.DEFINE_integer("steps", None, "Reverse steps; by default sampling.steps of the config.")
flags.DEFINE_string("method", None, f"One of {', '.join(sampling.METHODS)}; by default sampling.method of the config.")
flags.DEFINE_float("temperature", None, "Of the autoregressive twin: logits are divided by it; 1 by default.")
flags.DEFINE_float("top_p", None, "Of the autoregressive twin: only the most likely tokens, of so much probability.")
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


def check_flags(*, causal: bool, given: Collection[str]) -> None:
    """Raises InputError where a flag that is given says nothing to the model. given: their names."""
    if causal:
        foreign, takes = ("suffix", "template", "steps", "method"), "--prefix, --temperature and --top_p"
        reason = "autoregressive and writes from left to right, one token per network call"
    else:
        foreign, takes = ("temperature", "top_p"), "--steps and --method"
        reason = "a diffusion model"
    for name in foreign:
        if name in given:
            raise InputError(f"--{name} does not apply: the model of this --workdir is {reason}; it takes {takes}")


def draw(
    trained: Trained, window: np.ndarray, num: int, seed: int, sample_fn: jax.stages.Wrapped
) -> tuple[sampling.Sample, float]:
    """The samples, and the seconds that drawing them took after compilation."""
    rows = np.broadcast_to(window, (num, len(window)))
    clamp = tuple(map(trained.experiment.place, (rows != FREE, np.maximum(rows, 0))))
    with jax.set_mesh(trained.experiment.mesh):
        arguments = trained.params, jax.random.key(seed), clamp
        compiled = sample_fn.lower(*arguments).compile()
        distributed.wait("compiled")
        start = time.perf_counter()
        drawn = jax.block_until_ready(compiled(*arguments))
    return drawn, time.perf_counter() - start


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
    check_flags(causal=causal, given=[name for name in values if values[name].value is not None])
    num = defaults.num if values.num is None else values.num
    steps = defaults.steps if values.steps is None else values.steps
    method = values.method or defaults.method
    temperature, top_p = (1.0 if value is None else value for value in (values.temperature, values.top_p))
    sampling.check_options(method, steps)
    autoregressive.check_options(temperature, top_p)
    if num < 1:
        raise InputError(f"--num={num} must be at least 1")
    window, shown = parse_window(
        trained.config.data.length,
        trained.tokenizer,
        prefix=values.prefix,
        suffix=values.suffix,
        template=values.template,
    )
    calls = len(window) if causal else steps + 1
    say(f"drawing {num} x {len(window)} tokens in {calls} network calls")
    sample_fn = trained.experiment.sample_fn(steps, method, temperature=temperature, top_p=top_p)
    drawn, seconds = draw(trained, window, num, values.seed, sample_fn)
    texts = [trained.tokenizer.decode(tokens[:shown]) for tokens in np.asarray(drawn.tokens).tolist()]
    if values.output is not None and distributed.is_leader():
        write_samples(epath.Path(values.output), texts)
    for i, text in enumerate(texts if distributed.is_leader() else ()):
        print(f"=== sample {i} ===\n{text}")
    return {
        "samples": texts,
        "tokens_per_second": num * len(window) / seconds,
        "seconds": seconds,
        "network_evaluations": calls,
        "clipped_fraction": float(drawn.clipped),
        "step": trained.step,
    }


if __name__ == "__main__":
    cli.run(main)
