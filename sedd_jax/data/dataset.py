"""The corpus of a config, as two streams of tokens."""

import dataclasses
import functools
import hashlib

from etils import epath

from sedd_jax.data import corpora, mixture, records, shards, tokenizers
from sedd_jax.data.packing import TokenStream, check_length, tokenize
from sedd_jax.errors import InputError

Part = tuple[str, ...] | tuple[records.Record, ...] | TokenStream  # documents, or their tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """length: tokens per sequence. shift: see `Loader`."""

    tokenizer: tokenizers.Tokenizer
    train: TokenStream | mixture.Mixture
    valid: TokenStream
    length: int
    shift: bool

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the tokenizer and all tokens (or the checksums of shards), which a resumed run compares."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for stream in (self.train, self.valid):
            digest.update(stream.content())
        return digest.hexdigest()

    @property
    def num_classes(self) -> int:
        """The largest label and 1; 0 without labels."""
        labels = [part.windows.labels for part in (self.train, self.valid) if isinstance(part, records.Records)]
        return max((int(part.max()) + 1 for part in labels if part is not None), default=0)


def load(
    *,
    source: str,
    length: int,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    tokenizer_path: str | None = None,
    valid_source: str | None = None,
    valid_fraction: float = 0.1,
    text_field: str = "text",
    prompt_field: str | None = None,
    label_field: str | None = None,
    tail: str = "eot",
    separator: str | None = None,
    shift: bool = True,
    directory: epath.PathLike | None = None,
) -> Dataset:
    """Opens a corpus: shards stay on disk, text is read and tokenised. Writes nothing. Raises InputError as the
    functions below do, or if a part of the corpus is shorter than one sequence.
    source: see `corpora.documents`; or `shards:DIR` that `prepare` made, or a mixture `mix:3*SOURCE,1*SOURCE`.
    valid_source: likewise, but no mixture; for shards their validation part. By default that of the first source.
    prompt_field, label_field, tail: of JSON lines whose texts follow a prompt or are of a class: see `records`. Then
    each sequence is a record, and `valid_fraction` of them are to validate. The others: see `corpora.read` and
    `tokenizers.make`; shards have their own tokenizer, with which these must agree."""
    weights, names = zip(*mixture.parse(source), strict=True)
    fields = {"text_field": text_field, "prompt_field": prompt_field, "label_field": label_field}
    alone, packed = prompt_field or label_field, (mixture.PREFIX, shards.PREFIX)
    if alone and any(str(name).startswith(packed) for name in (source, valid_source)):
        raise InputError(f"data source {source!r}: prompts and labels are read from JSON lines; give a file or a glob")
    prepared: list[shards.Shards] = []

    def read(name: str) -> tuple[Part, Part]:
        if name.startswith(shards.PREFIX):
            prepared.append(shards.load(name.removeprefix(shards.PREFIX)))
            return prepared[-1].train, prepared[-1].valid
        if alone:
            found = records.read(name, **fields)
            cut = None if valid_source is not None else corpora.cut_of(len(found), valid_fraction)
            return found[:cut], found[cut or 0 :]
        if valid_source is not None:
            return (texts := corpora.documents(name, text_field=text_field, separator=separator)), texts
        return corpora.read(name, valid_fraction=valid_fraction, text_field=text_field, separator=separator)

    parts = [read(name) for name in names]
    train = [part for part, _ in parts]
    valid = parts[0][1] if valid_source is None else read(valid_source)[1]
    if prepared:
        chosen = _tokenizer_of(prepared, tokenizer, vocab_size, tokenizer_path)
    else:
        texts = [text for part in train for each in part for text in ([each] if isinstance(each, str) else each[:2])]
        known = {"vocab_size": vocab_size, "path": tokenizer_path, "directory": directory}
        chosen = tokenizers.make(tokenizer, **known, texts=texts)

    def stream(part: Part) -> TokenStream:
        if isinstance(part, tuple) and isinstance(part[0], records.Record):
            return records.tokenize(part, chosen, length, tail=tail)
        tokens = tokenize(part, chosen, progress=True) if isinstance(part, tuple) else part
        check_length(tokens, length)
        return tokens

    streams = tuple(map(stream, train))
    mixed = streams[0] if len(streams) == 1 else mixture.Mixture(streams, weights)
    return Dataset(chosen, mixed, stream(valid), length, shift and not isinstance(mixed, records.Records))


def _tokenizer_of(prepared: list[shards.Shards], kind: str, size: int | None, path: str | None) -> tokenizers.Tokenizer:
    first = prepared[0].tokenizer
    if any(other.tokenizer.fingerprint != first.fingerprint for other in prepared):
        raise InputError("the shards of this mixture were made with different tokenizers: prepare them with one")
    if kind != prepared[0].manifest.kind or size not in (None, first.vocab_size):
        made_with = f"{prepared[0].manifest.kind!r} of {first.vocab_size} tokens"
        raise InputError(f"tokenizer {kind!r}, vocab_size={size}, but these shards were made with {made_with}")
    if path is not None and tokenizers.make(kind, vocab_size=size, path=path).fingerprint != first.fingerprint:
        raise InputError(f"tokenizer path {path!r} is not the tokenizer that made the shards: leave it out")
    return first
