"""A Hugging Face `tokenizer.json`: any pipeline, with an end of text among its special tokens."""

import functools
import hashlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import tokenizers as library
from etils import epath

from sedd_jax.data.tokenizers import base, hub
from sedd_jax.errors import InputError

T = TypeVar("T")

# Names of the end of text; the first that the file has is taken.
_ENDS = (base.END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class HuggingFace(base.Tokenizer):
    """The pipeline of a `tokenizer.json` (its bytes), without the symbols that it would put around a text.

    Many are not `lossless`: bert-base-uncased lower-cases, strips accents and joins spaces.
    """

    KIND = "huggingface"
    FILES = ("huggingface.json",)

    def __init__(self, content: bytes):
        """Raises InputError if it is no such file, does not work, or has none of the known ends of text."""
        self._content = content
        self._tokenizer = self._if_sound(lambda: library.Tokenizer.from_str(content.decode("utf-8")))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {str(token.content) for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        ends = [name for name in _ENDS if name in special and name in vocabulary]
        if not ends:
            raise InputError(f"no end of text in this tokenizer.json: give one with a special token {', '.join(_ENDS)}")
        self.eot: int = vocabulary[ends[0]]
        self.vocab_size: int = max(vocabulary.values()) + 1
        if self.vocab_size > 2 * len(vocabulary):
            raise InputError(
                f"this tokenizer.json has an id {self.vocab_size - 1} and {len(vocabulary)} symbols: give a sound copy"
            )
        self.lossless: bool = self._if_sound(lambda: base.gives_back(self.encode, self._decode))

    @classmethod
    def read(cls, path: epath.Path) -> "HuggingFace":
        """path: the file, its directory, or the name of a repository whose file is in the local cache."""
        if path.is_dir():
            path = path / "tokenizer.json"
        elif not path.exists():
            found = hub.cached(str(path), "tokenizer.json")
            if not found:
                raise InputError(
                    f"tokenizer path {str(path)!r} is no file, nor a repository whose tokenizer.json is in the local "
                    f"Hugging Face cache: check the path, or `hf download {path} tokenizer.json`"
                )
            (path,) = found
        with base.naming(path):
            return cls(base.read(path))

    @classmethod
    def default(cls) -> "HuggingFace":
        raise InputError("tokenizer path=None: the kind 'huggingface' needs the path of a tokenizer.json")

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"huggingface, end of text {self.eot}\n".encode() + self._content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        base.utf8(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if self.eot in ids:
            # The end of text may be an ordinary piece too: such a text is spelt letter by letter.
            pieces = zip(encoding.ids, encoding.offsets, strict=True)
            ids = np.array([i for piece in pieces for i in self._spell(text, *piece)], np.int32)
        return ids

    def contents(self) -> tuple[bytes, ...]:
        return (self._content,)

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def _if_sound(self, use: Callable[[], T]) -> T:
        try:
            return use()
        except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        # The library raises plain Exception, and for unforeseen errors a Rust panic, which is not an Exception.
        except BaseException as error:
            size = len(self._content)
            raise InputError(
                f"not a tokenizer.json of Hugging Face, or a damaged one ({size} bytes): give a sound copy"
            ) from error

    def _spell(self, text: str, token: int, place: tuple[int, int]) -> list[int]:
        if token != self.eot:
            return [token]
        letters = text[slice(*place)]
        ids = [i for letter in letters for i in self._tokenizer.encode(letter, add_special_tokens=False).ids]
        if self.eot in ids:
            raise InputError(f"this tokenizer.json reads {letters!r} as an end of text: use another tokenizer")
        return ids
