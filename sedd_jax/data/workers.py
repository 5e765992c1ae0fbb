"""A function applied by several processes."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from sedd_jax.errors import TrainingError

T = TypeVar("T")
R = TypeVar("R")


def map_unordered(function: Callable[[T], R], items: Iterator[T], workers: int) -> Iterator[R]:
    """Yields the results as they are finished. At most one waiting item per worker is held in memory.

    Raises TrainingError if a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=_begin_worker)
    running: set[concurrent.futures.Future[R]] = set()
    try:
        for item in items:
            running.add(pool.submit(function, item))
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


def _begin_worker() -> None:
    # Ctrl-C reaches all processes: the parent ends, and the workers finish their current item.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If the parent is killed, the workers would wait for work forever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
