"""Command lines in forked copies of one process that has imported everything: a refusal takes a tenth of a second.

A copy runs `python -m sedd_jax.COMMAND` in a folder as a user without privileges, with bounds on time and memory.
"""

import contextlib
import encodings
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sedd_jax

COMMANDS = {path.stem for path in Path(sedd_jax.__file__).parent.glob("*.py") if "cli.run(" in path.read_text()}
NOBODY = 65534
LONGEST_LINE = 350


def preload(*, libraries: bool = True) -> None:
    """Imports all that the commands import, but not the commands, which define flags. Starts no thread of JAX.

    libraries: also those that few commands import, and all that a copy without privileges may need.
    """
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    names = [module.name for module in pkgutil.walk_packages(sedd_jax.__path__, "sedd_jax.")]
    names += ["matplotlib.pyplot", "matplotlib.backends.backend_agg"]
    # Python itself may lie in a home that its copies, without privileges, cannot read.
    more = [f"encodings.{module.name}" for module in pkgutil.iter_modules(encodings.__path__)]
    more += ["pydoc_data.topics", "tensorflow_datasets", "datasets", "huggingface_hub._snapshot_download"]
    for name in names + more * libraries:
        if name.removeprefix("sedd_jax.") not in (*COMMANDS, "data.beam"):
            with contextlib.suppress(ImportError):  # encodings of other systems
                importlib.import_module(name)


class Ended(NamedTuple):
    """code: exit code, None if it was killed at its bounds. wrong: what is against the laws, by `judge`."""

    code: int | None
    out: str
    err: str
    seconds: float
    megabytes: float
    wrong: list[str]

    @property
    def last_line(self) -> str:
        return (self.err.rstrip("\n").splitlines() or [""])[-1]


def run_command(command: str | Callable[[], Any], argv: Sequence[str]) -> int:
    """The exit code of sedd_jax.`command` with `argv`, or of a function; a traceback goes to stderr."""
    try:
        sys.argv = ["sedd_jax", *argv]
        if callable(command):
            command()
        else:
            runpy.run_module(f"sedd_jax.{command}", run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # as at the end of Python: what is still being written
            sys.stdout.flush()
            sys.stderr.flush()


class Forked:
    """One command that runs: sedd_jax.`command` with `argv`, or a function."""

    def __init__(
        self, command: str | Callable[[], Any], argv: Sequence[str], folder: Path, *, privileged: bool = False
    ):
        self.folder, self.begun, self.megabytes = folder, time.monotonic(), 0.0
        self.before = None if privileged else listing(folder)
        self.streams = [os.fdopen(os.memfd_create(name), "w+b") for name in ("stdout", "stderr")]
        self.pid = os.fork()
        if not self.pid:
            self._become(command, argv, privileged)

    def _become(self, command, argv, privileged):
        code = 1
        try:
            os.setpgid(0, 0)
            for number, stream in zip((1, 2), self.streams, strict=True):
                os.dup2(stream.fileno(), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(self.folder)
            if not privileged:
                os.environ["HOME"] = str(self.folder)
                if os.getuid() == 0:
                    os.setgid(NOBODY)
                    os.setuid(NOBODY)
            code = run_command(command, argv)
        finally:
            os._exit(code)

    def poll(self, *, seconds: float, megabytes: float) -> Ended | None:
        """How it ended, or None while it runs within its bounds. Kills it, and all that it started, beyond them."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        used, bound = time.monotonic() - self.begun, ""
        if not pid:
            with contextlib.suppress(OSError, IndexError):
                peak = Path(f"/proc/{self.pid}/status").read_text().partition("VmHWM:")[2]
                self.megabytes = int(peak.split()[0]) / 1024
            if used <= seconds and self.megabytes <= megabytes:
                return None
            bound = f"hang: {used:.0f} s" if used > seconds else f"memory: {self.megabytes:.0f} MB"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if bound:
            os.waitpid(self.pid, 0)
        code = None if bound else os.waitstatus_to_exitcode(status)
        for stream in self.streams:
            stream.seek(0)
        out, err = (stream.read(1 << 22).decode(errors="replace") for stream in self.streams)
        for stream in self.streams:
            stream.close()
        ended = Ended(code, out, err, used, self.megabytes, [bound] if bound else [])
        if self.before is not None:
            ended.wrong.extend(judge(ended, self.before, listing(self.folder)))
        return ended

    def wait(self, *, seconds: float = 300, megabytes: float = 8000) -> Ended:
        while (ended := self.poll(seconds=seconds, megabytes=megabytes)) is None:
            time.sleep(0.02)
        return ended


def judge(ended: Ended, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What is against the laws: 0 with a line of JSON or with commands, 2 with a line and without a trace, 1 with a
    line."""
    if "Traceback (most recent call last)" in ended.err:
        yield "traceback"
    if ended.code == 0:
        with contextlib.suppress(ValueError, IndexError):
            if not ended.out.startswith("python -m sedd_jax."):
                json.loads(ended.out.splitlines()[-1])
            return
        yield "no JSON at the end of stdout"
    elif ended.code in (1, 2):
        if not ended.last_line.startswith("error: "):
            yield "no line of an error at the end of stderr"
        if len(ended.last_line) > LONGEST_LINE:
            yield f"a line of {len(ended.last_line)} characters"
        if ended.code == 2 and ended.out:
            yield "refused with output"
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if ended.code == 2 and changed:
            yield f"left behind: {' '.join(changed)[:200]}"
    elif ended.code is not None:
        yield f"exit code {ended.code}"


def listing(folder: Path) -> dict[str, Any]:
    """Of everything in a folder its kind, and of files a checksum; without .cache, since the folder is a home too."""
    entries = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != ".cache"]
        for name in folders + names:
            path = Path(parent, name)
            kind = path.lstat().st_mode & 0o170000
            entries[str(path.relative_to(folder))] = kind, zlib.crc32(path.read_bytes()) if kind == 0o100000 else 0
    return entries
