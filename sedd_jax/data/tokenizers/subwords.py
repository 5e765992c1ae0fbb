"""SentencePiece: subwords of a model that is trained on the corpus alone, or read from a file."""

import io
import re
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from sedd_jax.data.tokenizers.base import END_OF_TEXT, Tokenizer, piece_bytes
from sedd_jax.errors import InputError, explained


class SentencePiece(Tokenizer):
    """A model (the bytes of a `.model` file). Unlike those of `train_sentencepiece`, others may be lossy."""

    KIND = "sentencepiece"
    FILES = ("tokenizer.model",)

    def __init__(self, model: bytes):
        """Raises InputError if it is no model, or has neither <|endoftext|> nor an end-of-sentence symbol."""
        what = f"not a SentencePiece model, or damaged ({len(model)} bytes)"
        with explained(what, "give a sound copy", RuntimeError):
            if not model:  # It would load, and fail at every use.
                raise RuntimeError("it is empty")
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        named = processor.piece_to_id(END_OF_TEXT)
        self.eot: int = processor.eos_id() if named == processor.unk_id() else named
        if self.eot < 0:
            raise InputError(f"no {END_OF_TEXT} and no end of sentence in this model of SentencePiece: give another")
        self.vocab_size: int = processor.vocab_size()
        self.contents = (model,)
        self._processor = processor
        # SentencePiece stores a space as U+2581, so a U+2581 of the text would come back as a space. Its bytes do not.
        self._u2581 = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._has_bytes = all(processor.is_byte(piece) for piece in self._u2581)
        # True where a newline is never merged with what follows, and no space is put before a text.
        restarts_at_newline = processor.encode("a\nb") == processor.encode("a\n") + processor.encode("b")
        self._boundary = re.compile("\n") if restarts_at_newline else None
        self.lossless = self.gives_back()

    def _piece(self, i: int) -> bytes:
        return piece_bytes(self._processor.id_to_piece(i))

    def _decode(self, ids: np.ndarray) -> str:
        return self._processor.decode(ids.tolist())

    def _encode(self, text: str) -> list[int]:
        if not self._has_bytes:
            return self._processor.encode(text)
        first, *others = text.split("\u2581")
        ids = self._processor.encode(first)
        for part in others:
            ids += self._u2581 + self._processor.encode(part)
        return ids


def train_sentencepiece(texts: Sequence[str], vocab_size: int) -> SentencePiece:
    """A byte-pair model of exactly `vocab_size` pieces, deterministic in the texts. It is lossless: no normalisation,
    indentation kept (a run of spaces can be one piece), and characters without a piece encoded as bytes; a newline is
    one of them, so no piece spans lines. Of very long texts it sees evenly spread lines. Raises InputError if there is
    no text, or if it does not suit `vocab_size`; the message names a size that does."""
    output = io.BytesIO()
    symbols = {"unk_id": 0, "eos_id": 1, "eos_piece": END_OF_TEXT, "bos_id": -1, "pad_id": -1}
    lossless = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    lossless |= {"allow_whitespace_only_pieces": True, "byte_fallback": True}
    options = {"model_type": "bpe", "vocab_size": vocab_size, "num_threads": 1, "minloglevel": 2}
    files = {"sentence_iterator": _training_lines(texts), "model_writer": output}
    try:
        sentencepiece.SentencePieceTrainer.train(**files, **options, **symbols, **lossless)
    except RuntimeError as error:
        raise InputError(_training_remedy(vocab_size, str(error))) from error
    return SentencePiece(output.getvalue())


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
