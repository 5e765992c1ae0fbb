"""Text with holes as a window of tokens, some given and some free.

A template is text with holes: [[12]] is 12 tokens to fill, [[~5]] as many tokens as about 5 words take. The number of
tokens in a hole is fixed before sampling: the model chooses what stands there, never how much.
"""

import functools
import os
import pathlib
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sedd_jax.data import corpora
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError

FREE = -1
HOLE = re.compile(r"\[\[(~?)(\d+)\]\]", re.ASCII)
# Of the embedded corpus, enough for two digits of tokens per word.
ESTIMATE_WORDS = 10_000


@dataclass(frozen=True)
class Window:
    """tokens: ids [L], FREE where to fill. shown: how many of them belong to the text; the rest is drawn and cut off.
    holes: tokens in each hole of the template, in order."""

    tokens: Int[np.ndarray, " l"]
    shown: int
    holes: tuple[int, ...] = ()


@functools.lru_cache(maxsize=8)
def tokens_per_word(tokenizer: Tokenizer) -> float:
    """Of English words without punctuation, the space before each included: of the embedded corpus.

    Lower-case letters alone, since every tokenizer knows them.
    """
    text = " ".join(corpora.documents(corpora.EMBEDDED)).lower()
    words = [match[0] for match, _ in zip(re.finditer("[a-z]+", text), range(ESTIMATE_WORDS), strict=False)]
    return len(tokenizer.encode(" " + " ".join(words))) / len(words)


def parse_template(template: str, tokenizer: Tokenizer, *, length: int, flag: str = "--template") -> Window:
    """The window [length] of a template. Raises InputError, naming flag, for a malformed hole or too much text."""
    pieces, holes, end = [], [], 0
    for match in HOLE.finditer(template):
        pieces.append(_given(template[end : match.start()], tokenizer, flag))
        holes.append(_hole_tokens(match, tokenizer))
        _check_holes(sum(holes), length, flag)
        pieces.append(np.full(holes[-1], FREE, np.int32))
        end = match.end()
    tokens = np.concatenate([*pieces, _given(template[end:], tokenizer, flag)])
    return Window(_fill(length, tokens, np.empty(0, np.int32), flag), len(tokens), tuple(holes))


def parse_window(
    length: int, tokenizer: Tokenizer, *, prefix: str | None, suffix: str | None, template: str | None
) -> Window:
    """The window [length] that the flags of the same names describe; all of it is free where none is given.

    Raises InputError for what does not fit, or does not go together.
    """
    if template is not None:
        if prefix is not None or suffix is not None:
            raise InputError("--template already says what is given; leave --prefix and --suffix out")
        return parse_template(template, tokenizer, length=length)
    start, end = tokenizer.encode(prefix or ""), tokenizer.encode(suffix or "")
    return Window(_fill(length, start, end, "--prefix and --suffix"), length)


def read_templates(path: str, text_field: str) -> list[str]:
    """The templates of a file: one per line, or the field of each record of a .jsonl file, which may hold newlines.

    Raises InputError, naming the file, if it cannot be read or holds none.
    """
    if not os.path.isfile(path):
        raise InputError(f"--templates={path} is no file; give one with a template per line")
    documents = corpora.documents(path, text_field=text_field)
    if {".jsonl", ".parquet"}.intersection(pathlib.PurePath(path).suffixes):
        return list(documents)
    templates = [line.removesuffix("\r") for line in documents[0].split("\n") if line.strip()]
    if not templates:
        raise InputError(f"--templates={path} holds no template: write one per line")
    return templates


def _hole_tokens(match: re.Match[str], tokenizer: Tokenizer) -> int:
    words, number = match.groups()
    # No model has a length of twenty digits, and int refuses a number of thousands of them.
    count = int(number) if len(number) < 20 else 10**20
    return max(1, round(count * tokens_per_word(tokenizer))) if words and count else count


def _check_holes(tokens: int, length: int, flag: str) -> None:
    if tokens > length:
        count = "too many" if tokens >= 10**20 else tokens
        raise InputError(f"{flag} has holes for {count} tokens, more than the model's length of {length}; shorten it")


def _given(text: str, tokenizer: Tokenizer, flag: str) -> Int[np.ndarray, " n"]:
    if "[[" in text or "]]" in text:
        hole = text[text.find("[[") :] if "[[" in text else text[: text.find("]]") + 2]
        remedy = "a hole is [[12]], for 12 tokens, or [[~5]], for about 5 words"
        raise InputError(f"{flag} has a malformed hole at {hole[:40]!r}; {remedy}")
    return tokenizer.encode(text)


def _fill(
    length: int, start: Int[np.ndarray, " n"], end: Int[np.ndarray, " m"], flag: str
) -> Int[np.ndarray, " length"]:
    given = len(start) + len(end)
    if given > length:
        raise InputError(f"{flag} of {given} tokens exceeds the model's length of {length}; shorten it")
    window = np.full(length, FREE, np.int32)
    window[: len(start)] = start
    window[length - len(end) :] = end
    return window
