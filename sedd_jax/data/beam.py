"""The shards of `preparation` made by a Beam pipeline, for corpora that are too large for one machine.

The parts of a source are distributed to workers, which must see the source and the output under the same paths. The
shards are byte for byte those of one process.
"""

import os
import pathlib
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from sedd_jax.data import corpora, preparation, shards
from sedd_jax.data.preparation import Plan
from sedd_jax.data.shards import Manifest, Shard
from sedd_jax.errors import InputError


def prepare(plan: Plan, output: str, *, options: list[str]) -> Manifest:
    """Makes the shards of a plan in the directory `output`. Beam's runner repeats what fails.

    plan: must name `valid_data`, and a tokenizer that need not be trained.
    output: a directory that is empty or absent, on a file system that all workers share.
    options: Beam's command line, such as `--runner=...`.
    Raises InputError for another plan or output, or if the source cannot be read.
    """
    if plan.valid_data is None:
        raise InputError("valid_data is missing: a Beam pipeline does not divide a corpus, give a validation text")
    if plan.vocab_size is not None and plan.tokenizer_path is None:
        raise InputError(f"vocab_size={plan.vocab_size}: a Beam pipeline trains no tokenizer, give a tokenizer_path")
    root = pathlib.Path(os.path.expanduser(output)).absolute()
    if preparation.find(plan, root):
        raise InputError(f"output {root} holds shards: give a directory that is empty or not there yet")
    parts = [
        (split, number, part)
        for split, source in zip(corpora.SPLITS, (plan.data, plan.valid_data), strict=True)
        for number, part in enumerate(plan.parts(source))
    ]
    with preparation.begin(plan, root), beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        _ = (
            pipeline
            | "Parts" >> beam.Create(parts)
            | "Spread" >> beam.Reshuffle()
            | "Make shards" >> beam.FlatMap(_make_shards, plan, root)
            | "Gather" >> beam.combiners.ToList()
            | "Finish" >> beam.Map(lambda made: preparation.finish(plan, root, made))
        )
    return shards.read_manifest(root)


def _make_shards(part: tuple[str, int, corpora.Part], plan: Plan, root: pathlib.Path) -> Iterator[Shard]:
    split, number, read = part
    for block in preparation.part_blocks(split, number, read(), plan.shard_bytes):
        yield preparation.make_shard(root, plan.record_tokens, block)
