"""Texts with a prompt or a label, each alone in a window; the streams of `packing` know no such borders."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sedd_jax.data import files
from sedd_jax.data.packing import TokenStream
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.typing import Batch

TAILS = ("eot", "unknown")


class Record(NamedTuple):
    """where: the file and line it was read from."""

    prompt: str
    text: str
    label: int | None
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Records(TokenStream):
    """A `TokenStream` whose chunks are windows that `read` gives as a `Batch`. num_bytes: of the texts alone."""

    windows: Batch
    num_bytes: int
    num_documents: int

    def __len__(self) -> int:
        return self.windows.tokens.size

    @property
    def tokens_per_byte(self) -> float:
        return len(self.windows.asked) / self.num_bytes

    def content(self) -> bytes:
        return b"".join(part.tobytes() for part in self.windows if part is not None)

    def read(self, starts: np.ndarray, length: int) -> Batch:
        return Batch(*(None if part is None else part[starts // length] for part in self.windows))


def read(source: str, *, text_field: str, prompt_field: str | None, label_field: str | None) -> tuple[Record, ...]:
    """The records of JSON lines but those without a text. source: as for `files.find`. Raises InputError, which names
    the line, for one without the fields, or whose label is no number of a class."""
    found = []
    for where, record in files.records(source):
        for field in filter(None, (text_field, prompt_field, label_field)):
            files.check_field(field, list(record), where=where)
        prompt, text = (files.check_text(record.get(name), name, where=where) for name in (prompt_field, text_field))
        label = record[label_field] if label_field else None
        if label_field and (type(label) is not int or not 0 <= label < 1 << 31):
            raise InputError(f"{where}: field {label_field!r} is {label!r}; give the number of a class, 0 or more")
        if text:
            found.append(Record(prompt, text, label, where))
    if not found:
        raise InputError(f"data source {source!r} holds no text: give JSON lines with a field {text_field!r}")
    return tuple(found)


def tokenize(records: Sequence[Record], tokenizer: Tokenizer, length: int, *, tail: str) -> Records:
    """Prompt, text and an end of text, if the tokenizer has one, in windows of `length` tokens; longer texts are cut.
    tail: what is behind them, 'eot': more ends of text, which are asked for as well; 'unknown': nothing, see `Batch`.
    Raises InputError for a prompt that leaves no room."""
    if tail not in TAILS or (tail == "eot" and tokenizer.eot is None):
        known = "'unknown'" if tail in TAILS else " or ".join(map(repr, TAILS))
        raise InputError(f"data.tail={tail!r} does not go with this tokenizer; give {known}")
    end = [] if tokenizer.eot is None else [tokenizer.eot]
    tokens = np.full((len(records), length), tokenizer.eot or 0, np.int32)
    given, never = np.zeros((2, *tokens.shape), bool)
    cut = 0
    for row, record in enumerate(records):
        prompt, text = tokenizer.encode(record.prompt), [*tokenizer.encode(record.text), *end]
        if len(prompt) >= length:
            raise InputError(f"{record.where}: the prompt has {len(prompt)} tokens, of {length} with its text; cut it")
        size = len(prompt) + len(text)
        cut += size - len(end) > length
        tokens[row, :size] = [*prompt, *text][:length]
        given[row, : len(prompt)] = True
        never[row, size:] = tail == "unknown"
    if cut:
        say(f"{cut} of {len(records)} texts are longer than their windows of {length} tokens: cut there")
    labels = None if records[0].label is None else np.array([record.label for record in records], np.int32)
    windows = Batch(tokens, given if given.any() else None, never if never.any() else None, labels)
    return Records(windows, sum(len(record.text.encode()) for record in records), len(records))
