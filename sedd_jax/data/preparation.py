"""A corpus as shards: tokenised once, by several processes, and resumed where it was interrupted. Neighbouring
documents of about `shard_bytes` are a block, and a block becomes a shard. So the output depends only on the documents
and the plan, shards can be made in any order, and existing ones are kept."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from sedd_jax import lock
from sedd_jax.data import corpora, shards, tokenizers
from sedd_jax.data.packing import progress_bar, tokenize
from sedd_jax.data.shards import Manifest, Shard
from sedd_jax.errors import InputError, TrainingError, explained
from sedd_jax.files import in_bucket, write_atomically

JOURNAL = "progress.jsonl"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that determines the output. shard_bytes: UTF-8 bytes after which a shard is closed. record_tokens:
    tokens per record of a shard. The others: see `corpora.documents`, `corpora.read` and `tokenizers.make`."""

    data: str
    valid_data: str | None = None
    valid_fraction: float = 0.01
    text_field: str = "text"
    separator: str | None = None
    tokenizer: str = "bytes"
    tokenizer_path: str | None = None
    vocab_size: int | None = None
    shard_bytes: int = 1 << 26
    record_tokens: int = 1 << 12

    def parts(self, source: str) -> list[corpora.Part]:
        return corpora.parts(source, text_field=self.text_field, separator=self.separator, size=self.shard_bytes)

    def pieces(self, cut: int) -> Iterator[tuple[tuple[str, int], str]]:
        """See `corpora.divide`. cut: the number of characters of `data` for training."""
        yield from corpora.divide(self.parts(self.data), cut)
        if self.valid_data is not None:
            yield from corpora.divide(self.parts(self.valid_data), 0)


class Block(NamedTuple):
    """Documents, none of them empty, and the name of their shard."""

    name: str
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            encoded = text.encode()
            digest.update(b"%d\n" % len(encoded) + encoded)
        return digest.hexdigest()


def prepare(plan: Plan, output: str, *, workers: int = 1, progress: bool = False) -> tuple[Manifest, int]:
    """Makes the shards of a plan in the directory `output`, or those that are missing there or fail their checksum.
    Returns the manifest, and how many shards existed already. Raises InputError if the source cannot be read, or
    `output` holds anything but this preparation; TrainingError if a worker was killed."""
    if in_bucket(output):
        raise InputError(f"output {output}: ArrayRecord writes to disks; copy from one with `gcloud storage cp -r`")
    root = pathlib.Path(os.path.expanduser(output))
    there = {shard.name: shard for shard in find(plan, root)}
    kept = {name: shard for name, shard in there.items() if shards.is_sound(root, shard)}
    if there and len(kept) == len(there) and (root / shards.MANIFEST).exists():
        return shards.load(output).manifest, len(kept)
    if (root / JOURNAL).exists():
        with lock.hold(root, "output"):  # before the text is read, which takes long
            pass
    num_bytes, cut = survey(plan, progress=progress)
    made = [*kept.values()]
    with begin(plan, root, kept=made, cut=cut):
        make = functools.partial(make_shard, root, plan.record_tokens)
        bar = progress_bar("tokenizing", num_bytes, show=progress, initial=sum(shard.bytes for shard in made))
        with bar, open(root / JOURNAL, "a") as journal:
            for shard in _make_all(make, _missing(plan, cut, there, kept), workers):
                made.append(shard)
                print(json.dumps(dataclasses.asdict(shard)), file=journal, flush=True)
                bar.update(shard.bytes)
        return finish(plan, root, made), len(kept)


