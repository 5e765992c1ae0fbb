"""Rules for the text of a hole as an automaton over tokens: a regular expression, a list of words, a JSON schema.

The tokens of the hole spell a text of the rule from its first to its last byte, in any division into tokens."""

import functools
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError, explained
from sedd_jax.generation.templates import Window
from sedd_jax.sampling.constrained import Automaton, Constraint, Rules, grouped

MOST_STATES = 8000  # of automata over bytes, all rules together; more take minutes to prepare
_LETTER = r'([^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})'
_INTEGER = r"-?(0|[1-9]\d*)"
_NUMBER = _INTEGER + r"(\.\d+)?([eE][+\-]?\d+)?"
_SIMPLE = {"integer": _INTEGER, "number": _NUMBER, "boolean": "true|false", "null": "null"}
_KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern"},
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
} | dict.fromkeys(_SIMPLE, set())


@dataclass(frozen=True, eq=False)
class Language:
    """starts: the state of the automaton in which the text of a rule begins."""

    automaton: Automaton
    starts: dict[str, int]

    def fault(self, window: Window) -> str | None:
        """Why a hole of the window cannot keep its rule: no text of it has this number of tokens."""
        for _, size, rule in _holes(window):
            known = self._lengths(rule, most := len(window.tokens))
            if size not in known:
                why = f"{known[0]} to {known[-1]} do" if known else f"no {most} tokens do, or none has these letters"
                return f"{size} tokens spell no text of the rule {rule[:60]!r}: {why}"
        return None

    @functools.lru_cache(maxsize=64)  # noqa: B019 (a language lives as long as the command)
    def _lengths(self, rule: str, most: int) -> list[int]:
        """The numbers of tokens, up to `most`, that spell a text of the rule."""
        known, states = [], np.arange(len(self.automaton.accepting)) == self.starts[rule]
        for count in range(most + 1):
            known += [count] * bool((states & self.automaton.accepting).any())
            states = np.isin(np.arange(len(states)), self.automaton.target[states[self.automaton.source]])
        return known

    def constraint(self, windows: Sequence[Window]) -> Constraint:
        """The rules of windows [B]. Those that are one object and follow one another are a population."""
        length = len(windows[0].tokens)
        width = max(1, *(sum(size for _, size, _ in _holes(window)) for window in windows))
        places, starts, ends = (np.full((len(windows), width), fill, np.int32) for fill in (length, -1, 0))
        for row, window in enumerate(windows):
            end = 0
            for first, size, rule in _holes(window):
                places[row, end : end + size] = first + np.arange(size)
                starts[row, end] = self.starts[rule]
                end += size
                ends[row, end - 1] = 1
        group = np.cumsum([0, *(a is not b for a, b in itertools.pairwise(windows))], dtype=np.int32)
        number = np.arange(len(windows), dtype=np.int32)
        return Constraint(self.automaton, Rules(places, starts, ends > 0, group, number))


