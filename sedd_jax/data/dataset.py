"""A corpus as a config names it: read, tokenised, and ready to be cut into batches."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

from etils import epath

from sedd_jax.data import corpora, tokenizers
from sedd_jax.data.packing import Stream, check_length, tokenize
from sedd_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """length: tokens per sequence. shift: whether each epoch cuts the training stream at other places."""

    tokenizer: Tokenizer
    train: Stream
    valid: Stream
    length: int
    shift: bool

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the tokenizer and of all tokens: what a resumed run must find again."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for stream in (self.train, self.valid):
            digest.update(stream.tokens.tobytes())
        return digest.hexdigest()


def load(
    *,
    source: str,
    length: int,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    tokenizer_path: str | None = None,
    valid_source: str | None = None,
    valid_fraction: float = 0.1,
    text_field: str = "text",
    shift: bool = True,
    directory: epath.PathLike | None = None,
    once: Callable[[Callable[[], bytes]], bytes] = lambda make: make(),
) -> Dataset:
    """Reads and tokenises a corpus. Writes nothing.

    source, valid_source, valid_fraction, text_field: see `corpora.read`.
    tokenizer, vocab_size, tokenizer_path, directory, once: see `tokenizers.make`.
    Raises InputError: see there, or a part of the corpus is shorter than one sequence.
    """
    corpus = corpora.read(source, valid_source=valid_source, valid_fraction=valid_fraction, text_field=text_field)
    chosen = tokenizers.make(
        tokenizer, vocab_size=vocab_size, path=tokenizer_path, texts=corpus.train, directory=directory, once=once
    )

    def stream(documents: Sequence[str]) -> Stream:
        tokens = tokenize(documents, chosen, progress=True)
        check_length(tokens, length)
        return tokens

    return Dataset(chosen, stream(corpus.train), stream(corpus.valid), length, shift)
