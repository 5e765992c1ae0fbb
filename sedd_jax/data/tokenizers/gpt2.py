"""GPT-2's byte-level BPE, from its two files: encoder.json (symbol to id) and vocab.bpe (merges in their order)."""

import hashlib
import json
import re
from collections.abc import Iterator

import numpy as np
import tokenizers as library
from etils import epath

from sedd_jax.data.tokenizers import base, hub
from sedd_jax.errors import InputError

# The names that OpenAI gave the two files, and those of Hugging Face. Something may precede them (gpt2_encoder.json).
_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_ORIGIN = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/{encoder.json,vocab.bpe}"


class GPT2(base.Tokenizer):
    """Byte-level BPE with GPT-2's rule for where words end. Every text comes back exactly."""

    KIND = "gpt2"
    FILES = _PAIRS[0]

    def __init__(self, encoder: bytes, merges: bytes):
        """From the contents of the two files.

        Raises InputError unless they fit: the vocabulary must be the 256 bytes, the results of the merges, and
        <|endoftext|>. So a truncated file is refused, which would otherwise give other tokens.
        """
        vocabulary = _parse_encoder(encoder)
        pairs = _parse_merges(merges)
        made = {*library.pre_tokenizers.ByteLevel.alphabet(), *map("".join, pairs), base.END_OF_TEXT}
        if vocabulary.keys() != made:
            odd = min(vocabulary.keys() ^ made)
            raise InputError(
                f"the two files of GPT-2's vocabulary do not fit one another ({len(vocabulary)} symbols, {len(pairs)} "
                f"merges, {odd!r} is in one alone): give both whole, from one place, such as {_ORIGIN}"
            )
        self.vocab_size: int = len(vocabulary)
        self.eot: int = vocabulary[base.END_OF_TEXT]
        # A digest of the content: OpenAI and Hugging Face format the files differently.
        meaning = json.dumps([sorted(vocabulary.items()), pairs])
        self.fingerprint: str = hashlib.sha256(f"gpt2\n{meaning}".encode()).hexdigest()
        self._contents = (encoder, merges)
        self._tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs))
        self._tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = library.decoders.ByteLevel()

    @classmethod
    def read(cls, path: epath.Path) -> "GPT2":
        """path: a directory with the two files, or one of them, the other beside it."""
        encoder, merges = _find(path)
        with base.naming(path):
            return cls(base.read(encoder), base.read(merges))

    @classmethod
    def default(cls) -> "GPT2":
        """From the local cache of Hugging Face, where other programs that use GPT-2 have left it."""
        for repository in ("openai-community/gpt2", "gpt2"):
            if found := hub.cached(repository, *_PAIRS[1]):
                return cls.read(found[0])
        raise InputError(
            "tokenizer path=None, and GPT-2's vocabulary is not in the local Hugging Face cache: get its two files, "
            f"{_ORIGIN}, and give their directory"
        )

    def encode(self, text: str) -> np.ndarray:
        base.utf8(text)
        blocks = (np.array(self._tokenizer.encode(block).ids, np.int32) for block in _blocks(text))
        return np.concatenate([np.empty(0, np.int32), *blocks])

    def contents(self) -> tuple[bytes, ...]:
        return self._contents

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist())


def _find(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    if path.is_dir():
        found = [entry for entry in sorted(path.iterdir()) if entry.name.endswith(tuple(names[0] for names in _PAIRS))]
        if len(found) != 1:
            raise InputError(
                f"tokenizer path {str(path)!r} holds {len(found)} files named encoder.json or vocab.json: give the "
                f"directory of one pair of files, or one of them; they are at {_ORIGIN}"
            )
        path = found[0]
    for names in _PAIRS:
        for name in names:
            if path.name.endswith(name):
                prefix = path.name.removesuffix(name)
                first, second = (path.parent / (prefix + other) for other in names)
                return first, second
    raise InputError(f"tokenizer path {str(path)!r}: give encoder.json or vocab.bpe, or their directory; see {_ORIGIN}")


def _parse_encoder(content: bytes) -> dict[str, int]:
    try:
        vocabulary = json.loads(content)
    except (ValueError, RecursionError):
        vocabulary = None
    if not isinstance(vocabulary, dict) or not all(type(value) is int for value in vocabulary.values()):
        raise InputError(f"not an encoder.json, or a damaged one ({len(content)} bytes): give a sound copy")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"the ids of encoder.json are not 0 to {len(vocabulary) - 1}: give a sound copy")
    return vocabulary


def _parse_merges(content: bytes) -> list[tuple[str, str]]:
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = [""]
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if not pairs or not all(len(pair) == 2 for pair in pairs):
        raise InputError(f"not a vocab.bpe, or a damaged one ({len(content)} bytes): give a sound copy")
    return pairs


def _blocks(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cuts before newlines that follow no space, where a word always ends: one call needs much memory per token."""
    boundary = re.compile(r"(?<=\S)\n")
    start = 0
    while start < len(text):
        found = boundary.search(text, start + size)
        stop = found.start() if found else len(text)
        yield text[start:stop]
        start = stop