def language(rules: Iterable[str], tokenizer: Tokenizer, vocab_size: int) -> Language:
    """Of rules as in templates. vocab_size: tokens of the model, which may have more than the tokenizer. Raises
    InputError for a rule that is none, and a tokenizer whose tokens have no bytes of their own."""
    if (pieces := tokenizer.pieces) is None:
        raise InputError(f"a rule needs a tokenizer whose tokens spell their bytes; {tokenizer.KIND!r} changes texts")
    starts, table, ends = dict[str, int](), np.empty((0, 256), np.int16), np.empty(0, bool)
    for rule in rules:
        starts[rule] = len(table)
        more, accepting = _byte_automaton(rule)
        table = np.concatenate([table, np.where(more < 0, -1, more + len(table)).astype(np.int16)])
        ends = np.concatenate([ends, accepting])
        if len(table) > MOST_STATES:
            raise InputError(f"the rule {rule[:60]!r} takes more than {MOST_STATES} states; give a simpler one")
    source, byte = np.nonzero(table >= 0)
    live = _leading_to(ends, source, table[source, byte])
    # Bytes with the same moves are one letter, and tokens that spell the same word one class, or a part of one.
    table, letter = np.unique(np.where((table >= 0) & live[table], table, -1), axis=1, return_inverse=True)
    alphabet, moves = bytes(letter.tolist()), {b"": (np.arange(len(table)), np.arange(len(table)))}
    classes = defaultdict[tuple[bytes, bytes], list[int]](list)
    for token in _sound(tokenizer, [token for token, piece in enumerate(pieces) if piece]):
        word = pieces[token].translate(alphabet)
        classes[tuple(part.tobytes() for part in _moves(word, table, moves))].append(token)
    names = [[np.frombuffer(part, np.int64) for part in name] for name in classes]
    source, target = np.concatenate(names, axis=1)
    label = np.repeat(range(len(names)), [len(part) for part, _ in names])
    # States inside tokens are left out, and moves from where no text begins or to where none can end.
    begun = np.isin(np.arange(len(table)), list(starts.values()))
    useful = begun | (_leading_to(begun, target, source) & _leading_to(ends, source, target))
    kept = np.lexsort((label, source))
    kept = kept[useful[source[kept]] & useful[target[kept]]]
    used, label = np.unique(label[kept], return_inverse=True)
    class_of, number = np.full(vocab_size, -1), np.cumsum(useful) - 1
    tokens = list(classes.values())
    for renamed, name in enumerate(used):
        class_of[tokens[name]] = renamed
    class_of, *kinds = (a.astype(np.int32) for a in (class_of, number[source[kept]], label, number[target[kept]]))
    groups = grouped(class_of, len(used)), grouped(kinds[0], int(useful.sum()))
    automaton = Automaton(groups[0], class_of, *kinds, groups[1], ends[useful])
    return Language(automaton, {rule: int(number[start]) for rule, start in starts.items()})


def json_pattern(schema: Any) -> str:
    """The regular expression of the values of a JSON schema as json.dumps writes them, objects with all properties in
    their order. Raises InputError unless the schema is an enum, const, anyOf, or type with no more than `_KEYWORDS`."""
    value = lambda value: re.escape(json.dumps(value, ensure_ascii=False))  # noqa: E731
    one = lambda parts: f"({'|'.join(parts)})"  # noqa: E731
    keys = schema.keys() - {"type", "title", "description"}
    if keys in ({"enum"}, {"const"}):
        return one(map(value, schema.get("enum", [schema.get("const")])))
    if keys == {"anyOf"}:
        return one(map(json_pattern, schema["anyOf"]))
    if (kind := schema.get("type")) not in _KEYWORDS or keys - _KEYWORDS[kind]:
        raise InputError(f"a rule cannot have the JSON schema {json.dumps(schema):.60}; docs/constrained.md says which")
    if "pattern" in keys and len(keys) > 1:
        raise InputError(f"a rule cannot have the JSON schema {json.dumps(schema):.60}: a pattern gives the length too")
    if kind == "string":
        return f'"({schema.get("pattern") or _times(_LETTER, schema, "Length")})"'
    if kind == "array":
        return rf"\[{_times(json_pattern(schema['items']), schema, 'Items', ', ')}\]"
    if kind == "object":
        fields = [f"{value(key)}: {json_pattern(of)}" for key, of in schema["properties"].items()]
        return r"\{" + ", ".join(fields) + r"\}"
    return one([_SIMPLE[kind]])


def _times(item: str, schema: dict[str, Any], name: str, between: str = "") -> str:
    """As many items as min<name> and max<name> allow."""
    least, most = schema.get(f"min{name}", 0), schema.get(f"max{name}")
    more = f"({between}{item}){{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
    return "" if most == 0 else f"({item}{more}){'' if least else '?'}"


def _holes(window: Window) -> list[tuple[int, int, str]]:
    """(first position, tokens, rule) of the holes with rules."""
    return [hole for hole in zip(window.starts, window.holes, window.rules, strict=True) if hole[2]]


