"""The shards of `preparation` made by a Beam pipeline, for corpora that are too large for one machine. Its workers must
see the source and the output under the same paths. The shards are byte for byte those of one process."""

import os
import pathlib
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from sedd_jax.data import corpora, shards
from sedd_jax.data.preparation import Plan, begin, find, finish, make_shard, part_blocks
from sedd_jax.errors import InputError


def prepare(plan: Plan, output: str, *, options: list[str]) -> shards.Manifest:
    """Makes the shards of a plan in the directory `output`. Beam's runner repeats what fails. plan: must name
    `valid_data`, and a tokenizer that need not be trained. output: empty or absent, on a file system that all workers
    share. options: Beam's command line, as `--runner=...`. Raises InputError for what does not fit or cannot be had."""
    if plan.valid_data is None:
        raise InputError("valid_data is missing: a Beam pipeline does not divide a corpus, give a validation text")
    if plan.vocab_size is not None and plan.tokenizer_path is None:
        raise InputError(f"vocab_size={plan.vocab_size}: a Beam pipeline trains no tokenizer, give a tokenizer_path")
    root = pathlib.Path(os.path.expanduser(output)).absolute()
    if find(plan, root):
        raise InputError(f"output {root} holds shards: give a directory that is empty or not there yet")
    sources = zip(corpora.SPLITS, (plan.data, plan.valid_data), strict=True)
    parts = [(split, *part) for split, source in sources for part in enumerate(plan.parts(source))]
    with begin(plan, root), beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        _ = (
            pipeline
            | "Parts" >> beam.Create(parts)
            | "Spread" >> beam.Reshuffle()
            | "Make shards" >> beam.FlatMap(_make_shards, plan, root)
            | "Gather" >> beam.combiners.ToList()
            | "Finish" >> beam.Map(lambda made: finish(plan, root, made))
        )
    return shards.read_manifest(root)


def _make_shards(part: tuple[str, int, corpora.Part], plan: Plan, root: pathlib.Path) -> Iterator[shards.Shard]:
    split, number, read = part
    for block in part_blocks(split, number, read(), plan.shard_bytes):
        yield make_shard(root, plan.record_tokens, block)
