"""Results that take long to compute, one file each, so that a command that was stopped continues."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from sedd_jax import lock
from sedd_jax.devices import processes
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.files import make_folder, read_json, write_atomically


@contextlib.contextmanager
def hold(folder: epath.Path, setting: dict[str, Any]) -> Iterator["Ledger"]:
    """Gives the ledger of --output=folder, where no other command writes meanwhile. Raises InputError as `lock.hold`
    and `Ledger` do."""
    with contextlib.ExitStack() as stack:
        processes.from_leader("ledger", lambda: stack.enter_context(lock.hold(folder, "output")) or b"held")
        yield Ledger(folder, setting)


class Ledger:
    """Entries in `folder`/points, all of one setting. Every process makes the same calls; only the first one writes."""

    def __init__(self, folder: epath.Path, setting: dict[str, Any]):
        """Raises InputError if the folder holds entries of another setting."""
        record = folder / "setting.json"
        held = _read("setting", record) or setting
        for name, value in setting.items():
            if held.get(name) != value:
                raise InputError(
                    f"--output={folder} is of a run whose {name} is {held.get(name)!r} and not {value!r}; "
                    "choose another --output"
                )
        self._folder = folder / "points"
        if processes.is_leader():
            make_folder(self._folder)
            write_atomically(record, json.dumps(setting, indent=2) + "\n")

    def entry(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry `name`, made if it is absent. Raises InputError if it is damaged."""
        path = self._folder / f"{name}.json"
        if (held := _read(name, path)) is not None:
            say(f"{name}: done already")
            return held
        made = make()
        if processes.is_leader():
            write_atomically(path, json.dumps(made) + "\n")
        return made


def _read(name: str, path: epath.Path) -> dict[str, Any] | None:
    """The JSON object in a file, as the first process finds it; None if the file is absent."""

    def read() -> bytes:
        remedy = "remove it, and it is computed again"
        return json.dumps(read_json(path, remedy=remedy) if path.exists() else None).encode()

    return json.loads(processes.from_leader(f"ledger/{name}", read))
