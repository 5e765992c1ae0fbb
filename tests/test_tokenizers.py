"""Text comes back exactly; what has no token is refused."""

import io
import random
import re

import numpy as np
import pytest
import sentencepiece

from sedd_jax.data import corpora, tokenizers
from sedd_jax.errors import InputError

TEXTS = {
    "empty": "",
    "spaces": "   ",
    "newlines": "\n\n\n",
    "code": "def f(x):\n    if x:\n\treturn  x  # two  spaces\n\n        ...\n",
    "edges": "  leading and trailing \n ",
    "returns": "a\r\nb\rc",
    "scripts": "naïve Ελληνικά 漢字 العربية हिन्दी",
    "emoji": "🙂👩‍👩‍👧‍👦🇯🇵",
    "combining": "e\u0301 \u00e9 \ufb01 \u00bd",
    "odd spaces": "\u00a0\u2003\u3000\u2028\u200b\ufeff",
    "control": "\x00\x01\x7f\t\x0b",
    "extremes": "\ud7ff\ue000\uffff\U0010ffff",
    "sentencepiece's space": "x \u2581 y\u2581\u2581",
    "symbols as text": "<|endoftext|> <unk> <s> <0x0A> ⁇",
}


def random_text(seed: int) -> str:
    source = random.Random(seed)
    ranges = [
        (0, 0x80),
        (0x80, 0x800),
        (0x800, 0xD800),
        (0xE000, 0x10000),
        (0x10000, 0x110000),
        (0x20, 0x21),
        (0xA, 0xB),
    ]
    return "".join(chr(source.randrange(*source.choice(ranges))) for _ in range(500))


def train(**options) -> bytes:
    output = io.BytesIO()
    lines = [line for text in corpora.documents("embedded")[:5] for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=output, model_type="bpe", vocab_size=300, minloglevel=2, **options
    )
    return output.getvalue()


def refused(message: str):
    """Expects an InputError of one line that contains `message`."""
    return pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(message)}[^\n]*\Z")


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train_sentencepiece(corpora.documents("embedded"), 512)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, trained):
    return tokenizers.Bytes() if request.param == "bytes" else trained


@pytest.mark.parametrize("text", [*TEXTS.values(), *map(random_text, range(5))], ids=[*TEXTS, *map(str, range(5))])
def test_text_comes_back_exactly(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert tokenizer.eot not in tokens
    assert tokenizer.decode(tokens) == text
    assert b"".join(tokenizer.pieces[token] for token in tokens) == text.encode()


def test_the_embedded_corpus_comes_back_exactly(tokenizer):
    for text in corpora.documents("embedded"):
        tokens = tokenizer.encode(text)
        assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
        assert tokenizer.decode(tokens) == text


def test_ends_of_text_are_shown(tokenizer):
    eot, a, b = [tokenizer.eot], tokenizer.encode("a "), tokenizer.encode(" b")
    assert tokenizer.decode([*a, *eot, *b]) == "a <|endoftext|> b"
    assert tokenizer.decode([*eot, *eot, *a]) == "<|endoftext|><|endoftext|>a "
    assert tokenizer.decode([]) == ""


def test_bytes_that_are_not_utf8_are_shown_as_replacement_characters(trained):
    assert tokenizers.Bytes().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    euro = trained.encode("€")
    assert trained.decode(euro) == "€"
    assert set(trained.decode(euro[:2])) == {"\ufffd"}


def test_rows_beyond_the_tokens_are_shown_by_their_number():
    tokenizer = tokenizers.Bytes()
    tokenizer.padding = 2
    ids = [257, 0x61, 258, tokenizer.eot, 0x62, 257]
    assert tokenizer.decode(ids) == "<|257|>a<|258|><|endoftext|>b<|257|>"
    with refused("token 259 has no text"):
        tokenizer.decode([259])


def test_what_has_no_token_or_text_is_refused(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with refused(f"token {token} has no text"):
            tokenizer.decode([0, token])
    with refused("half a surrogate pair at character 1"):
        tokenizer.encode("a\ud800")


def test_bytes_are_the_bytes_of_utf8():
    assert tokenizers.Bytes().encode("aé\n").tolist() == [0x61, 0xC3, 0xA9, 0x0A]


def test_long_texts_are_encoded_in_blocks_as_they_would_be_whole(trained):
    text = "\n".join(corpora.documents("embedded"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.contents[0])
    assert len(text) > 3 << 16
    np.testing.assert_array_equal(trained.encode(text), processor.encode(text))


def test_indentation_is_one_piece_and_each_newline_another(trained):
    assert len(trained.encode("\n")) == 1
    assert len(trained.encode("\n\n    ")) == 3


def test_training_is_deterministic_and_has_the_size_asked_for(trained):
    again = tokenizers.train_sentencepiece(corpora.documents("embedded"), 512)
    assert again.vocab_size == 512
    assert again.fingerprint == trained.fingerprint


def test_training_uses_lines_of_any_length():
    assert "x" * 8 in {tokenizers.train_sentencepiece(["x" * 10_000], 264).decode([token]) for token in range(264)}


def test_fingerprints_tell_tokenizers_apart(trained):
    other = tokenizers.train_sentencepiece(corpora.documents("embedded"), 513)
    assert len({tokenizers.Bytes().fingerprint, trained.fingerprint, other.fingerprint}) == 3
    assert tokenizers.Bytes().fingerprint == tokenizers.Bytes().fingerprint


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["abc"], 10, "vocab_size=10 is too small for the characters there are: give 261 or more"),
        (["abc"], 10_000, "vocab_size=10000 is too large for the text there is: give "),
        (["abc"], -1, "vocab_size=-1 cannot be trained"),
        (["", ""], 300, "no text to train a tokenizer on"),
    ],
)
def test_training_that_cannot_be_is_refused(texts, vocab_size, message):
    with refused(message):
        tokenizers.train_sentencepiece(texts, vocab_size)


