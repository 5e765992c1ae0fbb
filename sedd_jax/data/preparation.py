"""A corpus as shards: tokenised once, by several processes, and resumed where it was interrupted.

Neighbouring documents of about `shard_bytes` are a block, and a block becomes a shard. So the output depends only on
the documents and the plan, shards can be made in any order, and existing ones are kept.
"""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import tqdm

from sedd_jax.data import corpora, shards, tokenizers
from sedd_jax.data.packing import tokenize
from sedd_jax.data.shards import Manifest, Shard
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that determines the output. data, valid_data, text_field: see `corpora.documents`; valid_fraction: see
    `corpora.read`; tokenizer, tokenizer_path, vocab_size: see `tokenizers.make`; shard_bytes: UTF-8 bytes after which a
    shard is closed; record_tokens: tokens per record of a shard."""

    data: str
    valid_data: str | None = None
    valid_fraction: float = 0.01
    text_field: str = "text"
    tokenizer: str = "bytes"
    tokenizer_path: str | None = None
    vocab_size: int | None = None
    shard_bytes: int = 1 << 26
    record_tokens: int = 1 << 12

    def __post_init__(self):
        for name in ("shard_bytes", "record_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: give at least 1")

    def parts(self, source: str) -> list[corpora.Part]:
        return corpora.parts(source, text_field=self.text_field, size=self.shard_bytes)


@dataclasses.dataclass(frozen=True)
class Block:
    """Documents, none of them empty, and the name of their shard."""

    name: str
    texts: tuple[str, ...]
    num_bytes: int

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            encoded = text.encode()
            digest.update(b"%d\n" % len(encoded) + encoded)
        return digest.hexdigest()


class Survey(NamedTuple):
    """num_bytes: of all text. train_characters: characters for training. cut: where in `data` they end, or None if the
    validation text is a separate source."""

    num_bytes: int
    train_characters: int
    cut: int | None


def survey(plan: Plan, *, progress: bool = False) -> Survey:
    """Reads all documents once, so that their errors are reported before anything is written."""
    num_bytes, characters = 0, []
    for source in filter(None, (plan.data, plan.valid_data)):
        characters.append(0)
        with tqdm.tqdm(desc=f"reading {source}", unit="B", unit_scale=True, delay=1, disable=not progress) as bar:
            for text in itertools.chain.from_iterable(part() for part in plan.parts(source)):
                characters[-1] += len(text)
                bar.update(size := len(text.encode()))
                num_bytes += size
        if not characters[-1]:
            raise InputError(f"data source {source!r} holds no text: give files that are not empty")
    cut = None if plan.valid_data is not None else corpora.cut_of(characters[0], plan.valid_fraction)
    return Survey(num_bytes, characters[0] if cut is None else cut, cut)


def blocks(plan: Plan, cut: int | None) -> Iterator[Block]:
    """All blocks in order. A block does not cross the end of a part of its source."""
    for (split, number), group in itertools.groupby(_pieces(plan, cut), key=lambda piece: piece[0]):
        yield from part_blocks(split, number, (text for _, text in group), plan.shard_bytes)


def _pieces(plan: Plan, cut: int | None) -> Iterator[tuple[tuple[str, int], str]]:
    """((split, number of the part of its source), text), training first; the document at the cut is divided."""
    if cut is None:
        for split, source in zip(shards.SPLITS, (plan.data, plan.valid_data), strict=True):
            for number, part in enumerate(plan.parts(source)):
                yield from (((split, number), text) for text in part())
        return
    start = 0
    for number, part in enumerate(plan.parts(plan.data)):
        for text in part():
            inside = max(cut - start, 0)
            start += len(text)
            for split, piece in zip(shards.SPLITS, (text[:inside], text[inside:]), strict=True):
                if piece:
                    yield (split, number), piece


def part_blocks(split: str, number: int, texts: Iterable[str], shard_bytes: int) -> Iterator[Block]:
    count = itertools.count()
    held: list[str] = []
    size = 0
    for text in filter(None, texts):
        held.append(text)
        size += len(text.encode())
        if size >= shard_bytes:
            yield Block(f"{split}-{number:05d}-{next(count):05d}.array_record", tuple(held), size)
            held, size = [], 0
    if held:
        yield Block(f"{split}-{number:05d}-{next(count):05d}.array_record", tuple(held), size)


def make_shard(root: pathlib.Path, block: Block, tokenizer: Tokenizer, record_tokens: int) -> Shard:
    """Writes the shard of a block."""
    stream = tokenize(block.texts, tokenizer)
    path = root / block.name
    shards.write_records(path, stream.tokens, record_tokens)
    return Shard(
        name=block.name,
        tokens=len(stream),
        documents=stream.num_documents,
        bytes=stream.num_bytes,
        characters=sum(map(len, block.texts)),
        size=path.stat().st_size,
        sha256=shards.sha256(path),
        text=block.digest,
    )


def make_manifest(plan: Plan, tokenizer: Tokenizer, made: Iterable[Shard]) -> Manifest:
    ordered = sorted(made, key=lambda shard: shards.place_of(shard.name))
    return Manifest(
        fingerprint=tokenizer.fingerprint,
        kind=plan.tokenizer,
        vocab_size=tokenizer.vocab_size,
        record_tokens=plan.record_tokens,
        shards={split: tuple(s for s in ordered if s.name.startswith(f"{split}-")) for split in shards.SPLITS},
        made_from=dataclasses.asdict(plan),
    )


def make_tokenizer(plan: Plan, root: pathlib.Path, size: Survey | None) -> Tokenizer:
    """The tokenizer that is saved in root, or that of the plan. `size` is needed to train one: on the training text, or
    on evenly spread documents of a long one."""
    saved = root / shards.TOKENIZER
    texts: list[str] = []
    if size is not None and plan.vocab_size is not None and plan.tokenizer_path is None and not [*saved.glob("*.json")]:
        training = itertools.takewhile(lambda piece: piece[0][0] == "train", _pieces(plan, size.cut))
        step = 1 + size.train_characters // 50_000_000
        texts = [text for _, text in itertools.islice(training, 0, None, step)]
    return tokenizers.make(
        plan.tokenizer, vocab_size=plan.vocab_size, path=plan.tokenizer_path, texts=texts, directory=saved
    )
