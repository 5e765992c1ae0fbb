"""Trains a model: python -m sedd_jax.train --config=configs/tiny.py --workdir=DIR [--config.a.b=value ...]

Goes on by itself where DIR holds the same run. Progress goes to stderr, one JSON line with the result to stdout.
"""

from typing import Any

from sedd_jax import cli
from sedd_jax.training.loop import train

cli.define_config()
cli.define_workdir("Directory of the run: config, checkpoints, metrics, samples.")
cli.define_processes()


def main() -> dict[str, Any]:
    return train(cli.config(), cli.workdir())


if __name__ == "__main__":
    cli.run(main)
