"""Checkpoints that are complete or not used: Orbax writes them, a manifest of hashes verifies them at restore. Orbax
commits a step atomically, but trusts the disk when it reads: it does not notice flipped bytes, casts another dtype
silently, and takes an empty folder for the newest step. So each checkpoint has a record with the dtype, shape and hash
of every leaf. The devices hash the arrays before they are saved and after they are restored, on any two meshes."""

import contextlib
import functools
import gc
import itertools
import json
import logging
import re
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
from orbax.checkpoint import checkpoint_managers as policies, type_handlers

from sedd_jax.errors import InputError, TrainingError
from sedd_jax.files import system_error


class Restored(NamedTuple):
    """A verified checkpoint. position: number of global batches consumed. config: that of the run, as JSON values."""

    step: int
    state: Any
    position: int
    config: dict


class Checkpoints(contextlib.ExitStack):
    """The checkpoints of one run, in one directory, to be used in a `with`, whose end waits for a save in progress.
    Every process of the run makes the same calls."""

    def __init__(self, directory: epath.PathLike, *, keep_last: int = 3, keep_period: int = 0, read_only: bool = False):
        """Opens the directory, a local path or bucket URL with one folder per step. Raises InputError if it is a file.
        keep_last: number of newest checkpoints that stay; with 1 there is none to fall back on. keep_period: steps
        divisible by this stay for good; 0 for none. read_only: leaves the directory as it is, and `save` fails."""
        super().__init__()
        path = epath.Path(directory)
        # Tensorstore takes no relative paths, and a bucket URL counts as absolute but would not survive `absolute`.
        self._directory = path if path.is_absolute() else path.absolute()
        if self._directory.exists() and not self._directory.is_dir():
            raise InputError(f"{self._directory} is a file: name a directory for the checkpoints")
        self._read_only = read_only
        _slice_large_leaves_only()
        kept = [policies.LatestN(keep_last), *([policies.EveryNSteps(keep_period)] if keep_period else [])]
        writing = dict.fromkeys(("create", "cleanup_tmp_directories"), not read_only)
        # Without the last one, a damaged metadata file of any step would prevent opening the directory.
        metadata = {"save_root_metadata": False, "lightweight_initialize": True}
        policy = policies.AnyPreservationPolicy(kept)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, **writing, **metadata)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self.enter_context(_no_stray_reports("Event loop is closed|RESOURCE_EXHAUSTED|TensorStore|No space"))
        self.callback(self._saving()(self._manager.close))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending, damaged or not: Orbax passes over what is not a folder."""
        found = [path for path in self._directory.iterdir() if path.name.isdigit()] if self._directory.exists() else []
        return sorted({*self._manager.all_steps(), *(int(path.name) for path in found if not path.is_dir())})

    def wait(self) -> None:
        """Waits for a save in progress. Raises TrainingError for one that failed, of a full disk say."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            known = system_error(error)
            # Tensorstore's errors are ValueErrors that begin with the name of a status.
            if not known and not (isinstance(error, ValueError) and re.match("[A-Z_]{6,}: ", str(error))):
                raise
            reason = known.strerror if known else str(error).rpartition(": ")[2].partition(" [")[0]
            what = f"a checkpoint cannot be saved in {self._directory}: {reason}; those that are complete stay"
            raise TrainingError(f"{what}, and once this is mended the same command goes on from the newest") from error

    def save(self, step: int, state: Any, *, position: int, config: Mapping[str, Any]) -> None:
        """Saves in the background; `state`, a tree of jax arrays on any mesh, may be donated or deleted as soon as this
        returns. position, config: see `Restored`. Raises ValueError for a step saved already, TrainingError if this
        save or the one before failed."""
        if self._read_only:
            raise InputError(f"{self._directory} is open read-only: open it for writing to save step {step}")
        hashes = jax.device_get(jax.tree.map(fingerprint, _by_path(state)))
        manifest = {path: {**layout, "hash": int(hashes[path])} for path, layout in _layout(state).items()}
        record = {"manifest": manifest, "position": int(position), "config": dict(config)}
        items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record | {"crc": _crc(record)})}
        with self._saving():  # without `force`, Orbax silently skips a step below the newest folder
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract_state: Any, *, log: Callable[[str], None], partial: bool = False) -> Restored | None:
        """The newest sound checkpoint, or None if there are no checkpoints at all. Newer, damaged ones move to the
        folder `<directory>-damaged` beside this one, so that their steps can be saved again and nothing is lost; but
        not if `read_only`, or if no checkpoint is sound.
        abstract_state: tree of `jax.ShapeDtypeStruct` with the sharding for each leaf, on any mesh. With `partial` it
        is a dict with a part of what was saved, and only that is read and verified; what was saved in bfloat16 comes
        back in the dtype that is asked for. log: called with one line per damaged checkpoint. Raises InputError if a
        checkpoint is sound but of another model than `abstract_state`, or if none is sound."""
        self.wait()
        damaged, restored = dict[int, str](), None
        with _no_stray_reports():
            for step in reversed(self.steps()):
                try:
                    restored = self._load(step, abstract_state, partial)
                    break
                except _Damaged as error:
                    damaged[step] = str(error)
            gc.collect()  # what damage, or an earlier run of this process on a full disk, has left
        if damaged and restored is None:
            newest, reason = next(iter(damaged.items()))
            what = f"none of the checkpoints {sorted(damaged)} in {self._directory} can be used; {newest}: {reason}"
            raise InputError(f"{what}. Put back a copy of one, or remove them to start afresh")
        for step, reason in damaged.items():
            log(f"checkpoint {step} is damaged ({reason}); using the one before, {restored.step}")
        if damaged and not self._read_only:
            self._move_aside(damaged)
        return restored

    def _load(self, step: int, abstract_state: Any, partial: bool) -> Restored:
        def read(name: str, item: Any) -> Any:
            return self._manager.restore(step, args=ocp.args.Composite(**{name: item}))[name]

        def read_record() -> dict:
            record = read("record", ocp.args.JsonRestore())
            if record.pop("crc") != _crc(record):
                raise _Damaged("its record has been altered")
            return record

        record = _on_every_process(read_record)
        saved_state, wanted = abstract_state, ocp.args.StandardRestore(abstract_state)
        if partial:
            short = {path for path, leaf in record["manifest"].items() if leaf["dtype"] == "bfloat16"}
            named = _by_path(abstract_state).items()
            leaves = [leaf.update(dtype=jnp.bfloat16) if path in short else leaf for path, leaf in named]
            saved_state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
            restore_args = ocp.checkpoint_utils.construct_restore_args(saved_state)
            wanted = ocp.args.PyTreeRestore(saved_state, restore_args=restore_args, partial_restore=True)
        _require_same_layout(record["manifest"], saved_state, self._directory / str(step), partial)
        state = _on_every_process(lambda: read("state", wanted))

        def verify() -> None:
            for path, value in jax.device_get(jax.tree.map(fingerprint, _by_path(state))).items():
                if int(value) != record["manifest"][path]["hash"]:
                    raise _Damaged(f"{path} is not what was saved")

        _on_every_process(verify)  # each process hashes its own copy of replicated arrays
        state = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, abstract_state)
        return Restored(step, state, record["position"], record["config"])

    def _move_aside(self, steps: Mapping[int, str]) -> None:
        if jax.process_index() == 0:
            aside = self._directory.parent / f"{self._directory.name}-damaged"
            aside.mkdir(parents=True, exist_ok=True)
            for step in steps:
                names = (f"{step}-{copies}" if copies else f"{step}" for copies in itertools.count())
                free = next(name for name in names if not (aside / name).exists())
                (self._directory / str(step)).rename(aside / free)
        multihost_utils.sync_global_devices("damaged checkpoints moved aside")
        self._manager.reload()


