"""Text of old test sets as it was before their tokenizers took it apart.

WikiText, the Penn Treebank and the One Billion Word Benchmark have spaces around punctuation, and other marks of their
tokenizers, which rules undo before models of plain text are tested on them (Radford et al. 2019, sec. 3.1). These are
SEDD's (arXiv 2310.16834), which later papers share, in the same order and with those that look wrong: figures can only
be compared on the same text. Most remove spaces. A few replace text: the number sign N of the Penn Treebank becomes 1
(in WikiText also the N of a compass), <unk> becomes a question mark, and curly quotes become straight."""

import functools
import re
from collections.abc import Callable

Rules = tuple[tuple[str, str], ...]


def _literal(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.escape(old), new) for old, new in pairs)


def _close_up(marks: str) -> Rules:
    """Removes the space before each of these marks where another space follows it."""
    return _literal(*((f" {mark} ", f"{mark} ") for mark in marks))


def _apply(*rules: tuple[str, str]) -> Callable[[str], str]:
    """The function that applies (pattern, replacement) after (pattern, replacement) to a text."""
    return lambda text: functools.reduce(lambda text, rule: re.sub(*rule, text), rules, text)


# One line of WikiText (raw), with its newline, or several. SEDD has one more rule, a misprint that matches nothing.
wikitext = _apply(
    *_literal(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_close_up(":;.!?,"),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    *_literal(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *_literal((" \u00b0 ", "\u00b0"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)
# One sentence of the Penn Treebank as Mikolov prepared it.
penn_treebank = _apply(
    *_literal((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    # A lookahead, since the same space may stand before the next number.
    (r" N(?= )", " 1"),
    *_literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
)
# One sentence of the One Billion Word Benchmark.
lm1b = _apply(
    *_literal(("http : / / ", "http://"), ("https : / / ", "https://")),
    *((r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1.")),
    *(*_close_up("?"), (r" \?$", "?"), *_close_up("!"), (r" !$", "!"), *_close_up(",:;")),
    *_literal((" / ", "/")),
    *((rf"\{a} ([^\{a}\{b}]+) \{b}", rf"{a}\1{b}") for a, b in ('""', "''", "()", "[]")),
    *_literal(("$ ", "$"), ("£ ", "£")),
)


def lambada(text: str) -> str:
    """One passage of LAMBADA as OpenAI prepared it: straight quotes, a newline in front, no space around."""
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()
