"""Tokenizers whose vocabulary comes from elsewhere: text8's characters, GPT-2's two files, a tokenizer.json."""

import json
import os
import shutil

import numpy as np
import pytest
import real_text
import tokenizers as library
from etils import epath
from huggingface_hub import constants
from running import files, train_here, write_text
from test_tokenizers import TEXTS, random_text, refused

from sedd_jax.data import corpora, tokenizers
from sedd_jax.errors import InputError
from sedd_jax.training.trained import load_trained

SPELT = "<|endoftext|> </s>[SEP] [CLS]"


def write_gpt2(folder, merges=300, names=("encoder.json", "vocab.bpe")):
    """GPT-2's two files for a smaller vocabulary, which the library learns from the embedded corpus."""
    learner = library.Tokenizer(library.models.BPE())
    learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(corpora.documents("embedded")[:20], trainer)
    model = json.loads(learner.to_str())["model"]
    vocabulary = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(vocabulary))
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    return folder


def byte_level() -> library.Tokenizer:
    """Lossless, as most of today's are."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator(corpora.documents("embedded")[:20], trainer)
    return made


def bert() -> library.Tokenizer:
    """The pipeline of bert-base-uncased, with what may be left in such a file: borders, truncation, padding."""
    made = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.decoder = library.decoders.WordPiece()
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = library.trainers.WordPieceTrainer(vocab_size=600, special_tokens=symbols, show_progress=False)
    made.train_from_iterator(corpora.documents("embedded")[:20], trainer)
    made.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_truncation(8)
    made.enable_padding(length=16)
    return made


def words() -> library.Tokenizer:
    """Whole words, </s> among them, which the text may hold too."""
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "<": 3, "/": 4, "s": 5, ">": 6}
    made = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    return made


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module", params=["gpt2", "huggingface"])
def tokenizer(request, gpt2):
    if request.param == "gpt2":
        return tokenizers.make("gpt2", path=str(gpt2))
    return tokenizers.HuggingFace(byte_level().to_str().encode())


@pytest.mark.parametrize("text", [*TEXTS.values(), SPELT, *map(random_text, range(3))])
def test_text_comes_back_exactly(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert tokenizer.eot not in tokens
    assert tokenizer.decode(tokens) == text
    assert b"".join(tokenizer.pieces[token] for token in tokens) == text.encode()


def test_the_embedded_corpus_comes_back_exactly(tokenizer):
    assert tokenizer.lossless and tokenizers.lossy_warning(tokenizer) is None
    for text in corpora.documents("embedded")[::7]:
        tokens = tokenizer.encode(text)
        assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
        assert tokenizer.decode(tokens) == text


def test_ends_of_text_are_shown(tokenizer):
    eot, a, b = [tokenizer.eot], tokenizer.encode("é "), tokenizer.encode(" b")
    assert tokenizer.decode([*a, *eot, *eot, *b]) == "é <|endoftext|><|endoftext|> b"
    # Half a character before an end of text is not completed by the bytes after it.
    assert tokenizer.decode([*tokenizer.encode("字")[:1], *eot, *b]) == "\ufffd<|endoftext|> b"
    for token in (-1, tokenizer.vocab_size):
        with refused(f"token {token} has no text"):
            tokenizer.decode([token])
    with refused("half a surrogate pair"):
        tokenizer.encode("a\ud800")


def test_what_is_saved_is_loaded_without_the_files_it_came_from(gpt2, tmp_path):
    pile = tmp_path / "tokenizer.json"
    pile.write_bytes(byte_level().to_str().encode())
    for kind, path in [("gpt2", gpt2), ("huggingface", pile)]:
        made = tokenizers.make(kind, path=str(path))
        made.save(tmp_path / kind)
        for again in (tokenizers.load(tmp_path / kind), tokenizers.make(kind, directory=tmp_path / kind)):
            assert type(again) is type(made)
            assert (again.fingerprint, again.vocab_size, again.eot) == (made.fingerprint, made.vocab_size, made.eot)
        with refused(f"vocab_size=7, but this {kind} tokenizer has {made.vocab_size}"):
            tokenizers.make(kind, path=str(path), vocab_size=7)
    with refused("not of the kind 'gpt2'"):
        tokenizers.make("gpt2", directory=tmp_path / "huggingface")


def test_gpt2_by_directory_or_either_file_and_under_both_pairs_of_names(gpt2, tmp_path):
    renamed = write_gpt2(tmp_path / "hf", names=("vocab.json", "merges.txt"))
    prefixed = write_gpt2(tmp_path / "prefixed", names=("gpt2_encoder.json", "gpt2_vocab.bpe"))
    paths = [gpt2, gpt2 / "encoder.json", gpt2 / "vocab.bpe", renamed, renamed / "merges.txt", prefixed]
    assert len({tokenizers.make("gpt2", path=str(path)).fingerprint for path in paths}) == 1
    other = write_gpt2(tmp_path / "other", merges=301)
    assert tokenizers.make("gpt2", path=str(other)).fingerprint != tokenizers.make("gpt2", path=str(gpt2)).fingerprint
    shutil.copy(renamed / "vocab.json", prefixed / "vocab.json")
    with refused("holds 2 files named"):
        tokenizers.make("gpt2", path=str(prefixed))


def test_long_texts_are_encoded_in_blocks_as_they_would_be_whole(gpt2):
    text = "\n".join(corpora.documents("embedded"))
    pipeline = library.Tokenizer(library.models.BPE.from_file(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe")))
    pipeline.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert len(text) > 3 << 16
    np.testing.assert_array_equal(tokenizers.make("gpt2", path=str(gpt2)).encode(text), pipeline.encode(text).ids)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("encoder.json", cut, "not an encoder.json"),
        ("encoder.json", lambda _: b"", "not an encoder.json"),
        ("encoder.json", lambda _: b"[" * 100_000, "not an encoder.json"),
        ("encoder.json", lambda _: b'{"a": true}', "not an encoder.json"),
        ("encoder.json", lambda _: b'{"a": 4294967295}', "the ids of encoder.json are not 0 to 0"),
        ("encoder.json", lambda content: content.replace(b'"<|endoftext|>"', b'"<|end|>"'), "do not fit one another"),
        ("vocab.bpe", lambda content: content[: content.index(b"\n", 900) + 1], "do not fit one another"),
        ("vocab.bpe", lambda content: content[:-2], "do not fit one another"),
        ("vocab.bpe", lambda _: b"", "not a vocab.bpe"),
        ("vocab.bpe", lambda _: b"\xff\xfe", "not a vocab.bpe"),
        ("vocab.bpe", lambda content: content + b"a b c\n", "not a vocab.bpe"),
        ("vocab.bpe", lambda content: content + b"zz zz\n", "do not fit one another"),
    ],
)
def test_damaged_files_of_gpt2_are_refused(gpt2, tmp_path, name, damage, message):
    folder = shutil.copytree(gpt2, tmp_path / "copy")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with refused(message):
        tokenizers.make("gpt2", path=str(folder))


def test_missing_files_of_gpt2_are_named(gpt2, tmp_path):
    shutil.copy(gpt2 / "encoder.json", tmp_path)
    with refused("vocab.bpe: No such file"):
        tokenizers.make("gpt2", path=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with refused("holds 0 files"):
        tokenizers.make("gpt2", path=str(tmp_path / "empty"))
    with refused("give encoder.json or vocab.bpe"):
        tokenizers.make("gpt2", path=str(tmp_path / "model.bin"))


def test_the_cache_of_hugging_face_is_looked_into(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with refused("path=None, and GPT-2's vocabulary is not in the local Hugging Face cache"):
        tokenizers.make("gpt2")
    with refused("is no file, nor a repository whose tokenizer.json is in the local Hugging Face cache"):
        tokenizers.make("huggingface", path="some/model")
    with refused("needs the path of a file"):
        tokenizers.make("huggingface")
    for repository in ("models--gpt2", "models--some--model"):
        snapshot = tmp_path / repository / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("0123")
    shutil.copy(gpt2 / "encoder.json", tmp_path / "models--gpt2" / "snapshots" / "0123" / "vocab.json")
    shutil.copy(gpt2 / "vocab.bpe", tmp_path / "models--gpt2" / "snapshots" / "0123" / "merges.txt")
    (snapshot / "tokenizer.json").write_text(bert().to_str())
    assert tokenizers.make("gpt2").fingerprint == tokenizers.make("gpt2", path=str(gpt2)).fingerprint
    assert tokenizers.make("huggingface", path="some/model").vocab_size == 600


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def llama(pre=None, normalizer=None, model=None, trainer=None, ends="\n", **options) -> library.Tokenizer:
    """Like most files of today but for their size; by default the one of Llama 2, which splits no words."""
    n, d = library.normalizers, library.decoders
    made = library.Tokenizer(model or library.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")]) if normalizer is None else normalizer
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    if pre:
        made.pre_tokenizer, made.decoder = pre, d.ByteLevel()
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": 900, "special_tokens": symbols, "show_progress": False} | options
    # As SentencePiece, which trains on lines.
    texts = [line for text in corpora.documents("embedded")[:20] for line in text.split(ends)]
    made.train_from_iterator(texts, (trainer or library.trainers.BpeTrainer)(**options))
    return made


def cl100k() -> library.Tokenizer:
    p = library.pre_tokenizers
    split = p.Sequence([p.Split(library.Regex(CL100K), "isolated"), p.ByteLevel(False, use_regex=False)])
    return llama(split, library.normalizers.NFC(), ends="\0", initial_alphabet=p.ByteLevel.alphabet())


def byte_level_of(**options) -> library.Tokenizer:
    pre = library.pre_tokenizers.ByteLevel(**options)
    return llama(pre, library.normalizers.Sequence([]), ends="e", initial_alphabet=pre.alphabet())


def unigram() -> library.Tokenizer:
    options = {"model": library.models.Unigram(), "trainer": library.trainers.UnigramTrainer, "unk_token": "<unk>"}
    return llama(library.pre_tokenizers.Metaspace(prepend_scheme="first"), library.normalizers.Strip(), **options)


PIPELINES = {
    "gpt2": byte_level,
    "cl100k": cl100k,
    "roberta": lambda: byte_level_of(add_prefix_space=True),
    "bert": bert,
    "words": words,
    "unigram": unigram,
    "across words": llama,
    "across lines": lambda: byte_level_of(add_prefix_space=False, use_regex=False),
    "letters": lambda: llama(max_token_length=1),
}


def test_a_lossy_file_says_so_and_adds_no_symbols():
    made = tokenizers.HuggingFace(bert().to_str().encode())
    assert (made.vocab_size, made.eot) == (600, 3)
    assert not made.lossless and "bits per byte" in tokenizers.lossy_warning(made)
    tokens = made.encode("The  Statement is the [SEP] of [sep] a statement, and of much more.")
    assert len(tokens) > 8 and not {0, 2, 3} & set(tokens.tolist())
    shown = made.decode([*made.encode("A value"), made.eot, *made.encode("is it")])
    assert shown == "a value<|endoftext|>is it"


LONG = {
    "prose": "\n".join(corpora.documents("embedded"))[:100_000],
    "lines that begin and end with spaces": " = Title = \n \n It is one . \n" * 1000,
    "all kinds": "\n".join(TEXTS.values()) * 3,
    "random": random_text(7),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_blocks_have_the_ids_of_the_whole_text(name, monkeypatch):
    made = tokenizers.HuggingFace(PIPELINES[name]().to_str().encode())
    cuts = [found.start() for found in made._boundary.finditer("a. b.\nc d\n")] if made._boundary else []
    expected = {
        "across lines": [],
        "across words": [5, 9],
        "letters": [5, 9],
        "unigram": [2, 7],
        "cl100k": [2, 7, 9],
        "words": [2, 5, 7, 9],
    }
    assert cuts == expected.get(name, [2, 5, 7, 9])
    monkeypatch.setattr("sedd_jax.data.tokenizers.base._BLOCK", 1 << 60)
    whole = {kind: made.encode(text) for kind, text in LONG.items()}
    monkeypatch.setattr("sedd_jax.data.tokenizers.base._BLOCK", 40)
    for kind, text in LONG.items():
        np.testing.assert_array_equal(made.encode(text), whole[kind], err_msg=kind)


def test_gpt2_is_encoded_in_blocks_wherever_a_space_follows_a_word(gpt2, monkeypatch):
    made = tokenizers.make("gpt2", path=str(gpt2))
    whole = {kind: made.encode(text) for kind, text in LONG.items()}
    monkeypatch.setattr("sedd_jax.data.tokenizers.base._BLOCK", 40)
    assert max(map(len, made._blocks(LONG["lines that begin and end with spaces"]))) < 80
    for kind, text in LONG.items():
        np.testing.assert_array_equal(made.encode(text), whole[kind], err_msg=kind)


def edited(made: library.Tokenizer, *, special=True, end="<|endoftext|>", **model) -> bytes:
    """The file with its end of text renamed or no special token, and with other options of the model."""
    content = json.loads(made.to_str().replace("<|endoftext|>", end))
    content["added_tokens"][0]["special"] = special
    content["model"] |= model
    return json.dumps(content).encode()


def test_dropout_is_switched_off():
    plain, dropping = (tokenizers.HuggingFace(edited(byte_level(), dropout=rate)) for rate in (None, 0.5))
    text = corpora.documents("embedded")[0]
    for _ in range(3):
        np.testing.assert_array_equal(dropping.encode(text), plain.encode(text))


def test_an_end_of_text_counts_by_its_name():
    made = tokenizers.HuggingFace(edited(byte_level(), special=False))
    assert made.eot == 0 and 0 not in made.encode(SPELT)
    assert made.decode(made.encode(SPELT)) == SPELT


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("named", ["<|eot|>", {"content": "<|eot|>", "lstrip": False}])
def test_an_end_of_text_of_another_name_is_named_by_the_file_beside(tmp_path, special, named):
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    path.write_bytes(edited(byte_level(), end="<|eot|>", special=special))
    for content in (None, "{}", '{"eos_token": null}', '{"eos_token": "<|other|>"}'):
        if content:
            config.write_text(content)
        with refused("no end of text in this tokenizer.json"):
            tokenizers.make("huggingface", path=str(path))
    for content in ("", "[]", "[" * 100_000):
        config.write_text(content)
        with refused("tokenizer_config.json is damaged"):
            tokenizers.make("huggingface", path=str(path))
    config.write_text(json.dumps({"eos_token": named, "chat_template": "any"}))
    made = tokenizers.make("huggingface", path=str(tmp_path))
    assert made.eot == 0 and 0 not in made.encode("a <|eot|>") and made.decode([0]) == "<|endoftext|>"
    made.save(tmp_path / "run")
    for again in (tokenizers.load(tmp_path / "run"), tokenizers.make("huggingface", directory=tmp_path / "run")):
        assert (again.fingerprint, again.eot) == (made.fingerprint, 0)
    # A name that the file has by itself goes first, as it always did.
    path.write_bytes(edited(byte_level()))
    assert tokenizers.make("huggingface", path=str(path)).contents == (path.read_bytes(),)


def changed(**parts) -> library.Tokenizer:
    made = byte_level()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def some_bytes() -> library.Tokenizer:
    """Byte-level, with those bytes alone that a few characters need."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer, made.decoder = library.pre_tokenizers.ByteLevel(False), library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(special_tokens=["<|endoftext|>"], show_progress=False)
    made.train_from_iterator([*map(chr, range(256)), *"漢字 👩‍ ½ ﬁ … \u2581 e\u0301"], trainer)
    return made