def test_the_size_that_a_refusal_names_works():
    texts = corpora.documents("embedded")[:3]
    for vocab_size in (10, 1_000_000):
        with pytest.raises(InputError) as refusal:
            tokenizers.train_sentencepiece(texts, vocab_size)
        advised = int(re.search(r"give (\d+)", str(refusal.value))[1])
        assert tokenizers.train_sentencepiece(texts, advised).vocab_size == advised


def test_models_from_elsewhere_end_texts_with_their_own_symbol():
    assert tokenizers.SentencePiece(train()).eot == 2
    assert tokenizers.SentencePiece(train(eos_id=-1, control_symbols=["<|endoftext|>"])).eot == 2
    with refused("no <|endoftext|> and no end of sentence"):
        tokenizers.SentencePiece(train(eos_id=-1))


def test_models_from_elsewhere_see_the_whole_text_at_once():
    # This one puts a space before each text, so that blocks would change the tokens.
    model = train(user_defined_symbols=["\n"])
    text = "\n".join(corpora.documents("embedded")[:40])
    assert len(text) > 2 << 16
    whole = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    np.testing.assert_array_equal(tokenizers.SentencePiece(model).encode(text), whole)


def test_what_is_saved_is_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "run")
    loaded = tokenizers.load(tmp_path / "deep" / "run")
    assert (loaded.fingerprint, loaded.vocab_size, loaded.eot) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eot,
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_make_prefers_a_path_then_the_directory_then_training(trained, tmp_path):
    texts = corpora.documents("embedded")[:3]
    fresh = tokenizers.make("sentencepiece", vocab_size=400, texts=texts, directory=tmp_path)
    assert fresh.vocab_size == 400 and not list(tmp_path.iterdir())
    fresh.save(tmp_path)
    assert tokenizers.make("sentencepiece", directory=tmp_path).fingerprint == fresh.fingerprint
    trained.save(tmp_path / "other")
    path = str(tmp_path / "other" / "tokenizer.model")
    assert tokenizers.make("sentencepiece", path=path, directory=tmp_path).fingerprint == trained.fingerprint
    assert isinstance(tokenizers.make("bytes", directory=tmp_path), tokenizers.Bytes)


def test_make_refuses_what_it_cannot_make(trained, tmp_path):
    trained.save(tmp_path)
    with refused("tokenizer kind 'words': give one of bytes, text8, sentencepiece, gpt2, huggingface"):
        tokenizers.make("words")
    with refused("vocab_size=None"):
        tokenizers.make("sentencepiece", texts=["abc"])
    with refused("vocab_size=300, but this bytes tokenizer has 257"):
        tokenizers.make("bytes", vocab_size=300)
    with refused("vocab_size=300, but this sentencepiece tokenizer has 512"):
        tokenizers.make("sentencepiece", vocab_size=300, directory=tmp_path)
    with refused("the kind 'bytes' takes none"):
        tokenizers.make("bytes", path="some.model")
    with refused("nowhere.model: No such file or directory"):
        tokenizers.make("sentencepiece", path=str(tmp_path / "nowhere.model"))
    tokenizers.Bytes().save(tmp_path)
    with refused("not of the kind 'sentencepiece'"):
        tokenizers.make("sentencepiece", directory=tmp_path)


def test_damaged_files_are_refused(trained, tmp_path):
    def damage(name: str, content: bytes) -> None:
        trained.save(tmp_path)
        (tmp_path / name).write_bytes(content)

    flipped = bytearray(trained.contents[0])
    flipped[-1] ^= 1
    for model in (b"", b"garbage", trained.contents[0][:1000]):
        damage("tokenizer.model", model)
        with refused("tokenizer.model: not a SentencePiece model"):
            tokenizers.load(tmp_path)
        with refused("tokenizer.model: not a SentencePiece model"):
            tokenizers.make("sentencepiece", path=str(tmp_path / "tokenizer.model"))
    for model in (bytes(flipped), tokenizers.train_sentencepiece(corpora.documents("embedded"), 500).contents[0]):
        damage("tokenizer.model", model)
        with refused("is not the one saved there"):
            tokenizers.load(tmp_path)
    for description in (b"", b"[]", b'{"kind": "bytes"}', b"\xff"):
        damage("tokenizer.json", description)
        with refused("tokenizer.json is damaged"):
            tokenizers.load(tmp_path)
    damage("tokenizer.json", b'{"kind": "words", "fingerprint": ""}')
    with refused("unknown kind 'words'"):
        tokenizers.load(tmp_path)
    with refused("tokenizer.json: No such file or directory"):
        tokenizers.load(tmp_path / "nowhere")
