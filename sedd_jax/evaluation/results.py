"""Results: in one file each, so that a stopped command continues; and as tables of dicts, in JSON, CSV and Markdown."""

import contextlib
import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from sedd_jax import lock
from sedd_jax.devices import processes
from sedd_jax.errors import InputError
from sedd_jax.files import make_folder, read_json, write_atomically

Columns = Mapping[str, Callable[[Any], str]]  # the heading of each column, and the text of its cell for a line


@contextlib.contextmanager
def hold(folder: epath.Path, setting: dict[str, Any]) -> Iterator["Ledger"]:
    """Gives the ledger of --output=folder, where no other command writes meanwhile."""
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
                what = f"--output={folder} is of a run whose {name} is {held.get(name)!r} and not {value!r}"
                raise InputError(f"{what}; choose another --output")
        self._folder = folder / "points"
        if processes.is_leader():
            make_folder(self._folder)
            write_atomically(record, json.dumps(setting, indent=2) + "\n")

    def entry(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry `name`, made if it is absent. Raises InputError if it is damaged."""
        path = self._folder / f"{name}.json"
        if held := _read(name, path):
            processes.say(f"{name}: done already")
            return held
        made = make()
        if processes.is_leader():
            write_atomically(path, json.dumps(made) + "\n")
        return made


def _read(name: str, path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file, as the first process finds it; {} if the file is absent."""
    read = lambda: read_json(path, remedy="remove it, and it is computed again", absent=True)  # noqa: E731
    return json.loads(processes.from_leader(f"ledger/{name}", lambda: json.dumps(read()).encode()))


def number(name: str, form: str, *, prefix: str = "") -> Callable[[Mapping[str, Any]], str]:
    """The cell of a column of numbers: line[name], with ± line[name_stderr] if that is known. None is an empty cell."""

    def cell(line: Mapping[str, Any]) -> str:
        value, error = line[name], line.get(f"{name}_stderr")
        more = "" if error is None or math.isnan(error) else f" ± {error:{form}}"
        return "" if value is None else f"{prefix}{value:{form}}{more}"

    return cell


def markdown(table: Iterable[Any], columns: Columns) -> str:
    lines = [[cell(line) for cell in columns.values()] for line in table]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *lines))


def write(folder: epath.Path, table: Sequence[Mapping[str, Any]], text: str) -> None:
    """Writes results.json, results.csv, and results.md with `text`, into the folder."""
    write_atomically(folder / "results.json", json.dumps(table, indent=2) + "\n")
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(folder / "results.csv", sheet.getvalue())
    write_atomically(folder / "results.md", text)
