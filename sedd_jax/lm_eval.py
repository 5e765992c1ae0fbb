"""lm-evaluation-harness: python -m sedd_jax.lm_eval --model sedd_jax --model_args workdir=DIR --tasks NAME,...

Its own command line (extra `lm-eval`), which knows the model `sedd_jax` here: the run in a workdir, a diffusion model
or an AR baseline. --model_args takes workdir, draws (of noise per text), seed, and options of sampling such as steps.
Likelihoods of a diffusion model are the bound given the context, so they need the absorbing graph."""

import sys

from sedd_jax import cli
from sedd_jax.errors import explained

ARGUMENTS = sys.argv


def main() -> None:
    with explained("this needs the extra 'lm-eval'", "pip install 'sedd_jax[lm-eval]'", ImportError):
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    model_registry.register("sedd_jax", target="sedd_jax.harness:Run")
    sys.argv = ARGUMENTS
    cli_evaluate()


if __name__ == "__main__":
    sys.argv = sys.argv[:1]  # the flags are not ours to parse
    cli.run(main)
