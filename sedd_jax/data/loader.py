"""The endless, shuffled, resumable sequence of training batches."""

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from sedd_jax.data.mixture import Mixture
from sedd_jax.data.packing import TokenStream, check_length
from sedd_jax.typing import Batch

# Grain would add a note about hidden frames to the message of every error while reading.
flags.FLAGS.set_default("grain_py_traceback_filtering", "off")

_ENDLESS = 1 << 40  # batches; their sequence numbers still fit 64 bits


class Loader(Iterator[np.ndarray | Batch]):
    """Yields this process's sequences of each global batch: int32 [number of sequences, length], or a `Batch`. An epoch
    cuts the stream into `num_chunks` chunks and visits them in its own order. Global batch s has the sequences s *
    batch_size to (s + 1) * batch_size - 1 of that order, epoch after epoch: it depends only on `seed` and s.
    batches_per_epoch: seldom an integer. position: global batches consumed, also before a resumption; the state."""

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
        """Starts at global batch `position`, at no cost. length: tokens per sequence. batch_size: sequences per global
        batch. rows: this process's sequences of each, in this order; by default all. shift: each epoch treats the
        stream as a circle and cuts it from a random token on, so that tokens change their places in chunks. An epoch
        uses each token at most once, and all but len(tokens) % length exactly once. Raises as `check_length`."""
        self._streams = stream.streams if isinstance(stream, Mixture) else (stream,)
        for part in self._streams:
            check_length(part, length)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        places = [_places(number, part, length, seed, shift) for number, part in enumerate(self._streams)]
        self._places = places[0] if len(places) == 1 else grain.MapDataset.mix(places, stream.weights)
        self._length, self._batch_size, self.position = length, batch_size, position
        self.num_chunks = sum(len(part) // length for part in self._streams)
        self.batches_per_epoch = self.num_chunks / batch_size
        batches = grain.MapDataset.range(position, _ENDLESS).map(self._make)
        # Threads share the interpreter lock, so one suffices. The default buffer of 500 batches is a gigabyte.
        self._batches = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))

    def __next__(self) -> np.ndarray | Batch:
        batch = next(self._batches)
        self.position += 1
        return batch

    def _make(self, number: int) -> np.ndarray | Batch:
        indices = int(number) * self._batch_size + self._rows
        chosen, starts = np.array([self._places[index] for index in indices.tolist()]).T
        if len(self._streams) == 1:
            return self._streams[0].read(starts, self._length)
        batch = np.empty((len(indices), self._length), np.int32)
        for stream in np.unique(chosen):
            batch[chosen == stream] = self._streams[stream].read(starts[chosen == stream], self._length)
        return batch


def _places(number: int, stream: TokenStream, length: int, seed: int, shift: bool) -> grain.MapDataset:
    """Where the endless sequences of a stream begin, by their number; beside the number of the stream."""
    count = len(stream) // length
    offset = lambda epoch: int(np.random.default_rng((seed, epoch)).integers(len(stream))) if shift else 0  # noqa: E731
    offset = functools.lru_cache(1024)(offset)
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    return order.map_with_index(lambda index, chunk: (number, chunk * length + offset(index // count)))
