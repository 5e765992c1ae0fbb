"""GPT-2's byte-level BPE, from its two files: encoder.json (symbol to id) and vocab.bpe (merges in their order)."""

import hashlib
import json
import re

import tokenizers as library
from etils import epath

from sedd_jax.data.tokenizers.base import END_OF_TEXT
from sedd_jax.data.tokenizers.huggingface import Pipeline, cached
from sedd_jax.errors import InputError, explained

# The names that OpenAI gave the two files, and those of Hugging Face. Something may precede them (gpt2_encoder.json).
_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_FIRST = tuple(first for first, _ in _PAIRS)
_ORIGIN = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/{encoder.json,vocab.bpe}"
_REMEDY = f"give encoder.json or vocab.bpe, or the directory of one pair of files; they are at {_ORIGIN}"


class GPT2(Pipeline):
    """Byte-level BPE with GPT-2's rule for where words end. Every text comes back exactly."""

    KIND = "gpt2"
    FILES = _PAIRS[0]
    _boundary = re.compile(r"(?<=\S)(?=[ \n])")  # a word always ends before a space, or a newline behind no space

    def __init__(self, encoder: bytes, merges: bytes):
        """Raises InputError unless the two files fit: the vocabulary must be the 256 bytes, the results of the merges,
        and <|endoftext|>. So a truncated file is refused, which would otherwise give other tokens."""
        what = f"not an encoder.json, or a damaged one ({len(encoder)} bytes)"
        with explained(what, "give a sound copy", ValueError, AttributeError, RecursionError):
            vocabulary = json.loads(encoder)
            if not all(type(value) is int for value in vocabulary.values()):
                raise ValueError("its values are no ids")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise InputError(f"the ids of encoder.json are not 0 to {len(vocabulary) - 1}: give a sound copy")
        lines = merges.decode("utf-8", errors="replace").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if not pairs or not all(len(pair) == 2 for pair in pairs):
            raise InputError(f"not a vocab.bpe, or a damaged one ({len(merges)} bytes): give a sound copy")
        made = {*library.pre_tokenizers.ByteLevel.alphabet(), *map("".join, pairs), END_OF_TEXT}
        if vocabulary.keys() != made:
            odd = min(vocabulary.keys() ^ made)
            found = f"{len(vocabulary)} symbols, {len(pairs)} merges, {odd!r} is in one alone"
            what = f"the two files of GPT-2's vocabulary do not fit one another ({found})"
            raise InputError(f"{what}: give both, complete and from one place, such as {_ORIGIN}")
        self.vocab_size: int = len(vocabulary)
        self.eot: int = vocabulary[END_OF_TEXT]
        meaning = json.dumps([sorted(vocabulary.items()), pairs])  # OpenAI and Hugging Face format files differently
        self.fingerprint: str = hashlib.sha256(f"gpt2\n{meaning}".encode()).hexdigest()
        self.contents = (encoder, merges)
        self._tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs))
        self._tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = library.decoders.ByteLevel()

    @classmethod
    def find(cls, path: epath.Path | None) -> tuple[epath.Path, ...]:
        """path: a directory with the two files, or one of them, the other beside it; None: from the cache."""
        if path is None:
            for repository in ("openai-community/gpt2", "gpt2"):
                if found := cached(repository, *_PAIRS[1]):
                    return found
            what = "tokenizer path=None, and GPT-2's vocabulary is not in the local Hugging Face cache"
            raise InputError(f"{what}; {_REMEDY}")
        files = [entry for entry in path.iterdir() if entry.name.endswith(_FIRST)] if path.is_dir() else [path]
        pairs = [(file, name, pair) for file in files for pair in _PAIRS for name in pair if file.name.endswith(name)]
        if len(pairs) != 1:
            what = f"holds {len(pairs)} files named {' or '.join(_FIRST)}" if path.is_dir() else "is no such file"
            raise InputError(f"tokenizer path {str(path)!r} {what}; {_REMEDY}")
        file, name, pair = pairs[0]
        return tuple(file.with_name(file.name.removesuffix(name) + other) for other in pair)
