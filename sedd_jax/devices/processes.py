"""Several processes as one run: they join, exchange values, and end together. One alone needs none of it. Values go
through the key-value store of jax's coordination service, where waits have no limit: collectives time out."""

import contextlib
import ctypes
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

_PATIENCE_MS = 10**9  # missing heartbeats reveal a dead process, so a wait for a live one may last for days
_DEAD_MS = 60_000
_GRACE = 3.0  # seconds within which processes that meet the same error each report it themselves
_LOST = "another process died or cannot be reached; start all of them again: training goes on from its last checkpoint"

_leaving = threading.Event()


def is_leader() -> bool:
    """Whether this is process 0, which writes and prints. Does not touch a device."""
    return runtime.global_state.process_id == 0


def several() -> bool:
    """Whether the run has more processes than this one."""
    return runtime.global_state.client is not None and runtime.global_state.num_processes > 1


def say(text: str) -> None:
    """Prints a line on stderr, from the first process only."""
    if is_leader():
        tqdm.write(text, file=sys.stderr)


def initialise(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes of a run; call it before anything touches a device. Missing values come from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and then from what jax finds: a TPU VM, Slurm, Open
    MPI. If nothing is found, or num_processes is 1, nothing happens. coordinator: host:port at which process 0 listens.
    start_timeout, heartbeat_timeout: seconds until all have started, and of silence after which one counts as dead.
    Raises InputError for values that are incomplete or do not fit, TrainingError if process 0 does not answer."""
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    num_processes = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    _check(**given)
    # Of a process that Open MPI or Slurm started; mpirun may start several within one task of Slurm.
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("SLURM_NTASKS", "")
    if num_processes == 1 or (num_processes is None and tasks == "1"):
        return
    complete = None not in given.values()
    if complete:
        _reach(coordinator, process_id, start_timeout)
    # jax would catch SIGTERM for good, in evaluation too; training has its own agreement (devices/stopping.py).
    jax.config.update("jax_enable_preemption_service", False)
    _on_abort(f"not all processes were there within {start_timeout} s; start them all with the same command")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a Kubernetes pod that may well be alone
            timeouts = {"initialization_timeout": start_timeout, "heartbeat_timeout_seconds": heartbeat_timeout}
            found_by = "deactivate" if complete else None
            jax.distributed.initialize(*given.values(), cluster_detection_method=found_by, **timeouts)
    except ValueError as error:
        flags = " ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
        if not flags and not tasks:
            return
        what = f"{flags or 'a cluster job of several tasks'}: jax does not find the rest by itself here"
        remedy = "give --coordinator=host:port, --num_processes and --process_id, or --num_processes=1 for this one"
        raise InputError(f"{what}; {remedy}") from error
    except RuntimeError as error:
        raise TrainingError(f"the processes cannot be joined: {error}") from error
    finally:
        _on_abort(_LOST if several() else None)
    if several():
        # Gloo prints on stdout, which is for the answer; its lines go to stderr instead.
        sys.stdout = os.fdopen(os.dup(1), "w", errors="backslashreplace")
        os.dup2(2, 1)
        _watcher.start()


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    if value and not value.isdecimal():
        raise InputError(f"{name}={value!r} in the environment is not a number")
    return int(value) if value else None


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise InputError(f"--coordinator={coordinator}: give host:port, of process 0")
    if num_processes is not None and num_processes < 1:
        raise InputError(f"--num_processes={num_processes} must be at least 1")
    if process_id is not None and coordinator is None and num_processes is None:
        raise InputError(f"--process_id={process_id} says nothing alone; give --coordinator and --num_processes too")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        last = (num_processes or 1) - 1
        raise InputError(f"--process_id={process_id} must lie from 0 to {last} (--num_processes - 1)")


def _reach(coordinator: str, process_id: int, timeout: int) -> None:
    """Tries the address beforehand, since jax aborts at one that fails."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            if process_id == 0:
                socket.create_server(("", int(port))).close()
            else:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if process_id == 0:
                raise InputError(f"--coordinator={coordinator}: process 0 cannot listen there ({error})") from error
            if time.monotonic() > end:
                what = f"--coordinator={coordinator} did not answer for {timeout} s ({error})"
                raise TrainingError(f"{what}; does process 0 run there?") from error
            time.sleep(0.2)


def _on_abort(line: str | None) -> None:
    """Makes an abort print this line and exit with code 1; None restores the abort. When a process is lost, jax prints
    a C++ stack and aborts, from a thread of its own. There a C handler runs, and one in Python would not."""
    global _abort  # C keeps no reference to it
    libc, words = ctypes.CDLL(None), f"\nerror: {line}\n".encode()
    _abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: os._exit(bool(os.write(2, words))))
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(_abort, ctypes.c_void_p) if line else None)


