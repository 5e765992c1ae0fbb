"""Likelihood of held-out text under a trained model: python -m sedd_jax.evaluate --workdir=DIR [--data=FILE]

The complete bound (prior + diffusion + reconstruction) with the averaged weights, over chunks of the model's length
that do not overlap; for an autoregressive (AR) model, the likelihood itself. One JSON line on stdout: bits per byte,
bits per token, perplexity, each with its standard error.

--suite=zeroshot --corpora=NAME=SOURCE,... --output=DIR evaluates on lambada, wikitext2, ptb, wikitext103 and lm1b (the
given ones) by the published protocol, and writes a table (docs/evaluation.md). The same command continues it."""

import dataclasses

from absl import flags

from sedd_jax import cli
from sedd_jax.data import tokenizers
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.evaluation import perplexity, zeroshot
from sedd_jax.likelihood import ESTIMATORS
from sedd_jax.training.trained import load_trained

cli.define_model()
cli.define_processes()
flags.DEFINE_string("data", None, "File, glob, shards:DIR, tfds:NAME ...; by default the validation part of training.")
flags.DEFINE_integer("num_times", None, "Draws per sequence; by default eval.num_times.", lower_bound=1)
flags.DEFINE_integer("num_sequences", None, "So many, spread over each text; by default all.", lower_bound=1)
flags.DEFINE_integer("batch_size", None, "Sequences per network call; by default eval.batch_size.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_enum("suite", None, ["zeroshot"], "Several test sets by the protocol of the published figures.")
flags.DEFINE_list("corpora", [], "With --suite: NAME=SOURCE, where SOURCE is a value of --data.")
cli.define_path("output", "With --suite: directory of the results.")
cli.define_path("prompts", "JSON lines {prompt, text}, and perhaps suffix: how likely the texts are given the rest.")
flags.DEFINE_enum("estimator", None, ESTIMATORS, "How the bound is estimated; by default eval.estimator.")
flags.DEFINE_integer("orders", 8, "With --estimator=orders: random orders per sequence.", lower_bound=1)


def main() -> dict:
    values, workdir = flags.FLAGS, cli.path()
    if values.suite and values.data is not None:
        raise InputError(f"--suite has its own data; leave --data={values.data} out and give --corpora")
    if values.prompts and (values.suite or values.data is not None):
        raise InputError(f"--prompts={values.prompts} holds the texts; leave --data and --suite out")
    for name in ("corpora", "output"):
        if values[name].value and values.suite is None:
            raise InputError(f"--{name} belongs to --suite=zeroshot, which is missing")
    trained = load_trained(workdir, log=say, mesh=values.mesh)
    if warning := tokenizers.lossy_warning(trained.tokenizer):
        say(f"warning: {warning}")
    given = cli.given("num_times", "batch_size", "estimator")
    if values.estimator == "orders":
        given["num_times"] = values.orders
        say(f"--orders={values.orders}: {values.orders * trained.length} network calls for each batch of sequences")
    options = dataclasses.replace(trained.experiment.eval, num_sequences=values.num_sequences or 0, **given)
    if values.prompts:
        return perplexity.summary_given(trained, cli.path("prompts"), options, seed=values.seed)
    if values.suite:
        sources, output = zeroshot.parse(values.corpora), cli.path("output")
        figures = zeroshot.evaluate(trained, sources, output, options, seed=values.seed)
        return {"suite": values.suite, "corpora": figures, "step": trained.step, "output": str(output)}
    stream = perplexity.stream_for(trained, workdir, values.data)
    options = perplexity.fit(options, stream, length=trained.length)
    return perplexity.summary(trained, stream, options, seed=values.seed, name="text")


if __name__ == "__main__":
    cli.run(main)
