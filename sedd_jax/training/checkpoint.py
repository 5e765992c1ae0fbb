"""Checkpoints that are whole or not used: Orbax writes them, a manifest of hashes proves them at restore.

Orbax commits a step atomically, but what it reads back later is whatever the disk says: flipped bytes are not noticed,
another dtype is cast in silence, an empty folder counts as the newest step. So each checkpoint carries a record with
the dtype, shape and hash of every leaf. The hashes are taken on the devices, of the arrays as they are about to be
saved and as they have been placed again, so they cover the whole way there and back, whatever the two meshes are.
"""

import contextlib
import gc
import json
import logging
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from sedd_jax.errors import InputError


class Restored(NamedTuple):
    """A checkpoint that has been verified.

    Attributes:
        step: the step it was saved at.
        state: the saved tree, each leaf placed on the sharding that was asked for.
        position: global batches that the data loader had handed out.
        config: the config of the run that saved it, as plain JSON values (tuples come back as lists).
    """

    step: int
    state: Any
    position: int
    config: dict


class Checkpoints:
    """The checkpoints of one run, in one directory. Every process of the run makes the same calls."""

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_last: int = 3,
        keep_period: int | None = None,
        read_only: bool = False,
    ):
        """Opens the directory, and creates it unless `read_only`.

        Args:
            directory: local path or bucket URL that holds one folder per step.
            keep_last: how many of the newest checkpoints stay; with 1 there is none to fall back on.
            keep_period: steps divisible by this stay for good. None keeps no others.
            read_only: leave the directory exactly as it is; `save` is then an error.

        Raises:
            InputError: a number to keep is below 1, or `directory` is a file.
        """
        for name, value in (("keep_last", keep_last), ("keep_period", keep_period)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: keep at least 1")
        path = epath.Path(directory)
        # Tensorstore takes no relative paths, and a bucket URL counts as absolute but would not survive `absolute`.
        self._directory = path if path.is_absolute() else path.absolute()
        if self._directory.exists() and not self._directory.is_dir():
            raise InputError(f"{self._directory} is a file: name a directory for the checkpoints")
        self._read_only = read_only
        kept = [policies.LatestN(keep_last)]
        if keep_period is not None:
            kept.append(policies.EveryNSteps(keep_period))
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                save_root_metadata=False,
                # Else a damaged metadata file of any one step would keep the directory from being opened.
                lightweight_initialize=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, ascending, whether or not they would verify."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when no save is under way. Raises whatever made one fail."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, as `wait` does, and ends the threads that save."""
        self._manager.close()

    def save(self, step: int, state: Any, *, position: int, config: Mapping[str, Any]) -> None:
        """Saves in the background; `state` may be donated or deleted as soon as this returns.

        Args:
            step: the step the state has reached; not one of `steps()`.
            state: tree of jax arrays, spread over the processes in any way.
            position: global batches consumed so far.
            config: what JSON can hold.

        Raises:
            InputError: the directory is open read-only.
            ValueError: the step is saved already.
            Exception: whatever made the save before this one fail.
        """
        if self._read_only:
            raise InputError(f"{self._directory} is open read-only: open it for writing to save step {step}")
        hashes = _by_path(jax.device_get(fingerprint(state)))
        manifest = {path: {**layout, "hash": int(hashes[path])} for path, layout in _layout(state).items()}
        record = {"manifest": manifest, "position": int(position), "config": dict(config)}
        # `force` because Orbax otherwise skips, without a word, a step below the newest folder.
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), record=ocp.args.JsonSave({**record, "crc": _crc(record)})
            ),
            force=True,
        )

    def restore(self, abstract_state: Any, *, log: Callable[[str], None]) -> Restored | None:
        """The newest checkpoint that verifies, or None where there are no checkpoints at all.

        Newer ones that do not verify are moved to the folder `<directory>-damaged` beside this one, so that their
        steps can be saved again and nothing is lost. Nothing is moved if `read_only`, or if no checkpoint verifies.

        Args:
            abstract_state: tree of `jax.ShapeDtypeStruct` with shardings: where each leaf goes, on any mesh.
            log: called with one line per damaged checkpoint that was passed over.

        Raises:
            InputError: a checkpoint is sound but of another model than `abstract_state`, or none of them is sound.
        """
        self.wait()
        damaged: dict[int, str] = {}
        restored = None
        with _no_stray_reports():
            for step in reversed(self.steps()):
                try:
                    restored = self._load(step, abstract_state)
                    break
                except _Damaged as error:
                    damaged[step] = str(error)
            if damaged:
                gc.collect()
        if damaged and restored is None:
            newest, reason = next(iter(damaged.items()))
            raise InputError(
                f"none of the checkpoints {sorted(damaged)} in {self._directory} can be used; {newest}: {reason}. "
                "Put back a copy of one, or remove them to start afresh"
            )
        for step, reason in damaged.items():
            log(f"checkpoint {step} is damaged ({reason}); using the one before, {restored.step}")
        if damaged and not self._read_only:
            self._move_aside(damaged)
        return restored

    def _load(self, step: int, abstract_state: Any) -> Restored:
        record = _on_every_process(lambda: self._read_record(step))
        _require_same_layout(record["manifest"], abstract_state, self._directory / str(step))
        state = _on_every_process(
            lambda: self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            )["state"]
        )
        # Each process hashes its own copy of what is replicated, so they need not find the same.
        _on_every_process(lambda: _require_same_hashes(record["manifest"], state))
        return Restored(step, state, record["position"], record["config"])

    def _read_record(self, step: int) -> dict:
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        if record.pop("crc") != _crc(record):
            raise _Damaged("its record has been altered")
        return record

    def _move_aside(self, steps: Mapping[int, str]) -> None:
        if jax.process_index() == 0:
            aside = self._directory.parent / f"{self._directory.name}-damaged"
            aside.mkdir(parents=True, exist_ok=True)
            for step in steps:
                target, copies = aside / str(step), 0
                while target.exists():
                    copies += 1
                    target = aside / f"{step}-{copies}"
                (self._directory / str(step)).rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints moved aside")
        self._manager.reload()


def fingerprint(tree: Any) -> Any:
    """A 32-bit hash of each leaf's bits: a tree of uint32 scalars.

    Exact, and the same on any mesh, number of processes and kind of device, because it is a sum of integers. Any change
    within one word changes the hash; other damage goes unseen with probability 2^-32.
    """
    return jax.tree.map(_hash, tree)


@jax.jit
def _hash(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        words = leaf.astype(jnp.uint32)
    else:
        # 64-bit values become two words along a new last axis, so that x64 need not be enabled.
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # Built from one iota per axis because a reshape of a sharded array would gather it.
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The finaliser of MurmurHash3: for a given index it is a bijection of the word.
    mixed = words ^ (index * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


class _Damaged(Exception):
    """A checkpoint that cannot be used, and in a few words why."""


def _on_every_process(read: Callable[[], Any]) -> Any:
    """What `read` returns; `_Damaged` on every process if it fails on any.

    Without the agreement one process would go on to the next checkpoint and the others wait for it in this one.
    """
    try:
        value, reason = read(), ""
    except _Damaged as error:
        value, reason = None, str(error)
    # Orbax, Tensorstore and the codecs raise a dozen types between them for files cut short or overwritten.
    except Exception as error:
        value, reason = None, textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
    if not np.all(multihost_utils.process_allgather(np.array(not reason))):
        raise _Damaged(reason or "another process could not read it")
    return value


@contextlib.contextmanager
def _no_stray_reports() -> Iterator[None]:
    """Keeps a damaged checkpoint from burying its one line of explanation under hundreds.

    At the first array that fails Orbax closes its event loop; the others then report, from Tensorstore's threads and
    from the garbage collector, that nobody waits for them any more.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled = logger.disabled
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            yield
    finally:
        logger.disabled, sys.unraisablehook = disabled, hook


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _layout(tree: Any) -> dict[str, dict]:
    return {path: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)} for path, leaf in _by_path(tree).items()}


def _require_same_layout(manifest: Mapping[str, dict], abstract_state: Any, folder: epath.Path) -> None:
    here = _layout(abstract_state)
    for path in [*here, *(path for path in manifest if path not in here)]:
        wanted, saved = (_show(layout.get(path)) for layout in (here, manifest))
        if wanted != saved:
            raise InputError(
                f"{path} is {saved} in the checkpoint {folder} but {wanted} in this run: "
                "use the config it was saved with, or another workdir"
            )


def _require_same_hashes(manifest: Mapping[str, dict], state: Any) -> None:
    for path, value in _by_path(jax.device_get(fingerprint(state))).items():
        if int(value) != manifest[path]["hash"]:
            raise _Damaged(f"{path} is not what was saved")


def _show(leaf: Mapping[str, Any] | None) -> str:
    return "absent" if leaf is None else f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]"


def _crc(record: Mapping[str, Any]) -> int:
    # Through JSON and back, as the record itself goes: integer keys sort in another order once they are strings.
    plain = json.loads(json.dumps(record))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
