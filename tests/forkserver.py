"""Commands in forked copies of a process that has imported what they import: a start takes 3 s less.

`python tests/forkserver.py SOCKET` serves. `python -S tests/forkserver.py SOCKET COMMAND ...` is, to who starts it, the
process of sedd_jax.COMMAND: with its own streams, environment, folder, signals and exit code.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT)


def serve(path: str) -> None:
    """Until the other end of stdin is closed."""
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import forked

    forked.preload(libraries=False)
    running: dict[int, tuple[int, socket.socket]] = {}  # by the file that tells of its end
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(64)
        os.rename(f"{path}.new", path)
        while True:
            askers = {asker.fileno(): pid for pid, asker in running.values()}
            ready, _, _ = select.select([0, listener.fileno(), *running, *askers], [], [])
            if 0 in ready:
                return
            for file in set(ready) & running.keys():
                pid, asker = running.pop(file)
                os.close(file)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with asker, contextlib.suppress(OSError):
                    asker.sendall(f"{code}\n".encode())
                askers.pop(asker.fileno(), None)
            for asker in set(ready) & askers.keys():  # which only ends
                os.kill(askers[asker], signal.SIGKILL)
            if listener.fileno() in ready:
                asker, _ = listener.accept()
                pid = _fork(asker)
                asker.sendall(f"{pid}\n".encode())
                running[os.pidfd_open(pid)] = pid, asker


def _fork(asker: socket.socket) -> int:
    """The command that is asked for."""
    request, streams, _, _ = socket.recv_fds(asker, 1 << 16, 3)
    while not request.endswith(b"\n"):
        request += asker.recv(1 << 16)
    if not (pid := os.fork()):
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 256)
        _become(**json.loads(request))
    for stream in streams:
        os.close(stream)
    return pid


def _become(command: str, argv: list[str], folder: str, environment: dict[str, str]) -> None:
    from forked import run_command

    code = 1
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[0] = folder
        code = run_command(command, argv)
    finally:
        os._exit(code)


def ask(path: str, command: str, argv: list[str]) -> None:
    """Is that process: ends as it ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    request = {"command": command, "argv": argv, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        answers = connection.makefile()
        pid = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.dup2(devnull := os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(devnull, 2)
        code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        ask(sys.argv[1], sys.argv[2], sys.argv[3:])
    serve(sys.argv[1])
