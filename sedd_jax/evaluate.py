"""Likelihood of held-out text under a trained model: python -m sedd_jax.evaluate --workdir=DIR [--data=FILE]

The complete bound (prior + diffusion + reconstruction) with the averaged weights, or of the autoregressive twin the
likelihood itself, over non-overlapping chunks of the
model's length. One JSON line on stdout: bits per byte, bits per token, perplexity, each with its standard error.

--suite=zeroshot --corpora=NAME=SOURCE,... --output=DIR does so for lambada, wikitext2, ptb, wikitext103 and lm1b (those
that are given) by the protocol of the published figures, and writes a table of both (docs/evaluation.md). The same
command goes on where it stopped.
"""

from typing import Any

from absl import flags
from etils import epath

from sedd_jax import cli
from sedd_jax.config import build
from sedd_jax.data import corpora, dataset, tokenizers
from sedd_jax.data.packing import tokenize
from sedd_jax.devices import processes
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.evaluation import perplexity, zeroshot
from sedd_jax.training.experiment import Trained, load_trained

cli.define_workdir("Directory of a trained model.")
cli.define_processes()
flags.DEFINE_string("data", None, "A file, a glob, tfds:NAME ...; by default the validation part of the training data.")
flags.DEFINE_integer("num_times", None, "Noise levels per sequence; by default eval.num_times of the run's config.")
flags.DEFINE_integer("num_sequences", None, "Only the first so many sequences (of each test set); by default all.")
flags.DEFINE_integer("batch_size", None, "Sequences per network call; by default eval.batch_size of the config.")
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_enum("suite", None, ["zeroshot"], "Several test sets by the protocol of the published figures.")
flags.DEFINE_list("corpora", [], "Of the suite: NAME=SOURCE, where SOURCE is what --data may be.")
flags.DEFINE_string("output", None, "Of the suite: directory of the results.")


def evaluate_suite(trained: Trained, **options: Any) -> dict[str, Any]:
    values = flags.FLAGS
    if values.data is not None:
        raise InputError(f"--suite has its own data; leave --data={values.data} out and give --corpora")
    sources, output = zeroshot.parse(values.corpora), epath.Path(cli.required("output"))
    figures = zeroshot.evaluate(trained, sources, output, **options)
    exact = trained.experiment.model.causal
    if processes.is_leader():
        zeroshot.write(output, figures, exact=exact)
    say(zeroshot.markdown(figures, exact=exact))
    return {"suite": values.suite, "corpora": figures, "step": trained.step, "output": str(output)}


def evaluate_data(trained: Trained, **options: Any) -> dict[str, Any]:
    config, source = trained.config, flags.FLAGS.data
    if source is None and "source" not in config.data:
        raise InputError(f"--data is missing: --workdir={cli.workdir()} has converted weights, without their corpus")
    if source is None:
        stream = build(dataset.load, "data", config, directory=cli.workdir()).valid
    else:
        text_field = config.data.get("text_field", "text")
        stream = tokenize(corpora.documents(source, text_field=text_field), trained.tokenizer, progress=True)
    return perplexity.of_stream(trained, stream, **options)


def main() -> dict[str, Any]:
    values = flags.FLAGS
    for name in ("num_times", "num_sequences", "batch_size"):
        if values[name].value is not None and values[name].value < 1:
            raise InputError(f"--{name}={values[name].value} must be at least 1")
    for name in ("corpora", "output"):
        if values[name].value and values.suite is None:
            raise InputError(f"--{name} belongs to --suite=zeroshot, which is missing")
    trained = load_trained(cli.workdir(), log=say)
    if warning := tokenizers.lossy_warning(trained.tokenizer):
        say(f"warning: {warning}")
    defaults = trained.experiment.eval
    options = {
        "num_times": values.num_times or defaults.num_times,
        "batch_size": values.batch_size or defaults.batch_size,
        "limit": values.num_sequences,
        "seed": values.seed,
    }
    return evaluate_suite(trained, **options) if values.suite else evaluate_data(trained, **options)


if __name__ == "__main__":
    cli.run(main)
