"""Compares two models on one text: python -m sedd_jax.compare --workdir=A --other=B [--data=...] [--num_sequences=N]

Both get the same sequences and, where they are diffusion models, the same noise, so most of what makes one text dearer
than another cancels: the error of the difference is that of the paired values, and smaller than the errors of the two.
The last line of stdout is JSON; `difference` is the other model's figure minus that of --workdir."""

import dataclasses
from typing import Any

import numpy as np
from absl import flags

from sedd_jax import cli
from sedd_jax.data.packing import chunks, mean_length, tokens_per_byte
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.evaluation import perplexity
from sedd_jax.likelihood import standard_errors, summarise
from sedd_jax.training.trained import load_trained
from sedd_jax.typing import as_batch

cli.define_model()
cli.define_processes()
cli.define_path("other", "Directory of the model to compare it with, of the same tokenizer and length.")
flags.DEFINE_string("data", None, "As for evaluate; by default the validation part of the training data of --workdir.")
flags.DEFINE_integer("num_times", None, "Draws per sequence; by default eval.num_times.", lower_bound=2)
flags.DEFINE_integer("num_sequences", None, "So many, spread over the text; by default all.", lower_bound=2)
flags.DEFINE_integer("batch_size", None, "Sequences per network call; by default eval.batch_size.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)


def main() -> dict[str, Any]:
    values, workdir = flags.FLAGS, cli.path()
    places = {"workdir": workdir, "other": cli.path("other")}
    models = {name: load_trained(place, log=say, mesh=values.mesh) for name, place in places.items()}
    one, other = models.values()
    if one.tokenizer.fingerprint != other.tokenizer.fingerprint or one.length != other.length:
        differs = f"--other={places['other']} has another tokenizer or data.length than --workdir={workdir}"
        raise InputError(f"{differs}: tokens then do not compare; give models of one vocabulary and length")
    stream = perplexity.stream_for(one, workdir, values.data)
    sequences, _ = chunks(stream, one.length, limit=values.num_sequences)
    rate, length = tokens_per_byte(sequences, one.tokenizer, stream), mean_length(sequences)
    options = dataclasses.replace(one.experiment.eval, **cli.given("num_times", "batch_size"))
    figures, nats = dict[str, Any](num_sequences=len(as_batch(sequences).tokens)), []
    for name, trained in models.items():
        found = perplexity.bounds(trained, sequences, options, seed=values.seed, name=name)
        summary = summarise(found, length, rate)
        kept = ("nats_per_token", "nats_per_token_stderr", "bits_per_byte", "bits_per_byte_stderr")
        figures[name] = {"workdir": str(places[name]), "step": trained.step} | {key: summary[key] for key in kept}
        nats.append(np.asarray(found.total, np.float64) / length)
    differences = nats[1] - nats[0]
    mean, error = float(differences.mean()), standard_errors(differences)[1]
    beyond, texts = abs(mean) > 2 * error, []
    for unit, scale in {"nats_per_token": 1, "bits_per_byte": rate / np.log(2)}.items():
        texts.append(f"{mean * scale:+.4f} ± {error * scale:.4f} {unit.replace('_', ' ')}")
        figures |= {f"difference_{unit}": mean * scale, f"difference_{unit}_stderr": error * scale}
    say(f"difference: {', '.join(texts)}: {'more' if beyond else 'not more'} than two standard errors")
    return figures | {"beyond_two_errors": beyond}


if __name__ == "__main__":
    cli.run(main)