@functools.cache
def _slice_large_leaves_only() -> None:
    """Else Orbax cuts each replicated leaf into a slice per device, by a hundred programs, at the first save."""
    handler = type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
    type_handlers.register_type_handler(jax.Array, handler, override=True)


@jax.jit
def fingerprint(leaf: jax.Array) -> jax.Array:
    """A 32-bit hash of an array's bits, uint32 []: a sum of integers, so the same on any mesh and kind of device. Any
    change within one word changes it; other damage stays undetected with probability 2^-32."""
    if leaf.dtype == jnp.bool_:
        words = leaf.astype(jnp.uint32)
    else:
        # 64-bit values become two words along a new last axis, so that x64 need not be enabled.
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    index, stride = jnp.uint32(0), 1  # one iota per axis, because a reshape would gather a sharded array
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The finaliser of MurmurHash3: for a given index it is a bijection of the word.
    mixed = words ^ (index * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


class _Damaged(Exception):
    """A checkpoint that cannot be used; the message is the reason."""


def _on_every_process(read: Callable[[], Any]) -> Any:
    """The result of `read`; raises `_Damaged` on every process if it fails on any."""
    try:
        value, reason = read(), ""
    except _Damaged as error:
        value, reason = None, str(error)
    # Orbax, Tensorstore and the codecs raise a dozen types of errors for truncated or overwritten files.
    except Exception as error:
        value, reason = None, textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
    if not np.all(multihost_utils.process_allgather(np.array(not reason))):
        raise _Damaged(reason or "another process could not read it")
    return value


@contextlib.contextmanager
def _no_stray_reports(pattern: str = "") -> Iterator[None]:
    """Keeps hundreds of lines away from the one that explains a damaged checkpoint or a full disk: at the first array
    that fails, Orbax closes its event loop, and the others report that nobody waits for them, from Tensorstore's
    threads and from the garbage collector. pattern: of errors that nobody can catch."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled = logger.disabled
    logger.disabled = True  # After an error it stays so: what the error refers to is reported when the process ends.
    sys.unraisablehook = lambda report: None if re.search(pattern, str(report.exc_value)) else hook(report)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # likewise
    try:
        yield
        logger.disabled = disabled
    finally:
        sys.unraisablehook = hook


def _by_path(tree: Any) -> dict[str, Any]:
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _layout(tree: Any) -> dict[str, dict]:
    return {path: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)} for path, leaf in _by_path(tree).items()}


def _require_same_layout(manifest: dict[str, dict], abstract_state: Any, folder: epath.Path, partial: bool) -> None:
    here = _layout(abstract_state)
    show = lambda leaf: f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]" if leaf else "absent"  # noqa: E731
    for path in here if partial else here | manifest:
        wanted, saved = (show(layout.get(path)) for layout in (here, manifest))
        if wanted != saved:
            what = f"{path} is {saved} in the checkpoint {folder} but {wanted} in this run"
            raise InputError(f"{what}: use the config it was saved with, or another workdir")


def _crc(record: Mapping[str, Any]) -> int:
    # Through JSON and back, like the record itself: integer keys sort in another order once they are strings.
    return zlib.crc32(json.dumps(json.loads(json.dumps(record)), sort_keys=True).encode())