def with_mask() -> library.Tokenizer:
    made = byte_level()
    made.add_tokens([library.AddedToken("<mask>", lstrip=True)])
    return made


# Losses that are rare, or of the first word only.
LOSSY = {
    "a space before the text": lambda: changed(pre_tokenizer=library.pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "quotes": lambda: changed(normalizer=library.normalizers.Replace("``", '"')),
    "spaces before a symbol": with_mask,
    "bytes": some_bytes,
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossless_is_said_only_where_it_is_true(name):
    assert not tokenizers.HuggingFace(LOSSY[name]().to_str().encode()).lossless


@pytest.mark.parametrize("kind", ["huggingface", "gpt2", "sentencepiece"])
def test_a_path_that_is_no_file_is_refused(kind, tmp_path):
    os.mkfifo(tmp_path / "vocab.bpe")
    (tmp_path / "encoder.json").symlink_to("/dev/zero")
    for name in ("vocab.bpe", "encoder.json"):
        with refused("is a directory, a pipe or a device: give a file"):
            tokenizers.make(kind, path=str(tmp_path / name))


def test_an_end_of_text_that_is_also_a_word_is_encoded_by_letters():
    made = tokenizers.HuggingFace(words().to_str().encode())
    assert made.eot == 1
    assert made.encode("a </s> a </s>a").tolist() == [2, 3, 4, 5, 6, 2, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not a tokenizer.json"),
        (lambda _: b"", "not a tokenizer.json"),
        (lambda _: b"{}", "not a tokenizer.json"),
        (lambda _: b"\xff", "not a tokenizer.json"),
        (lambda _: b'{"kind": "bytes", "fingerprint": "0"}', "not a tokenizer.json"),
        (lambda _: b"[" * 100_000, "not a tokenizer.json"),
        (lambda content: content.replace(b'"unk_token":"[UNK]"', b'"unk_token":"[NO]"'), "not a tokenizer.json"),
        (lambda content: content.replace(b"[SEP]", b"[END]"), "no end of text"),
        (lambda content: content.replace(b'"[UNK]":1', b'"[UNK]":4000000000'), "has an id 4000000000"),
    ],
)
def test_damaged_tokenizer_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage(json.dumps(json.loads(bert().to_str()), separators=(",", ":")).encode()))
    with refused(message):
        tokenizers.make("huggingface", path=str(path))


