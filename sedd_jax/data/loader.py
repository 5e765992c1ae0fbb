"""The endless, shuffled, resumable sequence of training batches."""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from sedd_jax.data.packing import Stream, check_length
from sedd_jax.errors import InputError


class Loader(Iterator[np.ndarray]):
    """Yields this process's rows of each global batch: int32 [batch_size // process_count, length].

    An epoch cuts the stream into `num_chunks` chunks and visits them in an order of its own. Global batch s has rows
    s * batch_size to (s + 1) * batch_size - 1 of that sequence, epoch after epoch, and process p takes the p-th of
    process_count equal runs of them. So the global batch depends on `seed` and s alone: not on the number of processes,
    nor on where a run was resumed.

    Attributes:
      num_chunks: chunks per epoch.
      batches_per_epoch: global batches per epoch; seldom a whole number, as batches run across epochs.
      position: global batches taken so far, those before a resumption included. It is all there is to save.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        length: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        position: int = 0,
        shift: bool = True,
    ):
        """Starts at global batch `position`, at no cost.

        Args:
          stream: the same on every process.
          length: tokens per row.
          batch_size: rows of the global batch, over all processes.
          seed: decides the order, and the shifts.
          process_index: which rows are ours, from 0 to process_count - 1.
          process_count: how many processes share a batch.
          position: global batches to leave out.
          shift: each epoch treats the stream as a circle and cuts it from a random token on, so that no token is always
            at the same place of a chunk. Every token is then used at most once per epoch, and all but
            len(tokens) % length exactly once.

        Raises:
          InputError: names the argument that does not fit.
        """
        check_length(stream, length)
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index={process_index}: give a number from 0 to {process_count - 1}")
        if batch_size < 1 or batch_size % process_count:
            raise InputError(f"batch_size={batch_size}: give a multiple of the {process_count} processes")
        if not 0 <= seed < 1 << 32:
            raise InputError(f"seed={seed}: give a number from 0 to {(1 << 32) - 1}")
        if position < 0:
            raise InputError(f"position={position}: give a number of batches, 0 or more")
        self._tokens = stream.tokens
        self._length = length
        self._rows = batch_size // process_count
        self._seed = seed
        self._shift = shift
        self.num_chunks = len(stream.tokens) // length
        self.batches_per_epoch = self.num_chunks / batch_size
        self.position = position

        # A process's rows are the element s * process_count + process_index, so each process makes its own rows only.
        shares = grain.MapDataset.range(self.num_chunks).seed(seed).shuffle().repeat()
        shares = shares.batch(self._rows, drop_remainder=True)  # else the endless length is rounded, and overflows
        ours = shares.map_with_index(self._crop)[position * process_count + process_index :: process_count]
        # Making a batch holds the interpreter lock: more threads gain nothing, and Grain's own buffer of 500 batches
        # would take a gigabyte.
        self._batches = iter(ours.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))

    def __next__(self) -> np.ndarray:
        batch = next(self._batches)
        self.position += 1
        return batch

    def _crop(self, share: int, chunks: np.ndarray) -> np.ndarray:
        starts = np.asarray(chunks) * self._length
        if self._shift:
            epochs = (share * self._rows + np.arange(self._rows)) // self.num_chunks
            starts += [_offset(self._seed, int(epoch), len(self._tokens)) for epoch in epochs]
        return self._tokens.take(starts[:, None] + np.arange(self._length), mode="wrap").astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _offset(seed: int, epoch: int, size: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(size))
