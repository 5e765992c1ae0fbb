"""The stream is every document and its end; chunks and the tokens left over make it up."""

import numpy as np
import pytest

from sedd_jax.data import corpora, packing, tokenizers
from sedd_jax.errors import InputError


def stream_of(size: int) -> packing.Stream:
    return packing.Stream(tokens=np.arange(size, dtype=np.uint16), num_bytes=size, num_documents=1)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_stream_is_every_document_and_its_end(kind):
    documents = corpora.documents("embedded")[:5]
    tokenizer = tokenizers.make(kind, vocab_size=None if kind == "bytes" else 400, texts=documents)
    stream = packing.tokenize(documents, tokenizer)
    assert stream.tokens.dtype == np.uint16 and stream.tokens.ndim == 1
    assert tokenizer.decode(stream.tokens) == "".join(document + "<|endoftext|>" for document in documents)
    assert stream.num_documents == np.count_nonzero(stream.tokens == tokenizer.eot) == 5
    assert stream.num_bytes == len("".join(documents).encode())


def test_tokens_per_byte_counts_the_ends_of_text_among_the_tokens_only():
    stream = packing.tokenize(["é", "ab"], tokenizers.Bytes())
    assert stream.num_bytes == 4
    assert stream.tokens_per_byte == (4 + 2) / 4


def test_without_an_end_of_text_nothing_comes_between_documents():
    stream = packing.tokenize(["ab ", "c"], tokenizers.Text8())
    assert stream.tokens.tolist() == [1, 2, 0, 3]
    assert (stream.num_documents, stream.tokens_per_byte) == (2, 1.0)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_the_stream_is_stored_in_the_smallest_type_that_fits(vocab_size, dtype):
    class Last(tokenizers.Bytes):
        """Encodes every text as its last id but one, and ends it with the last."""

        eot = vocab_size - 1

        def encode(self, text):
            return np.array([self.vocab_size - 2], np.int32)

    Last.vocab_size = vocab_size
    tokens = packing.tokenize(["text"], Last()).tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [vocab_size - 2, vocab_size - 1]


def test_progress_stays_off_stdout_and_silent_for_short_work(capsys):
    packing.tokenize(["text"], tokenizers.Bytes(), progress=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("length", [1, 3, 7, 10])
def test_chunks_and_the_tokens_left_over_make_up_the_stream(length):
    cut, dropped = packing.chunks(stream_of(10), length)
    assert cut.dtype == np.int32 and cut.shape == (10 // length, length)
    assert cut.ravel().tolist() == list(range(10 - dropped))
    assert dropped == 10 % length


def test_chunks_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"\Alength=11 exceeds the 10 tokens of the text: [^\n]+\Z"):
        packing.chunks(stream_of(10), 11)
    with pytest.raises(InputError, match="length=0"):
        packing.chunks(stream_of(10), 0)


def test_a_subset_is_spread_over_the_text_and_counts_its_own_bytes():
    documents = ["é" * 20 + "abc" * 10, "xy" * 40]
    stream = packing.tokenize(documents, tokenizer := tokenizers.Bytes())
    whole, _ = packing.chunks(stream, 5)
    some, _ = packing.chunks(stream, 5, limit=4)
    assert some.tolist() == whole[np.arange(4) * len(whole) // 4].tolist()
    ends = int((some == tokenizer.eot).sum())
    assert packing.tokens_per_byte(some, tokenizer, stream) == some.size / (some.size - ends)
    assert packing.tokens_per_byte(np.full((1, 5), tokenizer.eot), tokenizer, stream) == stream.tokens_per_byte
