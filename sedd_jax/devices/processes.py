"""Several processes as one run: they find one another, agree, and end together. One process alone needs none of it.

What they tell one another goes through the key-value store of jax's coordination service, in which a process can wait
for as long as another works. A collective on the devices would time out.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import distributed as runtime  # the public module hides the key-value store; Orbax uses it this way too
from tqdm import tqdm

from sedd_jax.errors import InputError, TrainingError

# A dead process is found by its missing heartbeats, so whoever waits for one that lives may wait for days.
_PATIENCE_MS = 10**9
_DEAD_MS = 60_000
# Processes that meet the same error each report it themselves, if they do so within this many seconds.
_GRACE = 3.0
_LOST = "another process died or cannot be reached; start all of them again: training goes on from its last checkpoint"

_leaving = threading.Event()


def is_leader() -> bool:
    """Whether this is the process that writes. Does not touch a device."""
    return runtime.global_state.process_id == 0


def several() -> bool:
    return runtime.global_state.client is not None and runtime.global_state.num_processes > 1


def say(text: str) -> None:
    if is_leader():
        tqdm.write(text, file=sys.stderr)


def initialise(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes of a run; call it before anything touches a device.

    What is not given comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and then from what jax
    finds: the metadata of a TPU VM, Slurm, Open MPI. Where there is nothing at all, or num_processes is 1, the process
    is alone, and nothing happens.

    coordinator: host:port at which process 0 listens.
    timeout: seconds within which all processes have to be there.
    heartbeat_timeout: seconds of silence after which a process counts as dead.
    Raises InputError for values that are incomplete or do not fit, TrainingError where process 0 does not answer.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    num_processes = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    _check(coordinator, num_processes, process_id, timeout, heartbeat_timeout)
    if num_processes == 1 or (num_processes is None and "1" in map(os.environ.get, _TASKS)):
        return
    given = (coordinator, num_processes, process_id)
    complete = None not in given
    if complete:
        _reach(coordinator, process_id, timeout)
    # jax would catch SIGTERM for good, in evaluation too; training has its own agreement (training/stopping.py).
    jax.config.update("jax_enable_preemption_service", False)
    with _abort_says(f"not all processes were there within {timeout} s; start them all with the same command"):
        try:
            with warnings.catch_warnings(action="ignore"):  # of a Kubernetes pod that may well be alone
                jax.distributed.initialize(
                    *given,
                    cluster_detection_method="deactivate" if complete else None,
                    initialization_timeout=timeout,
                    heartbeat_timeout_seconds=heartbeat_timeout,
                )
        except ValueError as error:
            if given == (None, None, None) and not any(int(os.environ.get(name) or 1) > 1 for name in _TASKS):
                return
            raise InputError(
                f"{_show(*given)}: jax does not find the rest by itself here; give --coordinator=host:port, "
                "--num_processes and --process_id, or --num_processes=1 for this process alone"
            ) from error
        except RuntimeError as error:
            raise TrainingError(f"the processes cannot be joined: {error}") from error
    if several():
        _on_abort(_LOST)
        # Gloo talks on stdout, which is for the answer; it comes out on stderr then.
        sys.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        _watcher.start()


_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def _number(name: str) -> int | None:
    value = os.environ.get(name) or None
    if value is not None and not value.isdecimal():
        raise InputError(f"{name}={value!r} in the environment is not a number")
    return None if value is None else int(value)


def _show(coordinator: str | None, num_processes: int | None, process_id: int | None) -> str:
    values = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return " ".join(given) or "a cluster job of several tasks"


def _check(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int, heartbeat_timeout: int
) -> None:
    for name, value in {"start_timeout": timeout, "heartbeat_timeout": heartbeat_timeout}.items():
        if value < 1:
            raise InputError(f"--{name}={value} must be at least 1 second")
    if coordinator is not None and not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise InputError(f"--coordinator={coordinator}: give host:port, of process 0")
    if num_processes is not None and num_processes < 1:
        raise InputError(f"--num_processes={num_processes} must be at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise InputError(
            f"--process_id={process_id} must lie from 0 to {(num_processes or 1) - 1} (--num_processes - 1)"
        )


def _reach(coordinator: str, process_id: int, timeout: int) -> None:
    """Tries the address beforehand, since jax answers to one that fails with an abort."""
    host, _, port = coordinator.rpartition(":")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--coordinator={coordinator}: process 0 cannot listen there ({error})") from error
        return
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise TrainingError(
                    f"--coordinator={coordinator} did not answer for {timeout} s ({error}); does process 0 run there?"
                ) from error
            time.sleep(0.2)


# When a process is lost, jax prints a C++ stack and aborts, from a thread of its own. No Python handler ever runs in
# that case: it waits for the main thread. A C handler does, and turns the abort into one line and an exit code.
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_last_words = b""


@_Handler
def _abort(_: int) -> None:
    os.write(2, _last_words)
    os._exit(1)


def _libc_signal(handler: object) -> None:
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p) if handler else None)


def _on_abort(line: str) -> None:
    global _last_words
    _last_words = f"\nerror: {line}\n".encode()
    _libc_signal(_abort)


@contextlib.contextmanager
def _abort_says(line: str):
    _on_abort(line)
    try:
        yield
    finally:
        _libc_signal(None)


def _watch() -> None:
    """Ends this process when another one has failed."""
    try:
        failure = json.loads(hear("failure"))
    except jax.errors.JaxRuntimeError:  # the run is over, or the process that holds the store is gone: jax aborts
        return
    if failure is None:
        return
    time.sleep(_GRACE)
    if not _leaving.is_set():
        _leaving.set()
        print(f"\nerror: process {failure['process']}: {failure['line']}", file=sys.stderr, flush=True)
        _exit(failure["code"])


_watcher = threading.Thread(target=_watch, daemon=True)


def _exit(code: int) -> NoReturn:
    # A process that goes before the others are ready looks to them like one that died, the one with the store most so.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        runtime.global_state.client.wait_at_barrier("sedd_jax/failed", _DEAD_MS)
        if is_leader():
            time.sleep(_GRACE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Other threads may be in a collective that will never end.


def fail(line: str, code: int) -> None:
    """Ends all processes with this line and exit code. Returns where there is one process only."""
    if not several():
        return
    if _leaving.is_set():
        time.sleep(600)  # The watch is ending this process already.
    _leaving.set()
    message = json.dumps({"process": runtime.global_state.process_id, "line": line, "code": code})
    post("failure", message)
    _exit(code)


def explain(error: Exception) -> str | None:
    """In one line, an error that another process's death has caused; None for any other."""
    lost = several() and re.search(
        r"gloo|connection|coordination service|heartbeat|barrier|UNAVAILABLE", str(error), re.I
    )
    if lost and _leaving.is_set():
        time.sleep(600)
    return f"{_LOST} ({textwrap.shorten(str(error), 200, placeholder=' ...')})" if lost else None


