"""Shards made by several processes, with a journal of the finished ones."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import tqdm

from sedd_jax.data import preparation, shards, tokenizers
from sedd_jax.data.preparation import Block, Plan
from sedd_jax.data.shards import Manifest, Shard
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.files import make_directory, write_atomically

JOURNAL = "progress.jsonl"


def prepare(plan: Plan, output: str, *, workers: int = 1, progress: bool = False) -> tuple[Manifest, int]:
    """Makes the shards of a plan in the directory `output`, or those that are missing there.

    Returns the manifest, and how many shards existed already; each was compared with its checksum.
    Raises InputError if the source cannot be read, or `output` holds anything but this preparation; TrainingError if a
    worker was killed.
    """
    if workers < 1:
        raise InputError(f"workers={workers}: give at least 1")
    root = pathlib.Path(os.path.expanduser(output))
    there = {shard.name: shard for shard in find(plan, root)}
    kept = {name: shard for name, shard in there.items() if shards.is_sound(root, shard)}
    if there and len(kept) == len(there) and (root / shards.MANIFEST).exists():
        return shards.load(output).manifest, len(kept)
    size = preparation.survey(plan, progress=progress)
    tokenizer = preparation.make_tokenizer(plan, root, size)
    begin(plan, root, tokenizer, kept)
    made, done = dict(kept), sum(shard.bytes for shard in kept.values())
    options = {"unit": "B", "unit_scale": True, "delay": 1, "disable": not progress}
    with (
        tqdm.tqdm(desc="tokenizing", total=size.num_bytes, initial=done, **options) as bar,
        open(root / JOURNAL, "a") as journal,
    ):
        for shard in _make_all(_missing(plan, size.cut, there, kept), root, tokenizer, plan.record_tokens, workers):
            made[shard.name] = shard
            print(json.dumps(dataclasses.asdict(shard)), file=journal, flush=True)
            bar.update(shard.bytes)
    manifest = preparation.make_manifest(plan, tokenizer, made.values())
    finish(root, manifest)
    return manifest, len(kept)


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
        lines = [line for line in (root / JOURNAL).read_text().split("\n")[:-1] if line]
        try:
            made_from, *records = map(json.loads, lines)
            found = [Shard(**record) for record in records]
            if not isinstance(made_from, dict):
                raise ValueError("no plan")
        except (ValueError, TypeError) as error:
            raise InputError(f"{root / JOURNAL} is damaged: delete {root} or give another output") from error
    elif any(not path.name.startswith(".") for path in root.iterdir()):
        raise InputError(f"output {root} holds other files: give a directory that is empty or not there yet")
    else:
        return []
    asked = json.loads(json.dumps(dataclasses.asdict(plan)))
    for name, value in asked.items():
        if made_from.get(name) != value:
            raise InputError(
                f"output {root} holds another corpus: {name} is {made_from.get(name)!r} there and {value!r} here; give "
                "another output or the same flags"
            )
    return found


def begin(plan: Plan, root: pathlib.Path, tokenizer: Tokenizer, kept: dict[str, Shard]) -> None:
    """Writes the journal and the tokenizer, and removes temporary files of killed processes."""
    saved = root / shards.TOKENIZER
    if kept and tokenizers.load(saved).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{saved} is not the tokenizer that is asked for now: put the old file back or prepare anew")
    make_directory(root, "output")
    for path in (*root.glob(".*.tmp"), *root.glob(".*.new")):
        path.unlink()
    lines = [dataclasses.asdict(plan), *map(dataclasses.asdict, kept.values())]
    write_atomically(root / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
    tokenizer.save(saved)


def finish(root: pathlib.Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes the directory a corpus."""
    write_atomically(root / shards.MANIFEST, manifest.to_json())
    (root / JOURNAL).unlink(missing_ok=True)


def _missing(plan: Plan, cut: int | None, there: dict[str, Shard], kept: dict[str, Shard]) -> Iterator[Block]:
    unseen = set(there)
    for block in preparation.blocks(plan, cut):
        unseen.discard(block.name)
        if block.name in there and there[block.name].text != block.digest:
            raise InputError(f"the text of {block.name} has changed since it was prepared: prepare into another output")
        if block.name not in kept:
            yield block
    if unseen:
        raise InputError(f"the text of {min(unseen)} is gone since it was prepared: prepare into another output")


def _make_all(
    missing: Iterator[Block], root: pathlib.Path, tokenizer: Tokenizer, record_tokens: int, workers: int
) -> Iterator[Shard]:
    """Yields the shards as they are finished."""
    if workers == 1:
        yield from (preparation.make_shard(root, block, tokenizer, record_tokens) for block in missing)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(root, record_tokens)
    )
    running: set[concurrent.futures.Future[Shard]] = set()
    try:
        for block in missing:
            running.add(pool.submit(_work, block))
            # At most one waiting block per worker is held in memory.
            if len(running) >= 2 * workers:
                done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                yield from (future.result() for future in done)
        yield from (future.result() for future in concurrent.futures.as_completed(running))
    except BrokenProcessPool as error:
        raise TrainingError(
            "a worker process was killed, perhaps out of memory; finished shards stay, and the same command continues: "
            f"give fewer than workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(root: pathlib.Path, record_tokens: int) -> None:
    """Initialises a worker process."""
    global _setting
    _setting = root, tokenizers.load(root / shards.TOKENIZER), record_tokens
    # Ctrl-C reaches all processes: the parent ends, and the workers finish their current shard.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If the parent is killed, the workers would wait for work forever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(block: Block) -> Shard:
    root, tokenizer, record_tokens = _setting
    return preparation.make_shard(root, block, tokenizer, record_tokens)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
