"""Timing that a drifting machine cannot bias: rounds that alternate between the candidates, and their medians."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def medians(repeats: int, **calls: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each call, waited for; the median over rounds, after one that is not counted (compilation)."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def copy_rate(megabytes: int = 256) -> float:
    """Bytes read and written per second by adding 1 to a large array on one device, measured."""
    a = jnp.zeros(megabytes << 18, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    return 2 * a.nbytes / medians(5, add=lambda: add(a))["add"]