def abandon(line: str) -> NoReturn:
    """Ends this process after another one's death, waiting for nobody."""
    print(f"\nerror: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def finish() -> None:
    """Waits for the other processes, and parts from them."""
    if several():
        _leaving.set()
        wait("done")
        # jax may crash if it is shut down while a thread still waits for a value.
        post("failure", "null")
        _watcher.join()
        jax.distributed.shutdown()


def post(name: str, value: str) -> None:
    """Tells all processes; of several that post under one name the first is heard. Safe in a signal handler."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        runtime.global_state.client.key_value_set(f"sedd_jax/{name}", value)


def hear(name: str) -> str:
    """Waits for what any process posts. Raises JaxRuntimeError when the run ends before."""
    return runtime.global_state.client.blocking_key_value_get(f"sedd_jax/{name}", _PATIENCE_MS)


def gather(name: str, value: str) -> list[str]:
    """The values of all processes, in their order; waits for the last one."""
    post(f"{name}/{runtime.global_state.process_id}", value)
    return [hear(f"{name}/{index}") for index in range(runtime.global_state.num_processes)]


def from_leader(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns on process 0, on all processes. `name` is used once in a run."""
    if not several():
        return make()
    client = runtime.global_state.client
    if is_leader():
        client.key_value_set_bytes(f"sedd_jax/{name}", made := make())
        return made
    return client.blocking_key_value_get_bytes(f"sedd_jax/{name}", _PATIENCE_MS)


def wait(name: str) -> None:
    """Until all processes are here. `name` is used once in a run."""
    if several():
        runtime.global_state.client.wait_at_barrier(f"sedd_jax/{name}", _PATIENCE_MS)


def in_step(name: str, function: Callable) -> Callable:
    """A jitted function that no process runs before all have compiled it.

    On CPU, the processes have to meet in a program's first collective within 30 seconds, and compilation may take
    longer: jax lets only process 0 write the compilation cache, so a later run finds it done there and to do elsewhere.
    """
    if not several():
        return function
    waiting = True

    def call(*arguments: Any) -> Any:
        nonlocal waiting
        if waiting:
            function.lower(*arguments).compile()  # the call finds this one
            wait(name)
            waiting = False
        return function(*arguments)

    return call


def require_same(name: str, value: str) -> None:
    """Waits for all processes. Raises InputError on all of them unless they have the same value."""
    if several():
        digest = hashlib.sha256(value.encode()).hexdigest()
        if set(gather(name, digest)) != {digest}:
            raise InputError(f"the processes have not all got the same {name}; start all of them on the same")
