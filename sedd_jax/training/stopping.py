"""Stop signals: the run ends after a step that all processes agree on, with its state saved."""

import contextlib
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sedd_jax import sharding
from sedd_jax.errors import TrainingError


class Stopped(TrainingError):
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on there")
        self.exit_code = 128 + number


class StopSignals:
    """SIGTERM and SIGINT, whichever process they reach."""

    def __init__(self, mesh: Mesh):
        self._received = self._agreed = 0
        self._several = jax.process_count() > 1
        self._split = NamedSharding(mesh, PartitionSpec(sharding.MESH_AXES))
        self._largest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))

    def receive(self, number: int) -> None:
        self._received = number

    def ask(self) -> jax.Array | None:
        """Asks all processes; to be called once per step. The answer arrives with the step's metrics.

        One number per device through a collective of its own, so that all processes hear of a signal at the same step.
        """
        if not self._several:
            return None
        shape = (self._split.mesh.size,)
        return self._largest(
            jax.make_array_from_callback(shape, self._split, lambda _: np.full(1, self._received, np.int32))
        )

    def hear(self, answer: jax.Array | None) -> None:
        if answer is not None:
            self._agreed = int(answer)

    @property
    def number(self) -> int:
        """The signal to stop for, 0 for none: on several processes, what the last answer that was heard says."""
        return self._agreed if self._several else self._received


@contextlib.contextmanager
def stop_signals(mesh: Mesh) -> Iterator[StopSignals]:
    """Collects SIGTERM and SIGINT in what it gives; a second one acts as it would without us."""
    signals = StopSignals(mesh)
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in numbers}

    def receive(number, _):
        signals.receive(number)
        signal.signal(number, previous[number])

    for number in numbers:
        signal.signal(number, receive)
    try:
        yield signals
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