def test_text8_has_27_characters_and_no_other():
    text8 = tokenizers.make("text8", vocab_size=27)
    text = " the quick brown fox jumps over the lazy dog "
    assert sorted(set(text8.encode(text).tolist())) == list(range(27))
    assert text8.decode(text8.encode(text)) == text
    assert text8.encode("").tolist() == [] and text8.decode([]) == ""
    assert text8.encode(" az").tolist() == [0, 1, 26]
    for character in "A`{0\n\x00é漢":
        with refused(f"{character!r} at character 2"):
            text8.encode("ab" + character + "C")
    with refused("token 27 has no text"):
        text8.decode([27])


def test_text8_is_divided_as_is_customary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Stands for the file: as large, each million of its own letter.
    (tmp_path / "text8").write_bytes(b"".join(bytes([97 + i % 26]) * 1_000_000 for i in range(100)))
    parts = {split: corpora.documents(f"text8:text8@{split}") for split in ("train", "valid", "test")}
    assert {split: len(text) for split, (text,) in parts.items()} == {
        "train": 90_000_000,
        "valid": 5_000_000,
        "test": 5_000_000,
    }
    assert parts["valid"][0][::1_000_000] == "mnopq" and parts["test"][0][::1_000_000] == "rstuv"
    (tmp_path / "text8").write_bytes(b"a" * 99_999_999)
    for source, message in [
        ("text8:text8@test", "text8 has 99999999 bytes, and text8 has 100000000"),
        ("text8:text8@dev", "SPLIT one of train, valid, test"),
        ("text8:text8", "SPLIT one of"),
        ("text8:absent@test", "cannot read absent"),
    ]:
        with refused(message):
            corpora.documents(source)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, gpt2):
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "text.txt")
    fields = {"data__source": str(text), "data__tokenizer": "gpt2", "data__tokenizer_path": str(gpt2)}
    train_here(folder / "run", **fields, train__steps=1, train__eval_every=0, train__sample_every=0)
    return folder / "run"


