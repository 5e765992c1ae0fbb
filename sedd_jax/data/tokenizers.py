"""Text to token ids and back, losslessly: UTF-8 bytes, or SentencePiece."""

import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
import sentencepiece
from etils import epath

from sedd_jax.errors import InputError

KINDS = ("bytes", "sentencepiece")
END_OF_TEXT = "<|endoftext|>"

_DESCRIPTION_FILE = "tokenizer.json"
_MODEL_FILE = "tokenizer.model"


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer. Ids run from 0 to `vocab_size` - 1, `eot` among them."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot(self) -> int:
        """The id that ends a document. `encode` never yields it, even for text that spells it out."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides which ids a text gets: equal digests mean interchangeable tokenizers."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n], with no end of text. Raises InputError if `text` is not valid Unicode."""
        ...

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        """Text of ids [n]: `eot` as <|endoftext|>, bytes that are not UTF-8 as U+FFFD. InputError for other ids."""
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Writes what `load` reads. Call it from one process only."""
        ...


class Bytes:
    """Ids 0 to 255 are the UTF-8 bytes, 256 ends a document."""

    vocab_size = 257
    eot = 256

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        return _decode(self, tokens, lambda ids: ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace"))

    def save(self, directory: epath.PathLike) -> None:
        _save(directory, {_DESCRIPTION_FILE: _description("bytes", self)})


class SentencePiece:
    """A SentencePiece model (the bytes of a `.model` file).

    A model from `train_sentencepiece` gives every text back exactly. One from elsewhere may normalise text, or lack
    characters: then bits per byte compare badly with other models, since what is lost costs nothing.
    """

    def __init__(self, model: bytes):
        """Keeps `model` as an attribute.

        Raises InputError if it is no model, or has neither <|endoftext|> nor an end-of-sentence symbol.
        """
        try:
            # An empty model would load, and complain at every use.
            processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
        except RuntimeError:
            processor = None
        if processor is None:
            raise InputError(f"not a SentencePiece model, or a damaged one ({len(model)} bytes): give a sound copy")
        named = processor.piece_to_id(END_OF_TEXT)
        self.eot: int = processor.eos_id() if named == processor.unk_id() else named
        if self.eot < 0:
            raise InputError(
                f"no {END_OF_TEXT} and no end of sentence in this SentencePiece model: give one with either"
            )
        self.vocab_size: int = processor.vocab_size()
        self.model = model
        self._processor = processor
        # SentencePiece stores a space as U+2581, so a U+2581 of the text would come back as a space. Its bytes do not.
        self._u2581 = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._has_bytes = all(processor.is_byte(piece) for piece in self._u2581)
        # True where a newline is never merged with what follows, and no space is put before a text.
        self._restarts_at_newline = processor.encode("a\nb") == processor.encode("a\n") + processor.encode("b")

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"sentencepiece, end of text {self.eot}\n".encode() + self.model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        blocks = _blocks(text) if self._restarts_at_newline else [text]
        return np.concatenate([np.empty(0, np.int32), *(np.array(self._encode(block), np.int32) for block in blocks)])

    def decode(self, tokens: Iterable[SupportsIndex] | np.ndarray) -> str:
        return _decode(self, tokens, lambda ids: self._processor.decode(ids.tolist()))

    def save(self, directory: epath.PathLike) -> None:
        # The description comes last: where it stands, the model is whole.
        _save(directory, {_MODEL_FILE: self.model, _DESCRIPTION_FILE: _description("sentencepiece", self)})

    def _encode(self, text: str) -> list[int]:
        if not self._has_bytes:
            return self._processor.encode(text)
        first, *others = text.split("\u2581")
        ids = self._processor.encode(first)
        for part in others:
            ids += self._u2581 + self._processor.encode(part)
        return ids


def train_sentencepiece(texts: Sequence[str], vocab_size: int) -> SentencePiece:
    """A byte-pair model of exactly `vocab_size` pieces, the same for the same texts.

    It is lossless: no normalisation, indentation kept (a run of spaces can be one piece), and characters without a
    piece spelt in bytes; a newline is one of them, so no piece spans lines. Of more than 50 million characters, evenly
    spread lines are used.

    Raises:
      InputError: there is no text, or `vocab_size` does not suit it; the message says which size would.
    """
    output = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=output,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_training_remedy(vocab_size, str(error))) from error
    return SentencePiece(output.getvalue())


def make(
    kind: str,
    *,
    vocab_size: int | None = None,
    path: str | None = None,
    texts: Sequence[str] = (),
    directory: epath.PathLike | None = None,
    once: Callable[[Callable[[], bytes]], bytes] = lambda make: make(),
) -> Tokenizer:
    """The tokenizer that a configuration asks for. Writes nothing.

    Args:
      kind: one of `KINDS`.
      vocab_size: needed to train; where the vocabulary is given already, None or its very size.
      path: a SentencePiece model file to use.
      texts: without a `path`, what to train on.
      directory: without a `path`, where `save` may have put a tokenizer, which is then used again.
      once: of several processes, calls what it is given on one and returns the result on all, to train once only.

    Raises:
      InputError: unknown kind, a file that is missing or damaged, or a vocabulary that is not the one asked for.
    """
    if kind not in KINDS:
        raise InputError(f"tokenizer kind {kind!r}: give one of {', '.join(KINDS)}")
    if kind == "bytes":
        if path is not None:
            raise InputError(f"tokenizer path {path!r}: the kind 'bytes' takes none; use the kind 'sentencepiece'")
        tokenizer: Tokenizer = Bytes()
    elif path is not None:
        tokenizer = _read_sentencepiece(epath.Path(path))
    elif directory is not None and (epath.Path(directory) / _DESCRIPTION_FILE).exists():
        tokenizer = load(directory)
        if not isinstance(tokenizer, SentencePiece):
            raise InputError(f"{directory} holds a tokenizer that is not of the kind {kind!r}: use another directory")
    elif vocab_size is None:
        raise InputError("tokenizer vocab_size=None: give the number of pieces to train, or the path of a model")
    else:
        tokenizer = SentencePiece(once(lambda: train_sentencepiece(texts, vocab_size).model))
    if vocab_size not in (None, tokenizer.vocab_size):
        size = tokenizer.vocab_size
        raise InputError(
            f"tokenizer vocab_size={vocab_size}, but this {kind} tokenizer has {size}: give {size} or None"
        )
    return tokenizer


def load(directory: epath.PathLike) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote. Raises InputError if it is missing, damaged, or not what was written."""
    path = epath.Path(directory) / _DESCRIPTION_FILE
    content = _read(path)
    try:
        description = json.loads(content)
        kind, fingerprint = description["kind"], description["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: restore it from a copy of the run") from error
    if kind not in KINDS:
        raise InputError(f"{path} names the unknown kind {kind!r}: this version knows {', '.join(KINDS)}")
    tokenizer = Bytes() if kind == "bytes" else _read_sentencepiece(epath.Path(directory) / _MODEL_FILE)
    if tokenizer.fingerprint != fingerprint:
        raise InputError(f"the tokenizer in {directory} is not the one saved there: restore it from a copy of the run")
    return tokenizer


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text with half a surrogate pair at character {error.start}: give valid UTF-8") from error


