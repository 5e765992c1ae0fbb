"""Weights of the PyTorch implementations of SEDD and its family into a workdir, and back.

    python -m sedd_jax.convert --from=auto --input=louaaron/sedd-small --output=DIR --tokenizer_path=GPT2
    python -m sedd_jax.convert --to=official --input=WORKDIR --output=DIR [--format=torch]

--from reads a Hugging Face folder (config.json with model.safetensors or pytorch_model.bin, whole or in shards), such a
folder on the hub, or a training run (checkpoint.pth or Lightning's .ckpt, and .hydra/config.yaml), whose averaged
weights it takes: of SEDD ('official' is the same), MDLM, RADD, Duo, UDLM or GIDD; see docs/family.md. It needs no torch
and runs no code of a file. `evaluate --data=..`, `sample`, `frontier`, `judge` and `compare` accept the new workdir.
--to writes the averaged weights of a workdir as a Hugging Face folder of SEDD, or as a small workdir of their own that
holds nothing else (adapters merged with what they adapt). One JSON line on stdout."""

import jax
import optax
from absl import flags
from ml_collections import ConfigDict

from sedd_jax import cli
from sedd_jax.data import tokenizers
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.files import check_free, new_directory
from sedd_jax.interop import load, save_official
from sedd_jax.interop.official_config import FAMILIES
from sedd_jax.interop.official_files import FORMATS
from sedd_jax.training.trained import load_trained, write_workdir
from sedd_jax.transformer.model import DTYPES

flags.DEFINE_enum("from", None, ["auto", "official", *FAMILIES], "Whose weights to read; auto: as their config says.")
flags.DEFINE_enum("to", None, ["official", "workdir"], "Whose layout to write.")
cli.define_path("input", "Folder, file or id on the hub (--from); directory of a trained model (--to).")
cli.define_path("output", "New directory to write.")
cli.define_path("model_config", "config.json or .hydra/config.yaml of the input, if not beside the weights.")
flags.DEFINE_string("revision", None, "Commit, branch or tag of --input on the hub, by default the newest.")
flags.DEFINE_string("tokenizer", "gpt2", "Kind of the tokenizer that the model was trained with.")
cli.define_path("tokenizer_path", "Its file or directory.")
flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the matrix products (--from), of the averages (--to=workdir).")
flags.DEFINE_enum("format", "safetensors", FORMATS, "Of the weights that --to writes.")


def main() -> dict:
    values = flags.FLAGS
    reading, writing = values["from"].value, values["to"].value
    if (reading is None) == (writing is None):
        raise InputError("give one of --from=auto and --to=official; see --help")
    source, output = cli.path("input"), check_free(cli.required("output"))
    if reading:
        family = "sedd" if reading == "official" else reading
        params, config = load(source, family=family, config_file=values.model_config, revision=values.revision)
        tokenizer = tokenizers.make(values.tokenizer, path=values.tokenizer_path)
        config.data.tokenizer, config.model.dtype = values.tokenizer, values.dtype
        with new_directory(output) as folder:
            write_workdir(folder, params, config, tokenizer)
        if padding := config.graph.get("padding"):
            say(f"the model has {padding} state{'s' * (padding > 1)} without text, shown as <|{tokenizer.vocab_size}|>")
        step = config.train.get("steps", 0)
    else:
        trained = load_trained(source, log=say)
        params, config, step = jax.device_get(trained.params), trained.config, trained.step
        if writing == "official":
            save_official(output, params, config, format=values.format)
        else:
            kept = {name: value for name, value in config.data.items() if "source" not in name}
            config.data, config.train.steps = ConfigDict(kept | {"vocab_size": trained.tokenizer.vocab_size}), step
            with new_directory(output) as folder:
                write_workdir(folder, params, config, trained.tokenizer, dtype=values.dtype)
    return {"output": str(output), "parameters": optax.tree.size(params), "graph": config.graph.kind, "step": step}


if __name__ == "__main__":
    cli.run(main)
