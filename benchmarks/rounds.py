"""Medians over rounds that alternate between the candidates, so that a drifting machine does not bias them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def medians(repeats: int, **calls: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each call until its result is ready. A first round, with compilation, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def products(dtype: str) -> tuple[Callable[[], Any], int]:
    """A call that makes large square matrix products one after another on one device, and its FLOPs."""
    size, count = (1536, 10) if jax.devices()[0].platform == "cpu" else (8192, 10)
    a = jnp.full((size, size), 1 / size, dtype)
    product = jax.jit(jnp.matmul)

    def call():
        x = a
        for _ in range(count):
            x = product(x, a)
        return x

    return call, 2 * size**3 * count


def passes(megabytes: int = 1024) -> tuple[Callable[[], Any], int]:
    """A call that adds 1 to a large array in place on one device, and the bytes that it reads and writes."""
    a = jnp.zeros(megabytes << 18, jnp.float32)
    size, add = 2 * a.nbytes, jax.jit(lambda a: a + 1, donate_argnums=0)

    def call():
        nonlocal a
        a = add(a)
        return a

    return call, size