def _decode(
    tokenizer: Tokenizer, tokens: Iterable[SupportsIndex] | np.ndarray, decode_document: Callable[[np.ndarray], str]
) -> str:
    ids = np.asarray(tokens, dtype=np.int64)
    unknown = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if unknown.size:
        raise InputError(f"token {unknown[0]} has no text: give ids from 0 to {tokenizer.vocab_size - 1}")
    ends = np.flatnonzero(ids == tokenizer.eot)
    bounds = zip([0, *(ends + 1)], [*ends, len(ids)], strict=True)
    return END_OF_TEXT.join(decode_document(ids[start:end]) for start, end in bounds)


def _blocks(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cuts at newlines: SentencePiece needs some 50 bytes of memory per character of one call, and slows down."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + size) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _training_lines(texts: Sequence[str], limit: int = 50_000_000, width: int = 1000) -> Iterator[str]:
    # SentencePiece silently drops lines above 4192 bytes, which 1000 characters never reach.
    every = 1 + sum(map(len, texts)) // limit
    lines = (line for text in texts for line in text.split("\n") if line)
    pieces = (line[start : start + width] for line in lines for start in range(0, len(line), width))
    return (piece for index, piece in enumerate(pieces) if index % every == 0)


def _training_remedy(vocab_size: int, message: str) -> str:
    if "sentences_.empty()" in message:
        return "no text to train a tokenizer on: give a corpus that is not empty"
    if found := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", message):
        return f"tokenizer vocab_size={vocab_size} is too small for the characters there are: give {found[1]} or more"
    if found := re.search(r"size too high .* value <= (\d+)", message):
        return f"tokenizer vocab_size={vocab_size} is too large for the text there is: give {found[1]} or less"
    return f"tokenizer vocab_size={vocab_size} cannot be trained: {' '.join(message.split())}"


def _description(kind: str, tokenizer: Tokenizer) -> bytes:
    return (json.dumps({"kind": kind, "fingerprint": tokenizer.fingerprint}) + "\n").encode()


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the tokenizer file {path}: {error.strerror or error}; check the path") from error


def _read_sentencepiece(path: epath.Path) -> SentencePiece:
    model = _read(path)
    try:
        return SentencePiece(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _save(directory: epath.PathLike, files: dict[str, bytes]) -> None:
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = directory / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(directory / name)
