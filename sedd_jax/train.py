"""Trains a model: python -m sedd_jax.train --config=configs/tiny.py --workdir=DIR [--config.a.b=value ...]

Goes on by itself where DIR holds the same run. --init=OTHER begins a new run from the averaged weights of a trained
model. Progress goes to stderr, one JSON line with the result to stdout."""

from absl import flags

from sedd_jax import cli
from sedd_jax.training.loop import train

cli.define_path("config", "Experiment, a file such as configs/tiny.py; --config.a.b=value sets a field.")
cli.define_path("workdir", "Directory of the run: config, checkpoints, metrics, samples.")
cli.define_processes()
cli.define_path("init", "Workdir, or weights as for convert, that the run begins from.")
flags.DEFINE_enum("init_rows", None, ["mean"], "Rows of tokens that the model of --init does not know.")


def main() -> dict:
    return train(cli.config(), cli.path(), flags.FLAGS.init, flags.FLAGS.init_rows)


if __name__ == "__main__":
    cli.run(main)
