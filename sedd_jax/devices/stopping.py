"""Stop signals: the run ends after a step that all processes agree on, with its state saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax

from sedd_jax.devices import processes
from sedd_jax.errors import TrainingError


class Stopped(TrainingError):
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; the same command goes on there")
        self.exit_code = 128 + number


class StopSignals:
    """SIGTERM and SIGINT, whichever process they reach, and the step after which to stop.

    Several processes agree on the step in the background: a thread of each publishes how far it has come, and holds it
    there until it has heard all. None can have begun the step after the furthest, so there they stop.
    """

    def __init__(self):
        self._received = 0
        self._lock = threading.Lock()
        self._begun = threading.Event()
        self._step = self._last = -1
        self._thread = threading.Thread(target=self._agree, daemon=True)
        if processes.several():
            self._thread.start()

    def receive(self, number: int) -> None:
        self._received = number
        if processes.several():
            processes.post("stop", str(number))

    def close(self) -> None:
        """Ends the thread. No signal is heard any more once any process has closed."""
        if processes.several():
            processes.post("stop", "0")
            self._begun.set()
            self._thread.join()

    def after(self, step: int) -> int:
        """The signal to stop for after this step, 0 for none. Asked after every step in turn; may be asked again."""
        if not processes.several():
            return self._received
        with self._lock:
            self._step = step
            self._begun.set()
            return self._received if step == self._last else 0

    def _agree(self) -> None:
        try:
            number = int(processes.hear("stop"))
            if not number:
                return
            self._begun.wait()
            with self._lock:
                self._last = 1 + max(map(int, processes.gather("stop after", str(self._step))))
                self._received = number
        except jax.errors.JaxRuntimeError:
            return  # The run is over.


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Collects SIGTERM and SIGINT in what it gives; a second one acts as it would without us."""
    signals = StopSignals()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in numbers}

    def receive(number, _):
        signal.signal(number, previous[number])
        signals.receive(number)

    for number in numbers:
        signal.signal(number, receive)
    try:
        yield signals
        signals.close()
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
