"""Documents as one stream of tokens, and the stream as chunks of equal length."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tqdm

from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents laid end to end, each closed by the end-of-text token if the tokenizer has one.

    tokens: [num_tokens], uint16, or uint32 for vocabularies above 65536.
    num_bytes: UTF-8 bytes of the raw text, ends of text not counted.
    num_documents: how many they are.
    """

    tokens: np.ndarray
    num_bytes: int
    num_documents: int

    @property
    def tokens_per_byte(self) -> float:
        """Turns bits per token into bits per byte; the ends of text are among the tokens, so they are paid for."""
        return len(self.tokens) / self.num_bytes


def tokenize(documents: Sequence[str], tokenizer: Tokenizer, *, progress: bool = False) -> Stream:
    """Encodes documents in order. With `progress`, a bar on stderr once a second has passed."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    sizes = [len(document.encode("utf-8")) for document in documents]
    parts = [np.empty(0, dtype)]
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype)
    bar = tqdm.tqdm(total=sum(sizes), desc="tokenizing", unit="B", unit_scale=True, delay=1, disable=not progress)
    with bar:
        for document, size in zip(documents, sizes, strict=True):
            parts += [tokenizer.encode(document).astype(dtype), end]
            bar.update(size)
    return Stream(tokens=np.concatenate(parts), num_bytes=sum(sizes), num_documents=len(sizes))


def chunks(stream: Stream, length: int) -> tuple[np.ndarray, int]:
    """Cuts the stream, from its start, into chunks that do not overlap.

    Returns:
      The chunks, int32 [num_chunks, length], and the number of tokens left over at the end, fewer than `length`.

    Raises:
      InputError: `length` is not positive, or the stream is shorter than one chunk.
    """
    check_length(stream, length)
    count, dropped = divmod(len(stream.tokens), length)
    return stream.tokens[: count * length].reshape(count, length).astype(np.int32), dropped


def check_length(stream: Stream, length: int) -> None:
    """Raises InputError unless the stream holds at least one chunk of `length` tokens."""
    if length < 1:
        raise InputError(f"length={length}: give at least 1 token")
    if len(stream.tokens) < length:
        raise InputError(
            f"length={length} exceeds the {len(stream.tokens)} tokens of the text: give more text or less length"
        )
