"""One run, one directory: a command that writes a directory for long holds the file `.lock` in it.

On disks and network file systems that is flock(2), which the kernel or the file server frees however its holder ends.
In buckets, and where there is no flock, it is a lease: an object that a thread writes anew every 20 seconds. A start
that finds one watches it, and takes over if it does not change.

Limits: NFS mounted with `nolock` or `local_lock` shows no host the locks of another. A killed holder's lease costs the
next start half a minute. Two starts on a bucket within two seconds may both go on, and a holder suspended, or cut off,
for longer than half a minute does not notice that another took over."""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath
from filelock import FileLock, Timeout

from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError, explained
from sedd_jax.files import in_bucket, make_folder, naming

_NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@contextlib.contextmanager
def hold(directory: epath.PathLike, flag: str, *, lease: bool | None = None, period: float = 20.0) -> Iterator[None]:
    """Makes a directory, and holds it. Raises InputError, which names the holder, if another process does. flag: that
    gave the directory. lease: whether to use one; by default in buckets. period: its seconds."""
    with explained(f"--{flag}={directory} cannot be made a directory", "choose another", OSError):
        make_folder(epath.Path(directory))
    path = epath.Path(directory) / ".lock"
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    lease = in_bucket(path) if lease is None else lease
    try:
        release = (None if lease else _lock(path, me)) or _lease(path, me, period)
    except Timeout as error:
        what = f"--{flag}={directory} is in use by {_holder(_read(path))}"
        raise InputError(f"{what}: wait until that has ended, or choose another --{flag}") from error
    try:
        yield
    finally:
        release()


def _lock(path: epath.Path, me: dict) -> Callable[[], None] | None:
    """Takes the lock, and returns what frees it; None where there is no flock. Raises Timeout if it is held."""
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    with contextlib.suppress(OSError):  # of a full disk: the lock holds without its text
        path.write_text(json.dumps(me))

    def release():
        path.unlink(missing_ok=True)  # while we hold it: filelock notices that its file is gone
        lock.release()

    return release


def _lease(path: epath.Path, me: dict, period: float) -> Callable[[], None]:
    """As `_lock` does, by an object that changes in every period."""
    token, ended = secrets.token_hex(8), threading.Event()

    def write():
        path.write_text(json.dumps(me | {"token": token, "renewed": time.time()}))

    def renew():
        while not ended.wait(period):
            with contextlib.suppress(Exception):  # a bucket that does not answer for a while
                write()
        with contextlib.suppress(Exception):
            _ = token in _read(path) and path.unlink()

    for _ in range(2):
        if before := _read(path):
            say(f"{path} is of {_holder(before)}: waiting {1.5 * period:.0f} s to see whether it still runs")
            time.sleep(1.5 * period)
            if (now := _read(path)) and now != before:
                raise Timeout(str(path))
        with naming(path):
            write()
        time.sleep(period / 10)
        if token in _read(path):
            break
        # That is another start at the same time, or the last, late write of a holder that has ended: the wait tells.
    else:
        raise Timeout(str(path))
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()

    def release():
        ended.set()
        thread.join(period / 2)  # no longer: without an answer of the bucket, the lease ends by itself

    return release


def _read(path: epath.Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text()
    return ""


def _holder(text: str) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return "process {pid} on {host} since {since}".format(**json.loads(text))
    return "another process"
