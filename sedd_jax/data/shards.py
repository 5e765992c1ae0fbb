"""Tokens on disk: ArrayRecord shards with a manifest, read by random access. A shard is the tokens of neighbouring
documents, cut into records of equal length; the last may be shorter. A record is little-endian unsigned integers of 16
bits, or 32 for vocabularies above 65536. Shards lie end to end in the order of the manifest."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module as array_record
from etils import epath

from sedd_jax.data import tokenizers
from sedd_jax.data.corpora import SPLITS
from sedd_jax.data.packing import TokenStream, token_dtype
from sedd_jax.errors import InputError, explained
from sedd_jax.files import in_bucket

PREFIX = "shards:"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
VERSION = 1

_NAME = re.compile(r"(train|valid)-(\d{5,})-(\d{5,})\.array_record")  # stays in the manifest's directory


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file. tokens: with the ends of text. size, sha256: of the file. text: digest of its documents."""

    name: str
    tokens: int
    documents: int
    bytes: int
    characters: int
    size: int
    sha256: str
    text: str

    def __post_init__(self):
        counts = (self.tokens, self.documents, self.bytes, self.characters, self.size)
        strings = (self.name, self.sha256, self.text)
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(f"counts {counts}")
        if not all(isinstance(string, str) for string in strings) or not _NAME.fullmatch(self.name):
            raise ValueError(f"shard name {self.name!r}")

    @property
    def place(self) -> tuple[str, int, int]:
        """(split, part of the source, block in it), by which shards are ordered."""
        split, part, block = _NAME.fullmatch(self.name).groups()  # type: ignore[union-attr]
        return split, int(part), int(block)


class Manifest(NamedTuple):
    """record_tokens: tokens per record. kind: of the tokenizer. made_from: the plan of `prepare`."""

    fingerprint: str
    kind: str
    vocab_size: int
    record_tokens: int
    shards: dict[str, tuple[Shard, ...]]
    made_from: dict[str, Any]

    def counts(self, split: str) -> dict[str, int]:
        """Tokens, documents, bytes and characters of one part."""
        names = ("tokens", "documents", "bytes", "characters")
        return {name: sum(getattr(shard, name) for shard in self.shards[split]) for name in names}

    def to_json(self) -> str:
        tokenizer = {"kind": self.kind, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}
        about = {"version": VERSION, "tokenizer": tokenizer, "dtype": token_dtype(self.vocab_size).name}
        about |= {"record_tokens": self.record_tokens, "made_from": self.made_from}
        listed = {split: {"shards": [*map(dataclasses.asdict, shards)]} for split, shards in self.shards.items()}
        splits = {split: self.counts(split) | shards for split, shards in listed.items()}
        return json.dumps(about | {"splits": splits}, indent=1) + "\n"


def read_manifest(directory: pathlib.Path | epath.Path) -> Manifest:
    """Raises InputError if it is missing, damaged or inconsistent. Does not look at the shards."""
    path = directory / MANIFEST
    unfinished = explained(f"no {path}", "give a directory in which `prepare` has come to its end", OSError)
    damages = ValueError, KeyError, TypeError, AttributeError, RecursionError
    with unfinished, explained(f"{path} is damaged", "prepare into another directory", *damages):
        content = json.loads(path.read_text())
        if (version := content["version"]) != VERSION:
            raise InputError(f"{path} is of format version {version!r}, this version reads {VERSION}: prepare anew")
        shards = {split: tuple(Shard(**shard) for shard in content["splits"][split]["shards"]) for split in SPLITS}
        about = {name: content["tokenizer"][name] for name in ("kind", "fingerprint", "vocab_size")}
        about |= {name: content[name] for name in ("record_tokens", "made_from")}
        manifest = Manifest(**about, shards=shards)
        names = [shard.name for split in SPLITS for shard in shards[split]]
        sound = json.loads(manifest.to_json()) == content and manifest.record_tokens > 0 and all(shards.values())
        if not sound or type(manifest.made_from) is not dict or len(set(names)) < len(names):
            raise ValueError("its figures do not agree")
        return manifest


