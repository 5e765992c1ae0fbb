"""A Hugging Face `tokenizer.json`: any pipeline, with an end of text among its special tokens.

Files are taken from the local cache too, where `hf download` and other programs leave them. Nothing is downloaded.
"""

from collections.abc import Callable
from typing import TypeVar

import huggingface_hub
import numpy as np
import tokenizers as library
from etils import epath
from huggingface_hub.errors import HFValidationError

from sedd_jax.data.tokenizers.base import END_OF_TEXT, Tokenizer
from sedd_jax.errors import InputError

T = TypeVar("T")

# Names of the end of text; the first that the file has is taken.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class Pipeline(Tokenizer):
    """A pipeline of the library `tokenizers`."""

    _tokenizer: library.Tokenizer

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


class HuggingFace(Pipeline):
    """The pipeline of a `tokenizer.json` (its bytes), without the symbols that it would put around a text.

    Many are not `lossless`: bert-base-uncased lower-cases, strips accents and joins spaces.
    """

    KIND = "huggingface"
    FILES = ("huggingface.json",)

    def __init__(self, content: bytes):
        """Raises InputError if it is no such file, does not work, or has none of the known ends of text."""
        self.contents = (content,)
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
        self.lossless: bool = self._if_sound(self.gives_back_probe)

    @classmethod
    def find(cls, path: epath.Path | None) -> tuple[epath.Path, ...]:
        """path: the file, its directory, or the name of a repository whose file is in the local cache."""
        if path is None or path.exists():
            return super().find(path / "tokenizer.json" if path and path.is_dir() else path)
        if found := cached(str(path), "tokenizer.json"):
            return found
        raise InputError(
            f"tokenizer path {str(path)!r} is no file, nor a repository whose tokenizer.json is in the local Hugging "
            f"Face cache: check the path, or `hf download {path} tokenizer.json`"
        )

    def _encode(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self.eot not in ids:
            return ids
        # The end of text may be an ordinary piece too: such a piece is encoded letter by letter.
        return [i for piece in zip(ids, encoding.offsets, strict=True) for i in self._spell(text, *piece)]

    def _if_sound(self, use: Callable[[], T]) -> T:
        try:
            return use()
        except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        # The library raises plain Exception, and for unforeseen errors a Rust panic, which is not an Exception.
        except BaseException as error:
            size = f"{len(self.contents[0])} bytes"
            raise InputError(f"not a tokenizer.json of Hugging Face, or damaged ({size}): give a sound copy") from error

    def _spell(self, text: str, token: int, place: tuple[int, int]) -> list[int]:
        if token != self.eot:
            return [token]
        letters = text[slice(*place)]
        ids = [i for letter in letters for i in super(HuggingFace, self)._encode(letter)]
        if self.eot in ids:
            raise InputError(f"this tokenizer.json reads {letters!r} as an end of text: use another tokenizer")
        return ids


def cached(repository: str, *names: str) -> tuple[epath.Path, ...] | None:
    """Paths of files of a repository (`owner/name`), or None if the cache lacks one of them."""
    try:
        found = [huggingface_hub.try_to_load_from_cache(repository, name) for name in names]
    except HFValidationError:
        return None
    return tuple(map(epath.Path, found)) if all(isinstance(path, str) for path in found) else None
