"""How likely held-out text is under a trained model: the complete bound, or the likelihood itself of an AR model."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from sedd_jax.config import build, check_same_data
from sedd_jax.data import corpora, dataset, files, records, shards
from sedd_jax.data.packing import TokenStream, chunks, mean_length, tokenize, tokens_per_byte
from sedd_jax.devices import processes, sharding
from sedd_jax.errors import InputError, explained, require_finite
from sedd_jax.evaluation import quality
from sedd_jax.likelihood import Estimate, summarise
from sedd_jax.training.options import MOST, EvalOptions
from sedd_jax.training.trained import Trained
from sedd_jax.typing import Batch, TokenRows, as_batch


def bounds(trained: Trained, sequences: TokenRows | Batch, options: EvalOptions, *, seed: int, name: str) -> Estimate:
    """One entry per sequence, which depends on the seed and the sequence's number, and not on the batch size.
    options: its batch size is that of each call, even of a single sequence: one shape for all calls.
    name: of these sequences; several processes need a new one for each call."""
    experiment, key = trained.experiment, jax.random.key(seed)
    bound = processes.compile_together(f"bound of {name}", experiment.bound_fn(options.num_times, options.estimator))
    measure = lambda batch, first: bound(trained.params, key, batch.tokens, first, *batch[1:])  # noqa: E731
    how = {"mesh": experiment.mesh, "progress": f"evaluating {name}"}
    return sharding.map_batches(measure, as_batch(sequences), options.batch_size, **how)


def fit(options: EvalOptions, *streams: TokenStream, length: int) -> EvalOptions:
    """The options for `summary` of these streams, with a batch size that is no larger than the longest takes."""
    most = min(options.num_sequences or MOST, max(len(stream) for stream in streams) // length)
    return dataclasses.replace(options, batch_size=max(1, min(options.batch_size, most)))


def summary(trained: Trained, stream: TokenStream, options: EvalOptions, *, seed: int, name: str) -> dict[str, Any]:
    """The figures of `likelihood.summarise` for chunks of the stream that do not overlap; bits per byte of their text.
    Raises InputError if the stream does not fill one chunk."""
    sequences, dropped = chunks(stream, trained.length, limit=options.num_sequences or None)
    num = len(as_batch(sequences).tokens)
    processes.say(f"{name}: {num} sequences of {trained.length} tokens; {dropped} at the end do not fill another")
    found = bounds(trained, sequences, options, seed=seed, name=name)
    figures = summarise(found, mean_length(sequences), tokens_per_byte(sequences, trained.tokenizer, stream))
    causal = trained.experiment.model.causal  # an exact likelihood is no mean over noise levels
    how = {"num_times": None if causal else options.num_times, "estimator": "exact" if causal else options.estimator}
    return figures | how | {"num_sequences": num, "step": trained.step}


def summary_given(trained: Trained, path: epath.Path, options: EvalOptions, *, seed: int) -> dict[str, Any]:
    """How likely texts are given a prompt: the figures of all records {"prompt": ..., "text": ...} in a file of JSON
    lines, whose optional "suffix" is given too. What is behind a record in its window is unknown. Raises InputError for
    a line that is no such record or has no text, and one that is longer than the model's windows."""
    with explained("--prompts", "", InputError):
        rows = [_prompted(record, where, trained) for where, record in files.records(str(path))]
    if not rows:
        raise InputError(f"--prompts={path} holds no record")
    tokens, role, sizes = (np.stack(part) for part in zip(*rows, strict=True))
    options = dataclasses.replace(options, batch_size=min(options.batch_size, len(rows)))
    batch = Batch(tokens, given=role % 2 == 0, never=role == 3)
    found = bounds(trained, batch, options, seed=seed, name="texts")
    nats = np.asarray(require_finite(found.total, f"nats of {len(rows)} texts"), np.float64)
    mean, error = quality.ratio(nats, (role == 1).sum(1))
    bits = float(nats.sum() / np.log(2))
    per_byte = bits / int(sizes.sum())
    figures = {"nats_per_token": mean, "nats_per_token_stderr": error, "bits": bits, "bits_per_byte": per_byte}
    figures |= {"bits_per_byte_stderr": error / mean * per_byte, "num_sequences": len(rows)}
    return figures | {"num_tokens": int((role == 1).sum()), "step": trained.step}


def _prompted(record: dict[str, Any], where: str, trained: Trained) -> tuple[np.ndarray, np.ndarray, int]:
    """Of one record the tokens [L], their roles [L] (0 and 2: given, 1: text, 3: unknown) and the bytes of the text."""
    length, damages = trained.length, (ValueError, TypeError, KeyError, AttributeError)
    with explained(where, 'give {"prompt": ..., "text": ...}', *damages):
        text = record["text"].encode()
        ids = [trained.tokenizer.encode(record.get(name, "")) for name in ("prompt", "text", "suffix")]
    counts = [*map(len, ids), length - sum(map(len, ids))]
    if not counts[1] or counts[3] < 0:
        raise InputError(f"{where}: {counts[1]} tokens of text, {length - counts[3]} in all; give 1 to {length}")
    if counts[2] and trained.experiment.model.causal:
        raise InputError(f"{where}: the AR baseline cannot be given a suffix; give prompt and text alone")
    return np.pad(np.concatenate(ids), (0, counts[3])).astype(np.int32), np.repeat(range(4), counts), len(text)


def validation_stream(trained: Trained, workdir: epath.Path, *, remedy: str) -> TokenStream:
    """The validation part of the training data. Raises InputError for converted weights, which come without data, and
    if the data is not what the model was trained with."""
    if "source" not in trained.config.data:
        raise InputError(f"--workdir={workdir} holds converted weights without their training data; {remedy}")
    data = build(dataset.load, "data", trained.config, directory=workdir)
    check_same_data(data.fingerprint, workdir, remedy)
    return data.valid


def stream_for(trained: Trained, workdir: epath.Path, source: str | None) -> TokenStream:
    """The text of a source, of shards their validation part; or `validation_stream`. Raises InputError for others."""
    if source is None:
        return validation_stream(trained, workdir, remedy="give --data")
    data, tokenizer = trained.config.data, trained.tokenizer
    if source.startswith(shards.PREFIX):
        prepared = shards.load(source.removeprefix(shards.PREFIX))
        if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
            raise InputError(f"--data={source} was prepared with another tokenizer than the model's; prepare it anew")
        return prepared.valid
    if data.get("prompt_field") or data.get("label_field"):
        fields = {name: data[name] for name in ("text_field", "prompt_field", "label_field")}
        return records.tokenize(records.read(source, **fields), tokenizer, trained.length, tail=data.tail)
    reading = {"text_field": data.get("text_field", "text"), "separator": data.get("separator")}
    return tokenize(corpora.documents(source, **reading), tokenizer, progress=True)
