"""A Hugging Face `tokenizer.json`: any pipeline, with an end of text among its special tokens. Files are taken from the
local cache too, where `hf download` and other programs leave them. Nothing is downloaded."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tokenizers as library
from etils import epath

from sedd_jax.data.tokenizers.base import END_OF_TEXT, Tokenizer, piece_bytes
from sedd_jax.errors import InputError, explained

# Names of the end of text; the first that the file has is taken.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_CONFIG = "tokenizer_config.json"

# Where texts may be divided, if no token goes across and the pipeline starts there as anew.
_PLACES = (r"(?<=\S)(?= )", r"(?<=\S)(?=\n)", r"(?<=[^\W_])(?=\n)")
# Endings and beginnings of words of every kind, with every kind of space between them.
_WORDS = "don't I'M 1234 x ... - _ é e\u0301 \u0301y 漢字 。 🙂 \ufb01 \ufeff \u2581 \x1c".split(" ")  # noqa: SIM905
_SPACES = (" ", "  ", "\n", "\n\n", " \n", "\n  ", "\r\n", "\t", " \t ", "\u00a0", "\n\u3000", "")

# The letters of byte-level vocabularies: those of Latin-1 stand for themselves, those behind for the other bytes.
_LETTERS = sorted(library.pre_tokenizers.ByteLevel.alphabet())
_BYTES = {letter: ord(letter) for letter in _LETTERS if letter <= "ÿ"}
_BYTES |= zip(_LETTERS[len(_BYTES) :], sorted({*range(256)} - {*_BYTES.values()}), strict=True)


class Pipeline(Tokenizer):
    """A pipeline of the library `tokenizers`."""

    _tokenizer: library.Tokenizer

    def portable(self) -> dict[str, bytes]:
        return super().portable() | {"tokenizer.json": self._tokenizer.to_str().encode()}

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _piece(self, i: int) -> bytes:
        name = self._tokenizer.id_to_token(i) or ""
        if isinstance(self._tokenizer.decoder, library.decoders.ByteLevel):
            return bytes(_BYTES.get(letter, 0) for letter in name)
        return piece_bytes(name)

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


class HuggingFace(Pipeline):
    """The pipeline of a `tokenizer.json` (its bytes), without the symbols that it would put around a text. Many are not
    `lossless`: bert-base-uncased lower-cases, strips accents and joins spaces."""

    KIND = "huggingface"
    FILES = ("huggingface.json", _CONFIG)

    def __init__(self, content: bytes, config: bytes = b"{}"):
        """The end of text is a special token of a known name, or `eos_token` of config, or a token of a known name.
        Raises InputError if it is no such file, does not work, or has no end of text."""
        self.contents = (content,)
        self._tokenizer = self._if_sound(lambda: library.Tokenizer.from_str(content.decode("utf-8")))
        if isinstance(self._tokenizer.model, library.models.BPE):
            self._tokenizer.model.dropout = None  # It would give a text other ids at each reading.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {str(token.content) for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        with explained(f"{_CONFIG} is damaged", "give a sound copy", ValueError, AttributeError, RecursionError):
            named = json.loads(config).get("eos_token")
            named = str(named.get("content") if isinstance(named, dict) else named)
        ends = [name for name in _ENDS if name in special and name in vocabulary]
        if not ends and named in vocabulary:
            ends, self.contents = [named], (content, json.dumps({"eos_token": named}).encode())
        ends += [name for name in _ENDS if name in vocabulary]
        if not ends:
            raise InputError(f'no end of text in this tokenizer.json: name it in {_CONFIG} beside it, as "eos_token"')
        self.eot: int = vocabulary[ends[0]]
        # As a special token, it is not found in text that spells it.
        self._tokenizer.add_special_tokens([library.AddedToken(ends[0], special=True, normalized=False)])
        self.vocab_size: int = max(vocabulary.values()) + 1
        if self.vocab_size > 2 * len(vocabulary):
            found = f"an id {self.vocab_size - 1} and {len(vocabulary)} symbols"
            raise InputError(f"this tokenizer.json has {found}: give a sound copy")
        rest = json.dumps({**json.loads(content), "model": None})  # what a pipeline replaces or strips is spelt there
        spelt = [f"a {json.loads(text)} b" for text in re.findall(r'"(?:[^"\\]|\\.)*"', rest)]
        self.lossless: bool = self._if_sound(lambda: self.gives_back(*spelt))

    @classmethod
    def find(cls, path: epath.Path | None) -> tuple[epath.Path, ...]:
        """path: the file, its directory, or the name of a repository whose file is in the local cache."""
        if path is None or path.exists():
            found = super().find(path / "tokenizer.json" if path and path.is_dir() else path)
        else:
            found = cached(str(path), "tokenizer.json")
        if found:
            return *found, found[0].with_name(_CONFIG)
        what = f"{str(path)!r} is no file, nor a repository whose tokenizer.json is in the local Hugging Face cache"
        raise InputError(f"tokenizer path {what}: check the path, or `hf download {path} tokenizer.json`")

    @classmethod
    def read(cls, paths: Iterable[epath.Path]) -> Tokenizer:
        return super().read(path for path in paths if path.name != _CONFIG or path.exists())

    @functools.cached_property
    def _boundary(self) -> Any:
        """See `Tokenizer`. Looked for when there is a long text, since it takes some tenths of a second."""
        ids = [[token] for token in self._tokenizer.get_vocab().values()]
        tokens = "\t".join(self._tokenizer.decode_batch(ids, skip_special_tokens=False))
        tokens = tokens.translate(str.maketrans("Ġ▁Ċ", "  \n"))
        places = [place for place in _PLACES if not re.search(place, tokens) and self._restarts_at(place)]
        return re.compile("|".join(places)) if places else None

    def _restarts_at(self, place: str) -> bool:
        texts = map("".join, itertools.product(_WORDS, _SPACES, _WORDS))
        cuts = ((text, found.end()) for text in texts for found in re.finditer(place, text))
        return all(self._encode(t[:cut]) + self._encode_next(t[cut:]) == self._encode(t) for t, cut in cuts)

    def _encode_next(self, text: str) -> list[int]:
        return self._encode("a" + text)[len(self._encode("a")) :]  # many pipelines put a space before a text

    def _encode(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self.eot not in encoding.ids:
            return encoding.ids
        found = []
        for token, place in zip(encoding.ids, encoding.offsets, strict=True):
            # The end of text may be an ordinary piece too: such a piece is encoded letter by letter.
            letters, encode = text[slice(*place)], super()._encode
            ids = [i for letter in letters for i in encode(letter)] if token == self.eot else [token]
            if self.eot in ids:
                raise InputError(f"this tokenizer.json reads {letters!r} as an end of text: use another tokenizer")
            found += ids
        return found

    def _if_sound(self, use: Callable[[], Any]) -> Any:
        try:
            return use()
        except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises plain Exception, and a Rust panic is not even that
            size = f"{len(self.contents[0])} bytes"
            raise InputError(f"not a tokenizer.json of Hugging Face, or damaged ({size}): give a sound copy") from error


def cached(repository: str, *names: str) -> tuple[epath.Path, ...] | None:
    """Paths of files of a repository (`owner/name`), or None if the cache lacks one of them."""
    from huggingface_hub import errors, try_to_load_from_cache  # here, since it is slow to import

    try:
        found = [try_to_load_from_cache(repository, name) for name in names]
    except errors.HFValidationError:
        return None
    return tuple(map(epath.Path, found)) if all(isinstance(path, str) for path in found) else None