def test_a_run_keeps_its_vocabulary_and_refuses_another(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert load_trained(epath.Path(copy), log=pytest.fail).tokenizer.vocab_size == 557
    # It has the same size and is sound, but each id has another text.
    swapped = json.loads((copy / "encoder.json").read_text())
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "encoder.json").write_text(json.dumps(swapped))
    shutil.copy(copy / "vocab.bpe", tmp_path / "other")
    others = [tokenizers.make("gpt2", path=str(tmp_path / "other")), tokenizers.Bytes()]
    for other in others:
        other.save(copy)
        before = files(copy)
        with pytest.raises(InputError, match="was trained with another tokenizer"):
            load_trained(epath.Path(copy), log=pytest.fail)
        assert files(copy) == before
    # A run of before the tokenizer was recorded, or converted weights: what is left is the size.
    (copy / "data.json").write_text('{"fingerprint": ""}')
    with pytest.raises(InputError, match=r"in the checkpoint .* in this run"):
        load_trained(epath.Path(copy), log=pytest.fail)


@pytest.fixture(scope="module")
def published():
    return tokenizers.make("gpt2", path=str(real_text.find("gpt2_vocab.bpe")), vocab_size=50257)


def test_gpt2_gives_shakespeare_as_many_tokens_as_others_count(published):
    text = real_text.find("tinyshakespeare.txt").read_bytes().decode()
    parts = text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]
    tokens = [published.encode(part) for part in parts]
    assert list(map(len, tokens)) == [301_966, 36_059]
    assert [published.decode(part) for part in tokens] == list(parts)
    assert published.eot == 50256 and published.encode("Hello world").tolist() == [15496, 995]


def test_gpt2_gives_wikitext_as_many_tokens_as_others_count(published):
    lines = real_text.find("wikitext-2-raw.test.raw").read_bytes().decode().split("\n")[:-1]
    # As Hugging Face's data set has it, in rows that keep their newline, and its guide joins them.
    text = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    tokens = published.encode(text)
    assert len(tokens) == 287_644
    assert published.decode(tokens) == text


def test_text8_itself_is_of_these_characters():
    text = real_text.find("text8.prefix").read_bytes().decode()
    tokens = tokenizers.Text8().encode(text)
    assert len(tokens) == len(text) and tokenizers.Text8().decode(tokens) == text
