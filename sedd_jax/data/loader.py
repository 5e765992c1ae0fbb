"""The endless, shuffled, resumable sequence of training batches."""

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from sedd_jax.data.mixture import Mixture
from sedd_jax.data.packing import TokenStream, check_length
from sedd_jax.errors import InputError

# Grain would write a note about hidden frames into the message of whatever goes wrong while reading.
flags.FLAGS.set_default("grain_py_traceback_filtering", "off")

# Batches in a run without end; the row numbers of that many still fit 64 bits.
_ENDLESS = 1 << 40


class Loader(Iterator[np.ndarray]):
    """Yields our rows of each global batch: int32 [number of rows, length].

    An epoch cuts the stream into `num_chunks` chunks and visits them in an order of its own. Global batch s has rows
    s * batch_size to (s + 1) * batch_size - 1 of that sequence, epoch after epoch, of which a process makes those that
    its devices need. So the global batch depends on `seed` and s alone: not on the number of processes, nor on where a
    run was resumed.

    Attributes:
      num_chunks: chunks per epoch.
      batches_per_epoch: global batches per epoch; seldom a whole number, as batches run across epochs.
      position: global batches taken so far, those before a resumption included. It is all there is to save.
    """

    def __init__(
        self,
        stream: TokenStream | Mixture,
        *,
        length: int,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        position: int = 0,
        shift: bool = True,
    ):
        """Starts at global batch `position`, at no cost.

        Args:
          stream: the same on every process.
          length: tokens per row.
          batch_size: rows of the global batch, over all processes.
          seed: decides the order, and the shifts.
          rows: which rows of each global batch are ours, in this order; by default all.
          position: global batches to leave out.
          shift: each epoch treats the stream as a circle and cuts it from a random token on, so that no token is always
            at the same place of a chunk. Every token is then used at most once per epoch, and all but
            len(tokens) % length exactly once.

        Raises:
          InputError: names the argument that does not fit.
        """
        streams = stream.streams if isinstance(stream, Mixture) else (stream,)
        for part in streams:
            check_length(part, length)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: give at least 1 row")
        ours = np.arange(batch_size) if rows is None else np.asarray(rows)
        if len(ours) == 0 or ours.min() < 0 or ours.max() >= batch_size:
            raise InputError(f"rows={ours.tolist()}: give some from 0 to {batch_size - 1}")
        if not 0 <= seed < 1 << 32:
            raise InputError(f"seed={seed}: give a number from 0 to {(1 << 32) - 1}")
        if position < 0:
            raise InputError(f"position={position}: give a number of batches, 0 or more")
        self._epochs = [_Epochs(part, length, seed, shift) for part in streams]
        self._choice = stream.order(_ENDLESS) if isinstance(stream, Mixture) else None
        self._length = length
        self._batch_size = batch_size
        self._ours = ours
        self.num_chunks = sum(epochs.num_chunks for epochs in self._epochs)
        self.batches_per_epoch = self.num_chunks / batch_size
        self.position = position

        batches = grain.MapDataset.range(position, _ENDLESS).map(self._make)
        # Making a batch holds the interpreter lock: more threads gain nothing, and Grain's own buffer of 500 batches
        # would take a gigabyte.
        self._batches = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))

    def __next__(self) -> np.ndarray:
        batch = next(self._batches)
        self.position += 1
        return batch

    def _make(self, number: int) -> np.ndarray:
        rows = int(number) * self._batch_size + self._ours
        if self._choice is None:
            return self._epochs[0].read(rows)
        chosen, theirs = np.array([self._choice[row] for row in rows.tolist()]).T
        batch = np.empty((len(rows), self._length), np.int32)
        for index in np.unique(chosen):
            batch[chosen == index] = self._epochs[index].read(theirs[chosen == index])
        return batch


class _Epochs:
    """The endless rows of one stream, by their number."""

    def __init__(self, stream: TokenStream, length: int, seed: int, shift: bool):
        self._stream, self._length, self._seed, self._shift = stream, length, seed, shift
        self.num_chunks = len(stream) // length
        self._order = grain.MapDataset.range(self.num_chunks).seed(seed).shuffle().repeat()

    def read(self, rows: np.ndarray) -> np.ndarray:
        starts = np.array([self._order[row] for row in rows.tolist()]) * self._length
        if self._shift:
            starts += [_offset(self._seed, int(epoch), len(self._stream)) for epoch in rows // self.num_chunks]
        return self._stream.read(starts, self._length)


@functools.lru_cache(maxsize=1024)
def _offset(seed: int, epoch: int, size: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(size))
