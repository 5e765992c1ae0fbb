"""Figures that take long, one file each, so that a command that was stopped goes on where it was."""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from sedd_jax.devices import processes
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.files import write_atomically


class Ledger:
    """Entries in `folder`/points, all of one setting. Every process makes the same calls; the first one writes."""

    def __init__(self, folder: epath.Path, setting: dict[str, Any]):
        """Raises InputError if the folder holds entries of another setting, or cannot be made."""
        record = folder / "setting.json"
        held = _from_leader("setting", record)
        for name, value in setting.items():
            if held is not None and held.get(name) != value:
                raise InputError(
                    f"--output={folder} is of a run whose {name} is {held.get(name)!r} and not {value!r}; "
                    "choose another --output"
                )
        self._folder = folder / "points"
        if not processes.is_leader():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output={folder} cannot be made a directory: {error.strerror}") from error
        write_atomically(record, json.dumps(setting, indent=2) + "\n")

    def entry(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry of that name, made if it is not there yet. Raises InputError if it is damaged."""
        path = self._folder / f"{name}.json"
        held = _from_leader(name, path)
        if held is not None:
            say(f"{name}: done already")
            return held
        made = make()
        if processes.is_leader():
            write_atomically(path, json.dumps(made) + "\n")
        return made


def _from_leader(name: str, path: epath.Path) -> dict[str, Any] | None:
    """What a JSON file holds, None if it is absent: the same on all processes, whatever they see of the file."""
    content = processes.from_leader(f"ledger/{name}", lambda: path.read_bytes() if path.exists() else b"null")
    try:
        value = json.loads(content)
        return None if value is None else dict(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and what it held is computed again") from error
