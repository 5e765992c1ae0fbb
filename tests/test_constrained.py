"""Samples under a rule follow the law of the sampler given the rule; rules are regular languages, byte for byte."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from etils import epath

from sedd_jax import likelihood, sampling
from sedd_jax.data.tokenizers import Bytes, Text8
from sedd_jax.data.tokenizers.subwords import train_sentencepiece
from sedd_jax.errors import InputError
from sedd_jax.generation import infilling, rules
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import parse_template, parse_windows
from sedd_jax.noise import LogLinear
from sedd_jax.rates import Absorbing
from sedd_jax.sampling.constrained import grouped
from sedd_jax.training.trained import load_trained

V, L, DRAWS = 3, 5, 12_000
GRAPH, NOISE = Absorbing(V), LogLinear(1e-6)
TEXTS = np.array(list(itertools.product(range(V), repeat=L)))
# Tokens of a text mostly repeat, so that a product of predictions is far from the truth.
STICKY = np.prod(np.where(TEXTS[:, 1:] == TEXTS[:, :-1], 0.9, 0.05), axis=1) * np.array([0.6, 0.3, 0.1])[TEXTS[:, 0]]


def predictions(p0):
    """p(token | the tokens there) at each position of each text with masks, [4^5, 5, 3]."""
    found = np.ones((V + 1,) * L + (L, V))
    for x in itertools.product(range(V + 1), repeat=L):
        there = p0.reshape((V,) * L)[tuple(slice(None) if token == V else token for token in x)]
        masked = [i for i in range(L) if x[i] == V]
        for axis, i in enumerate(masked):
            mass = there.sum(tuple(a for a in range(len(masked)) if a != axis))
            found[(*x, i)] = mass / mass.sum()
    return found.reshape(-1, L, V)


TABLE = predictions(STICKY)


def score_fn(x, sigma):
    log_pi = jnp.asarray(np.log(TABLE), jnp.float32)[toy.number(x, V + 1)]
    return jnp.pad(log_pi, ((0, 0), (0, 0), (0, 1))) - jnp.log(jnp.expm1(sigma))[:, None, None]


def law(per_call):
    """What first-hitting draws from with so many positions a call, of every text."""
    total, everyone = np.zeros(len(TEXTS)), np.arange(len(TEXTS))
    for order in (orders := list(itertools.permutations(range(L)))):
        x, p = np.full_like(TEXTS, V), 1.0
        for first in range(0, L, per_call):
            pi, now = TABLE[toy.number(x, V + 1)], list(order[first : first + per_call])
            for i in now:
                p = p * pi[everyone, i, TEXTS[:, i]]
            x[:, now] = TEXTS[:, now]
        total += p / len(orders)
    return total


# States 0, 1: an even number of zeros; 2 to 4: no two zeros in a row, a two at the end; 5, 6: ones and twos in turn.
MOVES = np.array([[1, 0, 0], [0, 1, 1], [3, 2, 4], [-1, 2, 4], [3, 2, 4], [-1, 6, 5], [5, -1, 6]])
ACCEPTING = np.isin(np.arange(7), [0, 4, 6])
# Holes: first position, the one behind the last, and the state to begin in.
HOLES = {"even": [(0, 5, 0)], "no pairs": [(1, 5, 2)], "both": [(0, 2, 5), (2, 5, 0)]}


def automaton():
    source, label = np.nonzero(MOVES >= 0)
    class_of, target = np.arange(V, dtype=np.int32), MOVES[source, label]
    parts = (part.astype(np.int32) for part in (source, label, target))
    return sampling.Automaton(grouped(class_of, V), class_of, *parts, grouped(source, len(MOVES)), ACCEPTING)


def keeps(holes, text):
    for first, end, state in holes:
        for token in text[first:end]:
            state = MOVES[state, token] if state >= 0 else -1
        if state < 0 or not ACCEPTING[state]:
            return False
    return True


def constraint(holes, population):
    """Of DRAWS sequences."""
    row = [(i, start if i == first else -1, i == end - 1) for first, end, start in holes for i in range(first, end)]
    row += [(L, -1, False)] * (L - len(row))
    places, starts, ends = (np.tile(np.array(part), (DRAWS, 1)) for part in zip(*row, strict=True))
    number = np.arange(DRAWS, dtype=np.int32)
    rules = sampling.Rules(places.astype(np.int32), starts.astype(np.int32), ends, number // population, number)
    return sampling.Constraint(automaton(), rules)


@jax.jit
def draw(key, steps, ruled):
    sampler = sampling.Sampler(method="first_hitting", rows=10**6)
    return sampling.simulate(key, score_fn, GRAPH, NOISE, (DRAWS, L), steps=steps, sampler=sampler, constraint=ruled)


@pytest.mark.parametrize(("name", "per_call"), [("even", 1), ("no pairs", 2), ("both", 2)])
def test_weighted_samples_follow_the_law_given_the_rule(name, per_call):
    """By enumeration; every sample keeps the rule, the mean weight is its probability, and resampling changes neither.

    The noise of a total variation is sum sqrt(p / (2 pi n)), with n the effective size.
    """
    valid = np.array([keeps(HOLES[name], text) for text in TEXTS])
    true = law(per_call) * valid
    truth = true.sum()
    true /= truth
    for population in (1, 100):
        found = draw(jax.random.key(per_call), -(-L // per_call), constraint(HOLES[name], population))
        number, origin = toy.number(np.asarray(found.tokens), V), np.asarray(found.origin)
        assert valid[number].all() and found.calls == -(-L // per_call)
        mean, error, weights = sampling.probability(np.asarray(found.log_weight), origin)
        assert abs(mean - truth) < 3 * error < 0.15 * truth
        effective = 1 / np.square(np.bincount(origin, weights)).sum()
        assert (effective < DRAWS / 2) or population == 1 or name != "both"  # it is resampled
        weighted, plain = (
            np.abs(np.bincount(number, w, len(TEXTS)) - true).sum() / 2 for w in (weights, np.full(DRAWS, 1 / DRAWS))
        )
        floor = np.sqrt(true / (2 * np.pi * effective)).sum()
        assert weighted < 2 * floor and plain > 6 * floor


def test_the_probability_of_a_rule_has_the_error_of_independent_origins():
    log_weight = np.log([1.0, 3.0, 2.0, 2.0])
    mean, error, weights = sampling.probability(log_weight, np.arange(4))
    assert (mean, error) == pytest.approx((2, np.std([1, 3, 2, 2], ddof=1) / 2))
    np.testing.assert_allclose(weights, [1 / 8, 3 / 8, 2 / 8, 2 / 8])
    assert sampling.probability(log_weight, np.array([0, 0, 0, 1]))[1] > error
    assert np.isnan(sampling.probability(log_weight[:1], np.arange(1))[1])


def accepts(language, rule, ids):
    automaton, state = language.automaton, language.starts[rule]
    for token in ids:
        moves = (automaton.source == state) & (automaton.label == automaton.class_of[token])
        if not moves.any():
            return False
        (state,) = automaton.target[moves]
    return bool(automaton.accepting[state])


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "array", "items": {"enum": ["a", None]}, "minItems": 1, "maxItems": 2},
        "s": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "boolean"}]},
    },
}


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        (r"/\d{1,2} (May|June)/", ["3 May", "31 June"], ["3 Ma", "3 Mayo", "131 May", "", " 3 May"]),
        ("one|two é|a.b", ["one", "two é", "a.b"], ["on", "two e", "acb", "one|two é"]),
        ("/.é*[^a]/", ["xé", "漢ééé🙂", "\x00\u00ea", "éé"], ["x", "xa", "\nb"]),
        ("/[a-c漢]+/", ["漢a漢", "abc"], ["", "d", "滢"]),
        (
            json.dumps(SCHEMA),
            [
                json.dumps({"n": -10, "x": ["a", None], "s": 'é"'}, ensure_ascii=False),
                '{"n": 0, "x": [null], "s": true}',
            ],
            ['{"n": 01, "x": [null], "s": true}', '{"n": 0, "x": [], "s": true}', '{"n": 0, "x": ["a"], "s": "123"}'],
        ),
    ],
)
def test_rules_are_kept_byte_for_byte(rule, inside, outside):
    language = rules.language(["x", rule], Bytes(), 257)
    for text in inside:
        assert accepts(language, rule, text.encode()), text
    for text in outside:
        assert not accepts(language, rule, text.encode()), text
    # Half a character, a surrogate, and a letter in too many bytes.
    for text in (b"x\xc3", b"x\xed\xa0\x80", b"x\xe0\x81\xa1", b"x\xc3x"):
        assert not accepts(language, rule, text)


def test_any_division_into_tokens_spells_a_text_and_signs_do_not():
    tokenizer = train_sentencepiece(["abcab cab bca " * 30, "ab\nca cabé "], 280)
    rule, unknown, pieces = "/( ?(ab|ca|é)+)+/", "/x<unk>/", tokenizer.pieces
    language = rules.language([rule, unknown], tokenizer, tokenizer.vocab_size + 3)
    few = [i for i, piece in enumerate(pieces) if piece and set(piece) <= set(b" abc\xc3\xa9")]
    for ids in itertools.product(few, repeat=2):
        text = b"".join(pieces[i] for i in ids).decode(errors="replace")
        assert accepts(language, rule, ids) == bool(re.fullmatch(rule[1:-1], text)), text
    assert language.automaton.class_of[pieces.index(b"<unk>")] == language.automaton.class_of[tokenizer.eot] == -1
    assert accepts(language, unknown, tokenizer.encode("x<unk>"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("[[4:/(/]]", "the rule '/(/' cannot be read"),
        ("[[4:/a$/]]", "cannot be read: '\\$'"),
        ('[[4:{"type": "integer", "minimum": 3}]]', "cannot have the JSON schema"),
        ('[[4:{"type": "string", "pattern": "a+", "maxLength": 3}]]', "gives the length too"),
        ("[[4:{x}]]", "cannot be read"),
        ("[[4:/a{600}/]]", "takes more than 500 states"),
        ("[[4:one|two]]", "4 tokens spell no text of the rule 'one|two': 3 to 3 do"),
        ("[[4-9:one|two]]", "3 to 3 do"),
        ("[[0:one]]", "0 tokens spell no text"),
        ("[[3:/a{40}/]]", "no 32 tokens do"),
        ("[[1-30]] [[1-30:/.*/]] [[1-3]]", "has 2700 lengths; 1024 are the most"),
    ],
)
def test_what_cannot_be_met_is_refused_with_the_reason(template, message, monkeypatch):
    monkeypatch.setattr(rules, "MOST_STATES", 500)
    length = 100 if "lengths" in message else 32
    ((_, window),) = parse_windows(length, Bytes(), template=template)
    with pytest.raises(InputError, match=message.replace("|", r"\|").replace("(", r"\(").replace("/", "/")):
        infilling.alternatives(template, window, Bytes(), rules.language(dict.fromkeys(window.rules), Bytes(), 257))


def test_letters_that_no_token_has_and_methods_without_the_law_are_refused():
    window = parse_template("ab[[3:/[A-Z]+/]]", Text8(), length=8)
    language = rules.language(window.rules, Text8(), 27)
    assert "none has these letters" in language.fault(window)
    with pytest.raises(InputError, match="holes with a rule need sampling method 'first_hitting'"):
        sampling.Sampler().check(Absorbing(27), 4, constrained=True)
    with pytest.raises(InputError, match="top_k 0 and top_p 1"):
        sampling.Sampler(method="first_hitting", top_k=3).check(Absorbing(27), 4, constrained=True)


def test_holes_have_ranges_and_rules():
    window = parse_template("a[[2-3:/[x]]{2,3}|\\[/]]b[[~1-2]][[4:one|two]]", Bytes(), length=32, sizes=(2, 5, 4))
    assert window.rules == ("/[x]]{2,3}|\\[/", "", "one|two")
    assert (window.holes, window.starts) == ((2, 5, 4), (1, 4, 9))
    assert window.ranges[0] == (2, 3) and window.ranges[1][0] < window.ranges[1][1] and window.ranges[2] == (4, 4)


def test_the_posterior_of_a_length_is_that_of_the_chain():
    """A zero, a hole of 0 to 3 tokens, a one; what is behind is unknown."""
    table = STICKY.reshape((V,) * L)
    exact = np.array([np.moveaxis(table, n + 1, 1)[0, 1].sum() for n in range(4)])
    tokens = np.zeros((4, L), np.int32)
    tokens[range(4), range(1, 5)] = 1
    never = ~np.array([[i in (0, n + 1) for i in range(L)] for n in range(4)])
    measure = jax.jit(
        lambda: likelihood.bound(
            jax.random.key(0), score_fn, GRAPH, NOISE, jnp.asarray(tokens), num_times=512, never=jnp.asarray(never)
        )
    )
    probs, stderr = infilling.posterior(measure())
    assert (abs(probs - exact / exact.sum()) < 3 * stderr).all() and (stderr < 0.03).all()


def test_windows_of_a_model_keep_rules_on_any_mesh(models):
    """Lengths and rules together, by eight devices, which fill the last batch up."""
    trained = load_trained(epath.Path(models / "diffusion"), log=print)
    template = r"on [[11-13:/\d{1,2} (May|June) \d{4}/]] [[3:one|two]]"
    ((_, window),) = parse_windows(32, Bytes(), template=template)
    language = rules.language([rule for rule in window.rules if rule], Bytes(), 257)
    windows = infilling.alternatives(template, window, Bytes(), language)
    assert [window.holes for window in windows] == [(11, 3), (12, 3)]
    chosen, posterior = infilling.choose(trained, windows, 11, draws=4, seed=0)
    assert sum(row["probability"] for row in posterior) == pytest.approx(1)
    options = dataclasses.replace(trained.experiment.sampling, method="first_hitting")
    generator = Generator(trained, options, 8, language.constraint(chosen))
    generated = generator.generate(np.stack([window.tokens for window in chosen]), steps=4, seed=0)
    for tokens, window in zip(generated.tokens, chosen, strict=True):
        text = Bytes().decode(tokens[: window.shown])
        assert re.fullmatch(r"on \d{1,2} (May|June) \d{4} (one|two)", text), text
    mean, error, _ = sampling.probability(*generated.weights)
    assert 0 < mean < 1e-9 and error > 0 and set(generated.weights[1]) <= set(range(11))