def _watch() -> None:
    """Ends this process when another one has failed."""
    failure = None
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the run is over, or the store's process gone: jax aborts
        failure = json.loads(wait_for("failure"))
    if failure and not _leaving.wait(_GRACE):
        _leaving.set()
        print(f"\nerror: process {failure['process']}: {failure['line']}", file=sys.stderr, flush=True)
        _exit(failure["code"])


_watcher = threading.Thread(target=_watch, daemon=True)


def _exit(code: int) -> NoReturn:
    # A process that leaves before the others are ready looks dead to them, above all the one that holds the store.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if several():
            runtime.global_state.client.wait_at_barrier("sedd_jax/failed", _DEAD_MS)
            time.sleep(_GRACE if is_leader() else 0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed
            stream.flush()
    os._exit(code)  # Other threads may be in a collective, or wait for a bucket, that will never answer.


def _leave() -> None:
    if _leaving.is_set():
        time.sleep(600)  # The watcher is ending this process already.
    _leaving.set()


def fail(line: str, code: int) -> NoReturn:
    """Ends all processes with this line and exit code."""
    if several():
        _leave()
        publish("failure", json.dumps({"process": runtime.global_state.process_id, "line": line, "code": code}))
    _exit(code)


def exit_if_lost(error: BaseException) -> None:
    """Ends this process with one line if another one's death caused the error. Waits for nobody."""
    causes = r"gloo|connection|coordination service|heartbeat|barrier|UNAVAILABLE"
    if several() and re.search(causes, str(error), re.I):
        _leave()
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        print(f"\nerror: {_LOST} ({reason})", file=sys.stderr, flush=True)
        os._exit(1)


def finish() -> None:
    """Waits for the other processes, and disconnects."""
    if several():
        _leaving.set()
        barrier("done")
        publish("failure", "null")  # jax may crash if it shuts down while a thread still waits for a value
        _watcher.join()
        jax.distributed.shutdown()


def publish(name: str, value: str) -> None:
    """Sets a value for all processes. The first value of a name stays. Safe in a signal handler."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        runtime.global_state.client.key_value_set(f"sedd_jax/{name}", value)


def wait_for(name: str) -> str:
    """The value that any process publishes. Raises JaxRuntimeError if the run ends first."""
    return runtime.global_state.client.blocking_key_value_get(f"sedd_jax/{name}", _PATIENCE_MS)


def all_gather(name: str, value: str) -> list[str]:
    """The values of all processes, in their order; waits for the last one. `name` is used once in a run."""
    publish(f"{name}/{runtime.global_state.process_id}", value)
    return [wait_for(f"{name}/{index}") for index in range(runtime.global_state.num_processes)]


def from_leader(name: str, make: Callable[[], bytes]) -> bytes:
    """The result of `make` on process 0, for all processes. `name` is used once in a run."""
    if not several():
        return make()
    if is_leader():
        runtime.global_state.client.key_value_set_bytes(f"sedd_jax/{name}", make())
    return runtime.global_state.client.blocking_key_value_get_bytes(f"sedd_jax/{name}", _PATIENCE_MS)


def barrier(name: str) -> None:
    """Waits until all processes are here. `name` is used once in a run."""
    if several():
        runtime.global_state.client.wait_at_barrier(f"sedd_jax/{name}", _PATIENCE_MS)


def compile_together(name: str, function: jax.stages.Wrapped) -> Callable:
    """The jitted function, which no process runs before all have compiled it. `name` is used once in a run. On CPU, the
    processes have to meet in a program's first collective within 30 seconds, and compilation may take longer: jax lets
    only process 0 write the compilation cache, so in a later run the others still compile."""
    if not several():
        return function
    awaited = [name]

    def call(*arguments: Any) -> Any:
        if awaited:
            function.lower(*arguments).compile()  # the call finds this one
            barrier(awaited.pop())
        return function(*arguments)

    return call


def require_same(name: str, value: str) -> None:
    """Waits for all processes. Raises InputError on all of them unless they have the same value."""
    if several() and set(all_gather(name, value)) != {value}:
        raise InputError(f"the processes have not all got the same {name}; start all of them on the same")
