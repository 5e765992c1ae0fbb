"""The frames of samples while they are drawn, kept for a page or a GIF."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.generation.pieces import Piece, pieces
from sedd_jax.generation.templates import FREE, Window

# More than that nobody watches, and a page of them grows large.
MOST_FRAMES = 200


class Frame(NamedTuple):
    """The samples from number `first` on after event `number` of `length`; 0 is the start."""

    first: int
    number: int
    length: int
    tokens: Int[np.ndarray, "b l"]
    changed: Int[np.ndarray, "b l"]

    @property
    def kept(self) -> bool:
        """Whether it is one of at most MOST_FRAMES (and the last) that are evenly spread."""
        return self.number == self.length or self.number % -(-(self.length + 1) // MOST_FRAMES) == 0


@dataclass(frozen=True)
class Script:
    """What of each sample is text: windows has one per sample."""

    tokenizer: Tokenizer
    windows: Sequence[Window]

    def read(self, frame: Frame) -> list[list[Piece]]:
        """The pieces of each sample of a frame, without what lies behind its text."""
        texts = []
        for index, (tokens, changed) in enumerate(zip(frame.tokens, frame.changed, strict=True), frame.first):
            window = self.windows[index]
            given = window.tokens != FREE
            parts = pieces(self.tokenizer, tokens, changed, given)
            texts.append(parts[: window.shown])
        return texts


class Shot(NamedTuple):
    """One sample after event `number`."""

    number: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Film:
    """samples[i]: the kept shots of sample i, in order. length: events, the most of all samples."""

    script: Script
    samples: dict[int, list[Shot]] = field(default_factory=dict)

    def add(self, frame: Frame) -> None:
        if frame.kept:
            for index, parts in enumerate(self.script.read(frame), frame.first):
                self.samples.setdefault(index, []).append(Shot(frame.number, parts))

    @property
    def length(self) -> int:
        return max(shots[-1].number for shots in self.samples.values())

    @property
    def numbers(self) -> list[int]:
        """The events of which there is a shot of any sample."""
        return sorted({shot.number for shots in self.samples.values() for shot in shots})

    def at(self, sample: int, number: int) -> list[Piece]:
        """The sample's last shot up to event `number`."""
        return next(shot.pieces for shot in reversed(self.samples[sample]) if shot.number <= number)
