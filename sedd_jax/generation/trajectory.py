"""How samples come about: their states as spans of text, one per token, each with the step at which it appeared."""

import colorsys
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.generation.templates import FREE, Window
from sedd_jax.typing import TokenRows

Row = Int[np.ndarray, " l"]
GIVEN, NOISE = 0, -1
MASK, UNKNOWN = "\u2591", "\ufffd"  # the signs of a token that is not there yet, and of bytes that are not UTF-8
MOST_FRAMES = 200  # the number of frames that pages and GIFs keep


class Span(NamedTuple):
    """step: the event at which the token appeared, from 1; GIVEN, or NOISE for a token of the initial noise."""

    text: str
    step: int


class Frame(NamedTuple):
    """The samples from index `first` on after event `number` of `length`; 0 is the start."""

    first: int
    number: int
    length: int
    tokens: TokenRows
    changed: TokenRows


@dataclass(frozen=True)
class Trajectory:
    """The states of samples, for pages and GIFs. windows: one per sample. samples[i]: (number of the event, spans) of
    sample i, in order, for at most MOST_FRAMES evenly spread events and the last."""

    tokenizer: Tokenizer
    windows: Sequence[Window]
    samples: dict[int, list[tuple[int, list[Span]]]] = field(default_factory=dict)

    def read(self, frame: Frame) -> list[list[Span]]:
        """The spans of each sample of a frame, as far as its text goes."""
        rows = zip(frame.tokens, frame.changed, self.windows[frame.first :], strict=False)
        texts = [(spans(self.tokenizer, ids, new, window.tokens != FREE), window.shown) for ids, new, window in rows]
        return [text[:shown] for text, shown in texts]

    def add(self, frame: Frame) -> None:
        if frame.number == frame.length or frame.number % -(-(frame.length + 1) // MOST_FRAMES) == 0:
            for index, text in enumerate(self.read(frame), frame.first):
                self.samples.setdefault(index, []).append((frame.number, text))

    @property
    def length(self) -> int:
        """Events, the most of all samples."""
        return max(states[-1][0] for states in self.samples.values())

    @property
    def numbers(self) -> list[int]:
        """The events of which any sample has a state."""
        return sorted({number for states in self.samples.values() for number, _ in states})

    def at(self, sample: int, number: int) -> list[Span]:
        """The sample's last state up to event `number`."""
        return next(text for event, text in reversed(self.samples[sample]) if event <= number)


def spans(tokenizer: Tokenizer, tokens: Row, changed: Row, given: Bool[np.ndarray, " l"]) -> list[Span]:
    """One span per token; if several tokens spell a character, the first has it and the others are empty."""
    steps = np.where(given, GIVEN, np.where(changed > 0, changed, NOISE)).tolist()
    texts, ids = [], tokens.tolist()
    while len(texts) < len(ids):
        texts += _character(tokenizer, ids[len(texts) : len(texts) + 4])  # UTF-8 needs at most four bytes
    return [Span(text, step) for text, step in zip(texts, steps, strict=True)]


def colour(step: int, length: int) -> str:
    """The colour of an event, from violet for the first to orange for the last, as on the page."""
    hue = (265 - 235 * (step - 1) / max(length - 1, 1)) / 360
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.7, 0.9))


def _character(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of the first token, followed by "" for each further token that belongs to the same character."""
    mask = tokenizer.vocab_size + tokenizer.padding  # MASK is a state of the graph and no token of the tokenizer
    for count in range(1, len(ids) + 1):
        if ids[count - 1] >= mask:
            break
        text = _text(tokenizer, tuple(ids[:count]))
        if UNKNOWN not in text:
            return [text] + [""] * (count - 1)
    return [MASK if ids[0] >= mask else _text(tokenizer, (ids[0],))]


@functools.lru_cache(maxsize=100_000)
def _text(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    """The text, with control characters, which a terminal might obey, as their pictures."""
    letter = tokenizer.encode("a").tolist()  # since some tokenizers drop the space before the first token of a text
    text = tokenizer.decode([*letter, *ids])[len(tokenizer.decode(letter)) :].replace("\t", "    ")
    text = re.sub(r"[\x00-\x09\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(r"[\x80-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", UNKNOWN, text.replace("\x7f", "\u2421"))
