"""How likely held-out text is under a trained model: the complete bound, or the likelihood itself of an AR model."""

import dataclasses
from functools import partial
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from sedd_jax.config import build, check_same_data
from sedd_jax.data import corpora, dataset, shards
from sedd_jax.data.packing import TokenStream, chunks, tokenize, tokens_per_byte
from sedd_jax.devices import processes
from sedd_jax.devices.processes import say
from sedd_jax.devices.sharding import map_batches
from sedd_jax.errors import InputError
from sedd_jax.likelihood import Bound, Exact, summarise
from sedd_jax.training.experiment import EvalOptions, Trained
from sedd_jax.training.options import MOST
from sedd_jax.typing import TokenRows


def bounds(trained: Trained, sequences: TokenRows, options: EvalOptions, *, seed: int, name: str) -> Bound | Exact:
    """One entry per sequence, which depends on the seed and the sequence's number, and not on the batch size.

    options: its batch size is that of each call, even of a single sequence: one shape for all calls.
    name: of these sequences; several processes need a new one for each call.
    """
    experiment = trained.experiment
    bound = processes.compile_together(f"bound of {name}", experiment.bound_fn(options.num_times))
    key = jax.random.key(seed)
    bar = partial(tqdm, desc=f"evaluating {name}", unit="batch", disable=not processes.is_leader())
    measure = lambda batch, first: bound(trained.params, key, batch, first)  # noqa: E731
    return map_batches(measure, sequences, options.batch_size, mesh=experiment.mesh, progress=bar)


def fit(options: EvalOptions, *streams: TokenStream, length: int) -> EvalOptions:
    """The options for `summary` of these streams, with a batch size that is no larger than the longest takes."""
    most = min(options.num_sequences or MOST, max(len(stream) for stream in streams) // length)
    return dataclasses.replace(options, batch_size=max(1, min(options.batch_size, most)))


def summary(trained: Trained, stream: TokenStream, options: EvalOptions, *, seed: int, name: str) -> dict[str, Any]:
    """The figures of `likelihood.summarise` for chunks of the stream that do not overlap; bits per byte of their text.

    Raises InputError if the stream does not fill one chunk.
    """
    length = trained.config.data.length
    sequences, dropped = chunks(stream, length, limit=options.num_sequences or None)
    say(f"{name}: {len(sequences)} sequences of {length} tokens; {dropped} tokens at the end do not fill another")
    found = bounds(trained, sequences, options, seed=seed, name=name)
    figures = summarise(found, length, tokens_per_byte(sequences, trained.tokenizer, stream))
    # An exact likelihood is no mean over noise levels.
    num_times = None if trained.experiment.model.causal else options.num_times
    return figures | {"num_sequences": len(sequences), "num_times": num_times, "step": trained.step}


def validation_stream(trained: Trained, workdir: epath.Path, *, remedy: str) -> TokenStream:
    """The validation part of the training data. Raises InputError for converted weights, which come without data, and
    if the data is not what the model was trained with."""
    if "source" not in trained.config.data:
        raise InputError(f"--workdir={workdir} holds converted weights without their training data; {remedy}")
    data = build(dataset.load, "data", trained.config, directory=workdir)
    check_same_data(data.fingerprint, workdir, remedy)
    return data.valid


def stream_of(trained: Trained, source: str) -> TokenStream:
    """The text of a source in the model's tokens; of shards, their validation part. Raises InputError if it cannot be
    read, or the shards have another tokenizer."""
    if not source.startswith(shards.PREFIX):
        reading = {"text_field": "text", "separator": None}
        reading = {name: trained.config.data.get(name, default) for name, default in reading.items()}
        return tokenize(corpora.documents(source, **reading), trained.tokenizer, progress=True)
    prepared = shards.load(source.removeprefix(shards.PREFIX))
    if prepared.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise InputError(f"--data={source} was prepared with another tokenizer than the model's; prepare it with that")
    return prepared.valid
