"""A state of the reverse process as pieces of text, one per token, each with the step at which it appeared."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sedd_jax.data.tokenizers import Tokenizer

GIVEN, NOISE = 0, -1
# What stands for a token that is not there yet.
MASK = "\u2591"
UNKNOWN = "\ufffd"
# UTF-8 needs four bytes for a character at the most.
LONGEST_CHARACTER = 4


class Piece(NamedTuple):
    """step: the event at which the token appeared, from 1; GIVEN, or NOISE for a token still drawn from the start."""

    text: str
    step: int


def pieces(
    tokenizer: Tokenizer,
    tokens: Int[np.ndarray, " l"],
    changed: Int[np.ndarray, " l"],
    given: Bool[np.ndarray, " l"],
) -> list[Piece]:
    """One piece per token; of a character that several tokens spell, the first has the text and the others none."""
    steps = np.where(given, GIVEN, np.where(changed > 0, changed, NOISE)).tolist()
    texts, ids = [], tokens.tolist()
    while len(texts) < len(ids):
        texts += _character(tokenizer, ids[len(texts) : len(texts) + LONGEST_CHARACTER])
    return [Piece(text, step) for text, step in zip(texts, steps, strict=True)]


def hue(step: int, length: int) -> float:
    """In degrees, from violet for the first event to orange for the last."""
    return 265 - 235 * (step - 1) / max(length - 1, 1)


def _character(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of the first of these tokens, with an empty one for each that it takes along to be a character."""
    for count in range(1, len(ids) + 1):
        # MASK is a state of the graph and no token of the tokenizer.
        if ids[count - 1] >= tokenizer.vocab_size:
            break
        text = _text(tokenizer, tuple(ids[:count]))
        if UNKNOWN not in text:
            return [text] + [""] * (count - 1)
    return [MASK if ids[0] >= tokenizer.vocab_size else _text(tokenizer, (ids[0],))]


@functools.lru_cache(maxsize=100_000)
def _text(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    # Behind a letter, since some tokenizers take the space off the first token of a text.
    letter = tokenizer.encode("a").tolist()
    return _visible(tokenizer.decode([*letter, *ids])[len(tokenizer.decode(letter)) :])


def _visible(text: str) -> str:
    """Control characters, which a terminal might obey, as their pictures."""
    text = text.replace("\t", "    ")
    text = re.sub(r"[\x00-\x09\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(r"[\x80-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", UNKNOWN, text.replace("\x7f", "\u2421"))
