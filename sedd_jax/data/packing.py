"""Documents as one stream of tokens, and the stream as chunks of equal length."""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
import tqdm

from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.errors import InputError
from sedd_jax.typing import Batch, TokenRows, as_batch


class TokenStream(abc.ABC):
    """Concatenated documents, each closed by the end-of-text token if the tokenizer has one. `len` is in tokens.
    num_bytes: UTF-8 bytes of the raw text, without ends of text."""

    num_bytes: int
    num_documents: int

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    def tokens_per_byte(self) -> float:
        """Turns bits per token into bits per byte. Ends of text are tokens too, so their bits count."""
        return len(self) / self.num_bytes

    @abc.abstractmethod
    def content(self) -> bytes:
        """The input of a fingerprint: different for different tokens."""

    @abc.abstractmethod
    def read(self, starts: np.ndarray, length: int) -> np.ndarray | Batch:
        """Tokens, int32 [num_starts, length], from each of `starts` on; the first token follows the last."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stream(TokenStream):
    """A `TokenStream` in memory. tokens: [num_tokens], uint16, or uint32 for vocabularies above 65536."""

    tokens: np.ndarray
    num_bytes: int
    num_documents: int

    def __len__(self) -> int:
        return len(self.tokens)

    def content(self) -> bytes:
        return self.tokens.tobytes()

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.tokens.take(starts[:, None] + np.arange(length), mode="wrap").astype(np.int32)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def tokenize(documents: Sequence[str], tokenizer: Tokenizer, *, progress: bool = False) -> Stream:
    """Encodes documents in order. With `progress`, a bar on stderr once a second has passed."""
    dtype = token_dtype(tokenizer.vocab_size)
    sizes = [len(document.encode("utf-8")) for document in documents]
    parts = [np.empty(0, dtype)]
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype)
    with progress_bar("tokenizing", sum(sizes), show=progress) as bar:
        for document, size in zip(documents, sizes, strict=True):
            parts += [tokenizer.encode(document).astype(dtype), end]
            bar.update(size)
    return Stream(tokens=np.concatenate(parts), num_bytes=sum(sizes), num_documents=len(sizes))


def progress_bar(description: str, num_bytes: int | None, *, show: bool, initial: int = 0) -> tqdm.tqdm:
    shown = {"disable": not show, "unit": "B", "unit_scale": True, "delay": 1}
    return tqdm.tqdm(total=num_bytes, desc=description, initial=initial, **shown)


def chunks(stream: TokenStream, length: int, *, limit: int | None = None) -> tuple[np.ndarray | Batch, int]:
    """Cuts the stream, from its start, into chunks that do not overlap; reads at most `limit`, spread evenly. Returns
    the chunks, int32 [num_chunks, length], and the number of tokens left at the end."""
    check_length(stream, length)
    count, dropped = divmod(len(stream), length)
    read = min(count, limit or count)
    return stream.read(np.arange(read) * count // read * length, length), dropped


def tokens_per_byte(sequences: TokenRows | Batch, tokenizer: Tokenizer, stream: TokenStream) -> float:
    """Of these sequences of the stream; of all for a tokenizer without `pieces` or sequences without text."""
    sizes, asked = np.array([len(piece) for piece in tokenizer.pieces or ()], np.int64), as_batch(sequences).asked
    num_bytes = sizes[asked].sum() if len(sizes) else 0
    return asked.size / int(num_bytes) if num_bytes else stream.tokens_per_byte


def mean_length(sequences: TokenRows | Batch) -> float:
    """Tokens asked for in a sequence."""
    batch = as_batch(sequences)
    return batch.asked.size / len(batch.tokens)


def check_length(stream: TokenStream, length: int) -> None:
    """Raises InputError unless the stream holds at least one chunk of `length` tokens."""
    if length < 1:
        raise InputError(f"length={length}: give at least 1 token")
    if len(stream) < length:
        raise InputError(f"length={length} exceeds the {len(stream)} tokens of the text: give more text or less length")