class ShardedStream(TokenStream):
    """A `TokenStream` on disk. Memory does not grow with the number of tokens read."""

    def __init__(self, root: pathlib.Path | epath.Path, manifest: Manifest, split: str):
        self._shards = manifest.shards[split]
        for shard in self._shards:
            path = root / shard.name
            with explained(f"cannot read {path}", _AGAIN, OSError):
                size = path.stat().length if in_bucket(root) else path.stat().st_size
            if size != shard.size:  # ArrayRecord takes a truncated file for an empty one.
                raise InputError(f"{path} has {size} bytes instead of {shard.size}: {_AGAIN}")
        counts = manifest.counts(split)
        self.num_bytes, self.num_documents = counts["bytes"], counts["documents"]
        self._root, self._vocab_size, self._per_record = root, manifest.vocab_size, manifest.record_tokens
        self._dtype = token_dtype(manifest.vocab_size).newbyteorder("<")
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._shards))
        self._reader = functools.lru_cache(maxsize=256)(self._open)  # an open shard costs a file handle and an index

    def __len__(self) -> int:
        return self._ends[-1]

    def content(self) -> bytes:
        return "".join(f"{shard.sha256} {shard.tokens}\n" for shard in self._shards).encode()

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """See `TokenStream.read`. Reads each record once. Raises InputError for a damaged shard."""
        tokens = np.empty((len(starts), length), np.int32)
        pieces: dict[int, list[tuple[int, int, np.ndarray]]] = {}
        for row, start in zip(tokens, starts.tolist(), strict=True):
            position, done = start % len(self), 0
            while done < length:
                number = bisect.bisect_right(self._ends, position)
                end, size = self._ends[number], self._shards[number].tokens
                record, offset = divmod(position - end + size, self._per_record)
                count = min(length - done, self._per_record - offset, end - position)
                pieces.setdefault(number, []).append((record, offset, row[done : done + count]))
                done += count
                position = (position + count) % len(self)
        for number, parts in pieces.items():
            records = self._records(number, sorted({record for record, _, _ in parts}))
            for record, offset, target in parts:
                target[:] = records[record][offset : offset + len(target)]
        if tokens.size and tokens.max() >= self._vocab_size:
            raise InputError(f"{self._root} holds the token {tokens.max()}, of {self._vocab_size}: {_AGAIN}")
        return tokens

    def _records(self, number: int, wanted: list[int]) -> dict[int, np.ndarray]:
        shard, path = self._shards[number], self._root / self._shards[number].name
        with explained(f"{path} is damaged", _AGAIN, RuntimeError, ValueError, IndexError):
            found = [np.frombuffer(record, self._dtype) for record in self._reader(number).read(wanted)]
        sizes = [min(self._per_record, shard.tokens - record * self._per_record) for record in wanted]
        if [len(record) for record in found] != sizes:
            raise InputError(f"{path} has records of another length than its manifest: {_AGAIN}")
        return dict(zip(wanted, found, strict=True))

    def _open(self, number: int) -> array_record.ArrayRecordReader:
        path = _local(self._root / self._shards[number].name, self._shards[number].sha256)
        options = "readahead_buffer_size:0,max_parallelism:0"
        return array_record.ArrayRecordReader(path, options, file_reader_buffer_size=1 << 14)


class Shards(NamedTuple):
    """A prepared corpus."""

    manifest: Manifest
    tokenizer: tokenizers.Tokenizer
    train: ShardedStream
    valid: ShardedStream


def load(directory: str) -> Shards:
    """Opens a directory that `prepare` made. Raises InputError if the manifest is damaged, the tokenizer is not the one
    that made the shards, or a file is missing or of another size. Contents are checked when they are read."""
    root = epath.Path(directory) if in_bucket(directory) else pathlib.Path(os.path.expanduser(directory))
    manifest = read_manifest(root)
    tokenizer = tokenizers.load(root / TOKENIZER)
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (manifest.fingerprint, manifest.vocab_size):
        raise InputError(f"{root / TOKENIZER} is not the tokenizer that made these shards: put that one back")
    return Shards(manifest, tokenizer, *(ShardedStream(root, manifest, split) for split in SPLITS))


def _local(path: pathlib.Path | epath.Path, sha256: str) -> str:
    """The file; of one in a bucket, which ArrayRecord does not read, a copy that this machine makes once."""
    if not in_bucket(path):
        return str(path)
    copy = epath.Path(f"~/.cache/sedd_jax/shards/{sha256}").expanduser()
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        path.copy(f"{copy}.{os.urandom(4).hex()}").replace(copy)
    return str(copy)


_AGAIN = "start `prepare` again with the same flags, which makes missing and damaged shards"


def write_records(path: pathlib.Path, tokens: np.ndarray, record_tokens: int) -> None:
    """Writes a shard in one move, so that after a kill `path` is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # One record per group, so that only the requested records are read; and tokens hardly compress.
    writer = array_record.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    little = tokens.astype(tokens.dtype.newbyteorder("<"))
    for start in range(0, len(tokens), record_tokens):
        writer.write(little[start : start + record_tokens].tobytes())
    writer.close()
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def is_sound(root: pathlib.Path, shard: Shard) -> bool:
    """Whether the file exists and is unchanged. Reads all of it."""
    try:
        return sha256(root / shard.name) == shard.sha256
    except OSError:
        return False


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
