"""Text to token ids and back: bytes, text8's characters, SentencePiece, GPT-2's BPE, or a Hugging Face file."""

# ruff: noqa: F401 (names for users)

from collections.abc import Sequence

from etils import epath

from sedd_jax.data.tokenizers.base import DESCRIPTION_FILE, END_OF_TEXT, Tokenizer, lossy_warning
from sedd_jax.data.tokenizers.characters import Bytes, Text8
from sedd_jax.data.tokenizers.gpt2 import GPT2
from sedd_jax.data.tokenizers.huggingface import HuggingFace
from sedd_jax.data.tokenizers.subwords import SentencePiece, train_sentencepiece
from sedd_jax.devices import processes
from sedd_jax.errors import InputError, explained
from sedd_jax.files import read_json

_CLASSES: dict[str, type[Tokenizer]] = {cls.KIND: cls for cls in (Bytes, Text8, SentencePiece, GPT2, HuggingFace)}
KINDS = tuple(_CLASSES)


def make(
    kind: str,
    *,
    vocab_size: int | None = None,
    path: str | None = None,
    texts: Sequence[str] = (),
    directory: epath.PathLike | None = None,
) -> Tokenizer:
    """The tokenizer of a config, of one of `KINDS`. Writes nothing. Raises InputError for an unknown kind, a missing or
    damaged file, or another vocabulary size.
    vocab_size: needed to train; otherwise None or the size of the given vocabulary.
    path: of the vocabulary: a SentencePiece model file; a directory with GPT-2's two files, or one of them; a
    `tokenizer.json`, its directory, or the name of a repository in the local Hugging Face cache.
    texts: without a `path`, the training text of SentencePiece, which one process alone trains. directory: without a
    `path`, where `save` may have put a tokenizer, which is then used again."""
    if kind not in KINDS:
        raise InputError(f"tokenizer kind {kind!r}: give one of {', '.join(KINDS)}")
    cls = _CLASSES[kind]
    if not cls.FILES:
        if path is not None:
            raise InputError(f"tokenizer path {path!r}: the kind {kind!r} takes none; leave it out, or change the kind")
        tokenizer = cls()
    elif path is None and directory is not None and (epath.Path(directory) / DESCRIPTION_FILE).exists():
        tokenizer = load(directory)
        if kind != tokenizer.KIND:
            raise InputError(f"{directory} holds a tokenizer that is not of the kind {kind!r}: use another directory")
    elif path is None and cls is SentencePiece:
        if vocab_size is None:
            raise InputError("tokenizer vocab_size=None: give the number of pieces to train, or the path of a model")
        train = lambda: train_sentencepiece(texts, vocab_size).contents[0]  # noqa: E731
        tokenizer = SentencePiece(processes.from_leader("tokenizer", train))
    else:
        tokenizer = cls.read(cls.find(path if path is None else epath.Path(path)))
    if vocab_size not in (None, size := tokenizer.vocab_size):
        raise InputError(f"tokenizer vocab_size={vocab_size}, but this {kind} tokenizer has {size}: give that or None")
    return tokenizer


def load(directory: epath.PathLike) -> Tokenizer:
    """Reads the files of `Tokenizer.save`. Raises InputError if they are missing, damaged or changed."""
    path = epath.Path(directory) / DESCRIPTION_FILE
    remedy = "restore it from a copy of the run"
    with explained(f"cannot read {path}", "check the path", OSError), explained(f"{path} is damaged", remedy, KeyError):
        description = read_json(path, remedy=remedy)
        kind, fingerprint = description["kind"], description["fingerprint"]
    if kind not in KINDS:
        raise InputError(f"{path} names the unknown kind {kind!r}: this version knows {', '.join(KINDS)}")
    tokenizer = _CLASSES[kind].read(path.parent / name for name in _CLASSES[kind].FILES)
    if tokenizer.fingerprint != fingerprint:
        raise InputError(f"the tokenizer in {directory} is not the one saved there: {remedy}")
    return tokenizer
