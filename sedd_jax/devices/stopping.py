"""Stop signals: the run ends after a step that all processes agree on, with its state saved."""

import contextlib
import signal
import threading
from typing import Any

import jax

from sedd_jax.devices import processes
from sedd_jax.errors import TrainingError


class Stopped(TrainingError):
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; the same command goes on there")
        self.exit_code = 128 + number


class StopSignals:
    """SIGTERM and SIGINT, whichever process they reach, and the step after which to stop. They are collected inside a
    `with`; a second signal acts as it would without us. Several processes agree on the step in the background: a thread
    of each publishes the last step begun, and holds the process there until it has the others' steps. None can begin
    the step after the furthest, so all stop there.
    `jax.experimental.multihost_utils.reached_preemption_sync_point` is the same protocol, and does not serve: it knows
    SIGTERM only, and replaces its handler for good, with one that swallows a second signal."""

    def __init__(self):
        self._received, self._step, self._last = 0, -1, -1
        self._lock, self._begun = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._agree, daemon=True)
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> "StopSignals":
        if processes.several():
            self._thread.start()
        for number in self._previous:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and processes.several():
            processes.publish("stop", "0")  # Once any process has come to its end, no signal counts any more.
            self._begun.set()
            self._thread.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        signal.signal(number, self._previous[number])
        self._received = number
        if processes.several():
            processes.publish("stop", str(number))

    def after(self, step: int) -> int:
        """The signal to stop for after this step, 0 for none. Call it after every step in turn, once or more."""
        if not processes.several():
            return self._received
        with self._lock:
            self._step = step
            self._begun.set()
            return self._received if step == self._last else 0

    def _agree(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the run is over
            if number := int(processes.wait_for("stop")):
                self._begun.wait()
                with self._lock:
                    self._last = 1 + max(map(int, processes.all_gather("stop after", str(self._step))))
                    self._received = number
