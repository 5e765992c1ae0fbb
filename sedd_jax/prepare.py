"""Text into shards of tokens: python -m sedd_jax.prepare --data=... --tokenizer=... --output=DIR

Tokenises a corpus once, so that training reads it by random access (--config.data.source=shards:DIR), in memory that
does not grow with it. The same command continues an interrupted one, checks the shards, and replaces damaged ones.
One JSON line on stdout: tokens, documents, bytes and characters of each part."""

import dataclasses
import os
import signal

from absl import flags

from sedd_jax import cli
from sedd_jax.data.preparation import Plan, prepare
from sedd_jax.devices.stopping import Stopped

flags.DEFINE_string("data", None, "What to read: a file or glob, tfds:NAME, hf:PATH, embedded; see docs/data.md.")
flags.DEFINE_string("valid_data", None, "Validation text, read completely; by default a part of --data.")
flags.DEFINE_float("valid_fraction", Plan.valid_fraction, "Share of the characters of --data, from its end.")
flags.DEFINE_string("text_field", Plan.text_field, "The field of a record that holds its text.")
flags.DEFINE_string("separator", None, "What divides the documents of a text file, such as '<|endoftext|>'.")
flags.DEFINE_string("tokenizer", None, "Kind of tokenizer, such as bytes or sentencepiece.")
cli.define_path("tokenizer_path", "File or folder of an existing tokenizer.")
flags.DEFINE_integer("vocab_size", None, "Size of the vocabulary, if one is trained.")
flags.DEFINE_integer("workers", os.cpu_count(), "Processes that tokenise.", lower_bound=1, upper_bound=1024)
flags.DEFINE_integer("shard_bytes", Plan.shard_bytes, "Bytes of text per shard.", lower_bound=1)
flags.DEFINE_integer("record_tokens", Plan.record_tokens, "Tokens per record of a shard.", lower_bound=1)
cli.define_path("output", "Directory of the shards.")


def main() -> dict:
    values = flags.FLAGS
    for name in ("data", "tokenizer", "output"):
        cli.required(name)
    plan = Plan(**{field.name: values[field.name].value for field in dataclasses.fields(Plan)})
    try:
        manifest, kept = prepare(plan, values.output, workers=values.workers, progress=True)
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGINT, "with the finished shards kept") from error
    shards = {"shards": sum(map(len, manifest.shards.values())), "shards_kept": kept}
    parts = {split: manifest.counts(split) for split in manifest.shards}
    return {"output": values.output, "vocab_size": manifest.vocab_size} | shards | parts


if __name__ == "__main__":
    cli.run(main)