def _make_all(make: Callable[[Block], Shard], blocks: Iterator[Block], workers: int) -> Iterator[Shard]:
    """The shards as they are finished. At most two blocks per worker are held in memory."""
    if workers == 1:
        yield from map(make, blocks)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=_begin_worker)
    running: set[concurrent.futures.Future[Shard]] = set()
    try:
        for block in blocks:
            running.add(pool.submit(make, block))
            if len(running) >= 2 * workers:
                done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                yield from (future.result() for future in done)
        yield from (future.result() for future in concurrent.futures.as_completed(running))
    except BrokenProcessPool as error:
        what = "a worker process was killed, perhaps out of memory; finished shards stay, and the same command goes on"
        raise TrainingError(f"{what}: give fewer than workers={workers}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    def end_with_parent() -> None:  # if it is killed, the workers would wait for work forever
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends, the workers finish their item
    threading.Thread(target=end_with_parent, daemon=True).start()


def find(plan: Plan, root: pathlib.Path) -> list[Shard]:
    """The shards that an earlier preparation of the same plan has recorded as finished."""
    if not root.exists():
        return []
    if not root.is_dir():
        raise InputError(f"output {root} is a file: give a directory")
    if (root / shards.MANIFEST).exists():
        manifest = shards.read_manifest(root)
        made_from, found = manifest.made_from, [shard for split in manifest.shards.values() for shard in split]
    elif (root / JOURNAL).exists():
        # The shard of an incomplete last line, from a process that was killed, is made again.
        remedy = f"delete {root} or give another output"
        with explained(f"{root / JOURNAL} is damaged", remedy, ValueError, TypeError, OSError, RecursionError):
            made_from, *records = map(json.loads, filter(None, (root / JOURNAL).read_text().split("\n")[:-1]))
            made_from, found = {**made_from}, [Shard(**record) for record in records]
    elif any(not path.name.startswith(".") for path in root.iterdir()):
        raise InputError(f"output {root} holds other files: give a directory that is empty or not there yet")
    else:
        return []
    for name, value in dataclasses.asdict(plan).items():
        if made_from.get(name) != value:
            there = f"output {root} holds another corpus: {name} is {made_from.get(name)!r} there and {value!r} here"
            raise InputError(f"{there}; give another output or the same flags")
    return found


@contextlib.contextmanager
def begin(plan: Plan, root: pathlib.Path, *, kept: Collection[Shard] = (), cut: int | None = None) -> Iterator[None]:
    """Writes the journal and the tokenizer, removes temporary files of killed processes, and holds `root` meanwhile.
    cut: see `survey`; to train a tokenizer, on the training text, or on evenly spread documents of a long one."""
    saved, texts = root / shards.TOKENIZER, list[str]()
    if cut is not None and plan.vocab_size is not None and plan.tokenizer_path is None and not [*saved.glob("*.json")]:
        training = (text for _, text in itertools.takewhile(lambda piece: piece[0][0] == "train", plan.pieces(cut)))
        texts = [*itertools.islice(training, 0, None, 1 + cut // 50_000_000)]
    given = {"vocab_size": plan.vocab_size, "path": plan.tokenizer_path, "texts": texts, "directory": saved}
    tokenizer = tokenizers.make(plan.tokenizer, **given)
    if kept and tokenizers.load(saved).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{saved} is another tokenizer than that of the flags: put the old file back or prepare anew")
    with lock.hold(root, "output"):
        find(plan, root)  # again, since another preparation may have been here meanwhile
        for path in (*root.glob(".*.tmp"), *root.glob(".*.new")):
            path.unlink()
        lines = [dataclasses.asdict(plan), *map(dataclasses.asdict, kept)]
        write_atomically(root / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
        tokenizer.save(saved)
        load_tokenizer.cache_clear()
        yield


def finish(plan: Plan, root: pathlib.Path, made: Iterable[Shard]) -> Manifest:
    """Writes the manifest, which makes the directory a corpus."""
    tokenizer = load_tokenizer(root)
    ordered = sorted(made, key=lambda shard: shard.place)
    listed = {split: tuple(shard for shard in ordered if shard.place[0] == split) for split in corpora.SPLITS}
    about = {"fingerprint": tokenizer.fingerprint, "kind": plan.tokenizer, "vocab_size": tokenizer.vocab_size}
    manifest = Manifest(**about, record_tokens=plan.record_tokens, shards=listed, made_from=dataclasses.asdict(plan))
    write_atomically(root / shards.MANIFEST, manifest.to_json())
    (root / JOURNAL).unlink(missing_ok=True)
    return manifest


def _missing(plan: Plan, cut: int, there: dict[str, Shard], kept: dict[str, Shard]) -> Iterator[Block]:
    unseen = set(there)
    # A block does not cross the end of a part of its source.
    for (split, number), group in itertools.groupby(plan.pieces(cut), key=lambda piece: piece[0]):
        for block in part_blocks(split, number, (text for _, text in group), plan.shard_bytes):
            unseen.discard(block.name)
            if block.name in there and there[block.name].text != block.digest:
                raise InputError(f"the text of {block.name} has changed since it was prepared: give another output")
            if block.name not in kept:
                yield block
    if unseen:
        raise InputError(f"the text of {min(unseen)} is gone since it was prepared: prepare into another output")


def survey(plan: Plan, *, progress: bool = False) -> tuple[int, int]:
    """Reads all documents once, so that their errors are reported before anything is written. Returns the UTF-8 bytes
    of all text, and the number of characters of `data` for training."""
    num_bytes, characters = 0, []
    for source in [plan.data] if plan.valid_data is None else [plan.data, plan.valid_data]:
        characters.append(0)
        with progress_bar(f"reading {source}", None, show=progress) as bar:
            for text in itertools.chain.from_iterable(part() for part in plan.parts(source)):
                characters[-1] += len(text)
                bar.update(size := len(text.encode()))
                num_bytes += size
        if not characters[-1]:
            raise InputError(f"data source {source!r} holds no text: give files that are not empty")
    return num_bytes, characters[0] if len(characters) > 1 else corpora.cut_of(characters[0], plan.valid_fraction)


def part_blocks(split: str, number: int, texts: Iterable[str], shard_bytes: int) -> Iterator[Block]:
    """The blocks of part `number` of a source."""
    held, count, size = list[str](), 0, 0
    for text in itertools.chain(filter(None, texts), [None]):  # None marks the end
        if text is not None:
            held.append(text)
            size += len(text.encode())
        if held and (text is None or size >= shard_bytes):
            yield Block(f"{split}-{number:05d}-{count:05d}.array_record", tuple(held))
            held, count, size = [], count + 1, 0


def make_shard(root: pathlib.Path, record_tokens: int, block: Block) -> Shard:
    """Writes the shard of a block, with the tokenizer saved in `root`."""
    stream, path = tokenize(block.texts, load_tokenizer(root)), root / block.name
    shards.write_records(path, stream.tokens, record_tokens)
    counts = {"tokens": len(stream), "documents": stream.num_documents, "bytes": stream.num_bytes}
    file = {"size": path.stat().st_size, "sha256": shards.sha256(path)}
    return Shard(block.name, **counts, characters=sum(map(len, block.texts)), **file, text=block.digest)


@functools.lru_cache(maxsize=1)
def load_tokenizer(root: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer saved in `root`, once per process."""
    return tokenizers.load(root / shards.TOKENIZER)
