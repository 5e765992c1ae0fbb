"""Templates, which are text with holes, as windows of given and free tokens.

[[12]] is a hole of 12 tokens, [[~5]] one of as many tokens as about 5 words take, [[3-12]] one whose length the model
chooses first. [[4:/a|b+/]] is one whose text keeps a rule, see `rules`. [[eot]] is the end of a text, as a given token.
Brackets of the text itself are written \\[[ and \\]]; a backslash before brackets is \\\\, elsewhere it is itself."""

import functools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sedd_jax.data import corpora
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError

Ids = Int[np.ndarray, " _"]
FREE = -1
RULE = r"/.+?/|\{.*?\}|[^\[\]/{][^\[\]]*"
# What is not plain text: an escaped character or pair of brackets (1), or a hole (2 to 5) or end of text in brackets.
MARK = re.compile(rf"(?as)\\(\\(?=\\*(?:\[\[|\]\]))|\[\[|\]\])|\[\[(?:(~?)(\d+)(?:-(\d+))?(?::({RULE}))?|eot)\]\]")
ESTIMATE_WORDS = 10_000  # words of the embedded corpus, enough for two digits of tokens per word


class Window(NamedTuple):
    """tokens: ids [L], FREE in holes. shown: how many of them belong to the text; the rest is sampled and cut off.
    holes: tokens in each hole of the template, in order. starts, rules: where it starts, and the rule for its text or
    "". ranges: (least, most) tokens of each, equal if the template says how many."""

    tokens: Int[np.ndarray, " l"]
    shown: int
    holes: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    rules: tuple[str, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()


@functools.lru_cache(maxsize=8)
def tokens_per_word(tokenizer: Tokenizer) -> float:
    """Tokens per English word, with the space before it, in the embedded corpus: in letters all tokenizers know."""
    text = " ".join(corpora.documents(corpora.EMBEDDED)).lower()
    words = [match[0] for match, _ in zip(re.finditer("[a-z]+", text), range(ESTIMATE_WORDS), strict=False)]
    return len(tokenizer.encode(" " + " ".join(words))) / len(words)


def parse_template(
    template: str, tokenizer: Tokenizer, *, length: int, flag: str = "--template", sizes: Sequence[int] | None = None
) -> Window:
    """The window [length] of a template. sizes: tokens of each hole, by default the most that it may have. Raises
    InputError, naming flag, for a malformed hole or too much text."""
    pieces, holes, starts, rules, ranges, text, end = [], [], [], [], [], "", 0
    for match in MARK.finditer(template):
        text += _plain(template[end : match.start()], flag) + (match[1] or "")
        end = match.end()
        if match[1]:
            continue
        pieces.append(tokenizer.encode(text))
        text = ""
        if match[3]:
            ranges.append(_hole_tokens(match, tokenizer, flag))
            starts.append(sum(map(len, pieces)))
            rules.append(match[5] or "")
            holes.append(ranges[-1][1] if sizes is None else sizes[len(holes)])
        elif tokenizer.eot is None:
            raise InputError(f"{flag} has [[eot]], but the tokenizer {tokenizer.KIND!r} has no end of text")
        if (free := sum(holes)) > length:
            num = "too many" if free >= 10**20 else free
            raise InputError(f"{flag} has holes for {num} tokens, more than the model's length of {length}; shorten it")
        pieces.append(np.array([FREE] * holes[-1] if match[3] else [tokenizer.eot], np.int32))
    tokens = np.concatenate([*pieces, tokenizer.encode(text + _plain(template[end:], flag))])
    window = _fill(length, tokens, tokens[:0], flag)
    return Window(window, len(tokens), *map(tuple, (holes, starts, rules, ranges)))


def parse_windows(
    length: int,
    tokenizer: Tokenizer,
    *,
    templates: str | None = None,
    template: str | None = None,
    prefix: str | None = None,
    suffix: str | None = None,
    text_field: str = "text",
) -> list[tuple[str | None, Window]]:
    """(template, window [length]) for the flags templates, template, prefix and suffix; (None, a window) without a
    template. Raises InputError for flags that exclude one another, too much text, and as `read_templates` does."""
    flags = {"templates": templates, "template": template, "prefix": prefix, "suffix": suffix}
    names = [f"--{name}" for name, value in flags.items() if value is not None]
    if len(names) > 1 and names != ["--prefix", "--suffix"]:
        raise InputError(f"{names[0]} already says what is given; leave {' and '.join(names[1:])} out")
    if template is not None:
        return [(template, parse_template(template, tokenizer, length=length))]
    if templates is not None:
        texts, name = enumerate(read_templates(templates, text_field), 1), f"--templates={templates}: template"
        return [(text, parse_template(text, tokenizer, length=length, flag=f"{name} {n}")) for n, text in texts]
    start, end = tokenizer.encode(prefix or ""), tokenizer.encode(suffix or "")
    return [(None, Window(_fill(length, start, end, "--prefix and --suffix"), length))]


def read_templates(path: str, text_field: str) -> list[str]:
    """The templates of a file: one per line, or the field of each record of a .jsonl file, which may hold newlines.
    Raises InputError, naming the file, if it cannot be read or holds none."""
    if not os.path.isfile(path):
        raise InputError(f"--templates={path} is no file; give one with a template per line")
    records = {".jsonl", ".ndjson", ".parquet"}.intersection(pathlib.PurePath(path).suffixes)
    documents = corpora.documents(path, text_field=text_field if records else "")
    if records:
        return list(documents)
    templates = [line.removesuffix("\r") for line in documents[0].split("\n") if line.strip()]
    if not templates:
        raise InputError(f"--templates={path} holds no template: write one per line")
    return templates


def _hole_tokens(match: re.Match[str], tokenizer: Tokenizer, flag: str) -> tuple[int, int]:
    """The least and the most."""
    # No model has a length of twenty digits, and int refuses a number of thousands of digits.
    counts = [int(number) if len(number) < 20 else 10**20 for number in (match[3], match[4] or match[3])]
    if counts[0] > counts[1]:
        raise InputError(f"{flag} has a hole {match[0][:40]!r} of at least {counts[0]} and at most {counts[1]} tokens")
    return tuple(max(1, round(n * tokens_per_word(tokenizer))) if match[2] and n else n for n in counts)


def _plain(text: str, flag: str) -> str:
    if "[[" in text or "]]" in text:
        hole = text[text.find("[[") :] if "[[" in text else text[: text.find("]]") + 2]
        remedy = "a hole is [[12]], for 12 tokens, or [[~5]], for about 5 words; \\[[ and \\]] are brackets"
        raise InputError(f"{flag} has a malformed hole at {hole[:40]!r}; {remedy}")
    return text


def _fill(length: int, start: Ids, end: Ids, flag: str) -> Ids:
    if (given := len(start) + len(end)) > length:
        raise InputError(f"{flag} of {given} tokens exceeds the model's length of {length}; shorten it")
    return np.concatenate([start, np.full(length - given, FREE, np.int32), end])
