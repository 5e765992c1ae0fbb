"""Test sets taken back to plain text."""

import pytest

from sedd_jax.data import detokenize


@pytest.mark.parametrize(
    ("rules", "text", "plain"),
    [
        (
            detokenize.wikitext,
            " The game 's 1 @,@ 000 units , sold in mid @-@ 2011 ( Japan ) . \n",
            " The game's 1,000 units, sold in mid-2011 (Japan).\n",
        ),
        (detokenize.wikitext, " = = Plot = = \n", " == Plot ==\n"),
        (
            detokenize.penn_treebank,
            "the company 's shares do n't cost $ N N <unk>",
            "the company's shares don't cost $1 1 ?",
        ),
        (detokenize.lm1b, 'He said , " Yes " ( twice ) .', 'He said, "Yes" (twice) .'),
        (detokenize.lambada, " \u201cHi\u201d she said ", '\n"Hi" she said'),
    ],
)
def test_plain_text(rules, text, plain):
    assert rules(text) == plain
