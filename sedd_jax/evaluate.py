"""Likelihood of held-out text under a trained model: python -m sedd_jax.evaluate --workdir=DIR [--data=FILE]

The complete bound (prior + diffusion + reconstruction) with the averaged weights, or of the autoregressive twin the
likelihood itself, over non-overlapping chunks of the
model's length. One JSON line on stdout: bits per byte, bits per token, perplexity, each with its standard error.
"""

import sys
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from sedd_jax import cli, distributed, likelihood
from sedd_jax.config import build
from sedd_jax.data import corpora, dataset, tokenizers
from sedd_jax.data.packing import chunks, tokenize
from sedd_jax.errors import InputError
from sedd_jax.training.experiment import load_trained
from sedd_jax.training.report import say

cli.define_workdir("Directory of a trained model.")
cli.define_processes()
flags.DEFINE_string("data", None, "A file, a glob, tfds:NAME ...; by default the validation part of the training data.")
flags.DEFINE_integer("num_times", None, "Noise levels per sequence; by default eval.num_times of the run's config.")
flags.DEFINE_integer("num_sequences", None, "Only the first so many sequences; by default all.")
flags.DEFINE_integer("batch_size", None, "Sequences per network call; by default eval.batch_size of the config.")
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)


def main() -> dict[str, Any]:
    values = flags.FLAGS
    for name in ("num_times", "num_sequences", "batch_size"):
        if values[name].value is not None and values[name].value < 1:
            raise InputError(f"--{name}={values[name].value} must be at least 1")
    trained = load_trained(cli.workdir(), log=say)
    if warning := tokenizers.lossy_warning(trained.tokenizer):
        say(f"warning: {warning}")
    experiment, config = trained.experiment, trained.config
    if values.data is None and "source" not in config.data:
        raise InputError(f"--data is missing: --workdir={cli.workdir()} has converted weights, without their corpus")
    if values.data is None:
        stream = build(dataset.load, "data", config, directory=cli.workdir()).valid
    else:
        text_field = config.data.get("text_field", "text")
        stream = tokenize(corpora.documents(values.data, text_field=text_field), trained.tokenizer, progress=True)
    rows, dropped = chunks(stream, config.data.length, limit=values.num_sequences)
    say(f"{len(rows)} sequences of {config.data.length} tokens; {dropped} tokens at the end do not fill another")
    num_times = values.num_times or experiment.eval.num_times
    bound = distributed.in_step("bound", experiment.bound_fn(num_times))
    key = jax.random.key(values.seed)
    with jax.set_mesh(experiment.mesh):
        bounds = likelihood.over_chunks(
            lambda batch, first: bound(trained.params, key, experiment.place(batch), first),
            rows,
            batch_size=min(values.batch_size or experiment.eval.batch_size, len(rows)),
            progress=lambda batches: tqdm(
                batches, desc="evaluating", unit="batch", file=sys.stderr, disable=not distributed.is_leader()
            ),
        )
    summary = likelihood.summarise(bounds, config.data.length, stream.tokens_per_byte)
    # Where the likelihood is exact, there is nothing to average over.
    num_times = None if experiment.model.causal else num_times
    return summary | {"num_sequences": len(rows), "num_times": num_times, "step": trained.step}


if __name__ == "__main__":
    cli.run(main)