def _byte_automaton(rule: str) -> tuple[np.ndarray, np.ndarray]:
    """The next state [states, 256], -1 for none, and whether a state is accepting. State 0 is the start."""
    with explained("rules need the extra 'constrained'", "pip install 'sedd_jax[constrained]'", ImportError):
        import interegular
    known = interegular.InvalidSyntax, interegular.Unsupported, ValueError, TypeError, LookupError, AttributeError
    what, remedy = f"the rule {rule[:60]!r} cannot be read", "docs/constrained.md says what can"
    with explained(what, remedy, *known, RecursionError):
        words = "|".join(map(re.escape, rule.split("|")))
        pattern = json_pattern(json.loads(rule)) if rule.startswith("{") else words
        fsm = interegular.parse_pattern(rule[1:-1] if rule.startswith("/") else pattern).to_fsm()
    letters = [letter.encode(errors="ignore") for letter in fsm.alphabet if isinstance(letter, str)]
    named = {letter[:n] for letter in letters for n in (1, 2, 3)}
    # A state is one of the expression, and what has been read of a character's bytes.
    states, numbers, rows, steps = [(fsm.initial, b"")], {(fsm.initial, b""): 0}, [], {}
    for place, seen in states:
        if seen not in steps:
            steps[seen] = list(_bytes_after(seen, fsm.alphabet, named))
        row = np.full(256, -1)
        for byte, read, key in steps[seen]:
            after = place if read else fsm.map.get(place, {}).get(key)
            if after is not None:
                row[byte] = numbers.setdefault((after, read), len(numbers))
                states += [(after, read)] * (len(numbers) - len(states))
        rows.append(row)
        if len(rows) > MOST_STATES:
            break
    return np.stack(rows), np.array([place in fsm.finals and not seen for place, seen in states[: len(rows)]])


def _bytes_after(seen: bytes | int, alphabet: Any, named: set[bytes]) -> Iterable[tuple[int, bytes | int, Any]]:
    """(byte, what has been read with it, key of the character that it completes or None) for each byte that may follow.
    seen: bytes of a character; how many more belong to it where the expression names none that begins with them."""
    for byte in range(256):
        if isinstance(seen, int):
            if 0x80 <= byte < 0xC0:
                yield byte, seen - 1 or b"", None if seen > 1 else alphabet[""]  # as all that it does not name
            continue
        read = seen + bytes([byte])
        try:
            yield byte, b"", alphabet[read.decode()]
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                # Behind four of the first bytes not every byte may follow.
                known = read in named or read in (b"\xe0", b"\xed", b"\xf0", b"\xf4")
                yield byte, read if known else (read[0] >= 0xE0) + (read[0] >= 0xF0) + 2 - len(read), None


def _moves(word: bytes, table: np.ndarray, known: dict[bytes, Any]) -> Any:
    """The states in which a word may be read, and those behind it. known: of words, where the result is kept too."""
    if word not in known:
        source, target = _moves(word[:-1], table, known)
        after = table[target, word[-1]].astype(np.int64)
        known[word] = source[after >= 0], after[after >= 0]
    return known[word]


def _sound(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Those that are decoded as their bytes: signs for what is unknown are not."""
    letter, pieces = tokenizer.encode("a").tolist(), tokenizer.pieces
    spelt = "".join("a" + pieces[token].decode(errors="ignore") for token in tokens).replace("\ufffd", "")
    if tokenizer.decode([i for token in tokens for i in (*letter, token)]).replace("\ufffd", "") == spelt:
        return tokens
    half = len(tokens) // 2
    return [sound for part in (tokens[:half], tokens[half:]) for sound in _sound(tokenizer, part)] if half else []


def _leading_to(marked: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The marked states, and those from which moves lead to them."""
    source, target = np.unique(np.stack([source, target]), axis=1)
    while True:
        more = marked.copy()
        more[source[marked[target]]] = True
        if (more == marked).all():
            return marked
        marked = more
