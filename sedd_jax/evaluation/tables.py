"""Tables of results: one dict per line, written as JSON, CSV and Markdown."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from sedd_jax.files import write_atomically

# The heading of each column, and the text of its cell for a line.
Columns = Mapping[str, Callable[[Any], str]]


def number(name: str, form: str, *, prefix: str = "") -> Callable[[Mapping[str, Any]], str]:
    """The cell of a column of numbers: line[name], with ± line[name_stderr] if that is known. None is an empty cell."""

    def cell(line: Mapping[str, Any]) -> str:
        value, error = line[name], line.get(f"{name}_stderr")
        if value is None:
            return ""
        return f"{prefix}{value:{form}}" + ("" if error is None or math.isnan(error) else f" ± {error:{form}}")

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
