"""A sampler to take away: python -m sedd_jax.export --workdir=DIR --output=FILE; then python FILE 'The [[4]] is [[6]].'

FILE is a zip of programs (jax.export), weights, the tokenizer, about.json (shapes, arguments, defaults) and a reader,
sedd_jax/exported.py, that does without this package. Nothing is pickled. Seed, steps, temperature and given tokens are
arguments; the other options of `sample` are fixed. Texts are those of `sample` with --num at a time, bit for bit."""

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import export
from ml_collections import ConfigDict

from sedd_jax import cli, exported
from sedd_jax.devices.processes import say
from sedd_jax.files import write_atomically
from sedd_jax.sampling import Truncation
from sedd_jax.training.experiment import Experiment, make_experiment
from sedd_jax.training.options import SamplingOptions
from sedd_jax.training.trained import Trained, load_trained

PLATFORMS = ["cpu", "cuda", "tpu"]
OPTIONS = dataclasses.fields(SamplingOptions)

cli.define_path("workdir", "Directory of a trained model.")
cli.define_path("output", "File to write, such as model.zip.", output=True)
flags.DEFINE_multi_enum("platform", PLATFORMS, PLATFORMS, "What it is to run on, once for each; by default all.")
for option in OPTIONS:
    define = {str: flags.DEFINE_string, float: flags.DEFINE_float}.get(option.type, flags.DEFINE_integer)
    define(option.name, None, f"sampling.{option.name}; by default of the run's config.")


def programs(trained: Trained, options: SamplingOptions, platforms: Sequence[str]) -> dict[str, bytes]:
    """(weights, tokens [B, L], seed, steps, temperature, first sequence) -> (tokens, `Sample.failed`), serialised.
    tokens: -1 where to draw. 'program' is the one of `sample` at temperature 1, whatever its argument."""
    # On one device, with the attention that every platform has.
    trained.config.mesh, trained.config.model.attention = ConfigDict(), "plain"
    experiment = make_experiment(trained.config, trained.tokenizer.vocab_size, jax.local_devices()[:1])
    weights, tree = jax.tree.flatten(jax.device_get(trained.params))

    def draw(heated, weights, tokens, seed, steps, temperature, first):
        sampler = dataclasses.replace(options, temperature=1.0)
        if heated:  # `Truncation` takes a number, and here the temperature is traced
            narrow = sampler.truncation.log_probs
            divided = type("Divided", (Truncation,), {"log_probs": lambda _, logits: narrow(logits / temperature)})()
            sampler = type("Heated", (SamplingOptions,), {"truncation": divided})(**vars(sampler))
        sample_fn = Experiment.sample_fn.__wrapped__(experiment, sampler)  # a cache would keep what is traced
        clamp, params = (tokens >= 0, jnp.maximum(tokens, 0)), jax.tree.unflatten(tree, weights)
        sample = sample_fn(params, jax.random.key(seed), clamp, steps, first)
        return sample.tokens, sample.failed

    tokens = np.zeros((options.num, trained.config.data.length), np.int32)
    arguments = weights, tokens, np.uint32(0), np.int32(1), np.float32(1), np.int32(0)
    make = lambda heated: export.export(jax.jit(partial(draw, heated)), platforms=platforms)(*arguments)  # noqa: E731
    with jax.set_mesh(experiment.mesh):
        return {"program": make(False).serialize(), "program.temperature": make(True).serialize()}


def main() -> dict:
    values, output = flags.FLAGS, cli.required("output")
    trained = load_trained(cli.path(), log=say)
    options = dataclasses.replace(trained.experiment.sampling, **cli.given(*(option.name for option in OPTIONS)))
    options.check(trained.experiment.graph, options.steps)
    options.check_label(trained.experiment.model.num_classes)
    say(f"exporting for {', '.join(values.platform)}")
    leaves = jax.tree.leaves_with_path(jax.device_get(trained.params))
    weights = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    about = {"arguments": "weights, tokens int32, seed uint32, steps int32, temperature float32, first int32"}
    about |= {"shape": [options.num, trained.config.data.length], "options": dataclasses.asdict(options)}
    about["defaults"] = {"seed": 0, "steps": options.steps, "temperature": options.temperature, "first": 0}
    about |= {"platforms": values.platform, "jax": jax.__version__, "step": trained.step}
    files = trained.tokenizer.portable() | programs(trained, options, values.platform)
    files["about.json"] = json.dumps(about | {"weights": list(weights)}).encode()
    files["__main__.py"] = pathlib.Path(exported.__file__).read_bytes()
    np.savez(content := io.BytesIO(), allow_pickle=False, **weights)
    with zipfile.ZipFile(content, "a") as archive:
        for name, file in files.items():
            archive.writestr(name, file)
    write_atomically(output, content.getvalue())
    return {"output": output, "bytes": content.tell()} | about


if __name__ == "__main__":
    cli.run(main)
