"""An epoch uses each token once; the position alone decides a batch, on any number of processes."""

import itertools

import numpy as np
import pytest

from sedd_jax.data.loader import Loader
from sedd_jax.data.packing import Stream
from sedd_jax.errors import InputError


def stream_of(size: int) -> Stream:
    """Each token is its own place in the stream, so a batch shows where it was cut."""
    return Stream(tokens=np.arange(size, dtype=np.uint16), num_bytes=size, num_documents=1)


def batches(loader: Loader, count: int) -> np.ndarray:
    return np.stack(list(itertools.islice(loader, count)))


def epochs(count: int, *, size: int = 103, length: int = 5, **options) -> np.ndarray:
    """Rows of the first epochs, [count, num_chunks, length]."""
    num_chunks = size // length
    loader = Loader(stream_of(size), length=length, batch_size=4, **options)
    rows = batches(loader, -(-count * num_chunks // 4)).reshape(-1, length)
    return rows[: count * num_chunks].reshape(count, num_chunks, length)


def test_a_batch_is_rows_of_neighbouring_tokens():
    loader = Loader(stream_of(103), length=5, batch_size=4, seed=0, shift=False)
    batch = next(loader)
    assert batch.shape == (4, 5) and batch.dtype == np.int32
    assert (np.diff(batch) == 1).all()
    assert loader.num_chunks == 20 and loader.batches_per_epoch == 5.0


def test_unshifted_epochs_visit_each_chunk_once():
    for epoch in epochs(4, seed=0, shift=False):
        assert sorted(map(tuple, epoch)) == [tuple(range(start, start + 5)) for start in range(0, 100, 5)]


@pytest.mark.parametrize(("size", "length"), [(103, 5), (100, 5), (9, 5), (5, 5), (7, 1)])
def test_shifted_epochs_use_all_tokens_once_but_those_that_fill_no_chunk(size, length):
    for epoch in epochs(4, size=size, length=length, seed=0):
        tokens, counts = np.unique(epoch, return_counts=True)
        assert (counts == 1).all()
        assert len(tokens) == size - size % length
        # The stream is a circle: its first token follows its last.
        assert (np.diff(epoch) % size == 1 % size).all()


def test_epochs_differ_in_order_and_in_where_they_cut():
    plain = epochs(3, seed=0, shift=False)
    assert len({tuple(epoch[:, 0]) for epoch in plain}) == 3
    cuts = {int(epoch[0, 0]) % 5 for epoch in epochs(8, size=100, seed=0)}
    assert len(cuts) > 1


def test_the_seed_decides_the_order():
    np.testing.assert_array_equal(epochs(2, seed=3), epochs(2, seed=3))
    assert (epochs(2, seed=3) != epochs(2, seed=4)).any()
    assert (epochs(2, seed=3, shift=False) != epochs(2, seed=4, shift=False)).any()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_global_batch_row_for_row(process_count, shift):
    options = dict(length=5, batch_size=8, seed=1, shift=shift)
    complete = batches(Loader(stream_of(103), **options), 12)
    shares = [
        batches(Loader(stream_of(103), **options, rows=rows), 12)
        for rows in np.arange(8).reshape(process_count, 8 // process_count)
    ]
    assert all(share.shape == (12, 8 // process_count, 5) for share in shares)
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), complete)


def test_rows_need_not_be_neighbours():
    options = dict(length=5, batch_size=8, seed=1)
    ours = batches(Loader(stream_of(103), **options, rows=[1, 2, 6]), 12)
    np.testing.assert_array_equal(ours, batches(Loader(stream_of(103), **options), 12)[:, [1, 2, 6]])


@pytest.mark.parametrize("rows", [None, [0, 1, 4, 5]])
def test_resumed_is_uninterrupted_at_every_position(rows):
    options = dict(length=5, batch_size=8, seed=2, rows=rows)
    complete = batches(Loader(stream_of(103), **options), 12)
    for position in range(10):
        resumed = Loader(stream_of(103), **options, position=position)
        np.testing.assert_array_equal(batches(resumed, 2), complete[position : position + 2])
        assert resumed.position == position + 2


def test_position_counts_what_was_taken_not_what_was_prefetched():
    loader = Loader(stream_of(103), length=5, batch_size=4, seed=0)
    positions = [loader.position]
    for _ in range(3):
        next(loader)
        positions.append(loader.position)
    assert positions == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 50])
def test_batches_may_be_single_rows_or_longer_than_an_epoch(batch_size):
    rows = batches(Loader(stream_of(103), length=5, batch_size=batch_size, seed=0), 100 // batch_size)
    np.testing.assert_array_equal(rows.reshape(5, 20, 5), epochs(5, seed=0))


@pytest.mark.parametrize(("length", "message"), [(104, "length=104 exceeds the 103 tokens"), (0, "length=0")])
def test_lengths_that_do_not_fit_are_refused(length, message):
    with pytest.raises(InputError, match=rf"\A{message}[^\n]*\Z"):
        Loader(stream_of(103), length=length, batch_size=4, seed=0)
