"""Samples in a file, a judge, and the figures that it gives them: all in the judge's tokens, on one device."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from sedd_jax import likelihood, quality
from sedd_jax.autoregressive import cross_entropy
from sedd_jax.data import tokenizers
from sedd_jax.data.tokenizers import END_OF_TEXT, Tokenizer
from sedd_jax.errors import InputError
from sedd_jax.interop import gpt2
from sedd_jax.training.experiment import load_trained
from sedd_jax.training.report import say


@dataclass(frozen=True)
class Judge:
    """length: the most tokens it reads at once. nats: jitted, tokens [B, L] -> [B, L - 1], -log p of each token but the
    first, given those before it."""

    tokenizer: Tokenizer
    length: int
    nats: Callable[[Any], jax.Array]


def load_judge(name: str, tokenizer_path: str | None = None, *, flag: str = "model") -> Judge:
    """A GPT-2 by its folder or hub id, or the model of a workdir. Raises InputError for anything else, a vocabulary
    that is not the model's, or a model without an exact likelihood. flag: what gave the name."""
    if (epath.Path(name) / "checkpoints").exists():
        trained = load_trained(epath.Path(name), log=say)
        if not trained.experiment.model.causal:
            raise InputError(f"--{flag}={name} holds a diffusion model, which gives no exact likelihood; give a GPT-2")
        score_fn = trained.experiment.score_fn

        @jax.jit
        def nats_of_twin(params, x):
            return cross_entropy(score_fn(params)(x, jnp.zeros(len(x)))[:, 1:], x[:, 1:])

        return Judge(trained.tokenizer, trained.config.data.length, partial(nats_of_twin, trained.params))
    params, config, folder = gpt2.load(name)
    vocabulary = epath.Path(tokenizer_path or folder)
    alone = (vocabulary / "tokenizer.json").exists() and not (vocabulary / "vocab.json").exists()
    tokenizer = tokenizers.make("huggingface" if alone else "gpt2", path=str(vocabulary))
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the vocabulary in {vocabulary} has {tokenizer.vocab_size} tokens, --{flag}={name} only "
            f"{config.vocab_size}; give its own with --tokenizer_path"
        )

    @jax.jit
    def nats_of_gpt2(params, x):
        return cross_entropy(gpt2.logits(params, config, x)[:, :-1], x[:, 1:])

    return Judge(tokenizer, config.n_positions, partial(nats_of_gpt2, jax.device_put(params)))


def read_samples(path: epath.Path) -> list[str]:
    """Texts of a file. Raises InputError if it is absent, empty, or neither JSON lines nor what `sample` prints."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--samples={path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if content.startswith("=== sample "):
        # The answer of the command may stand at the end.
        content = re.sub(r"\n\{[^\n]*\"samples\"[^\n]*\n?\Z", "\n", content)
        texts = [text.removesuffix("\n") for text in re.split(r"^=== sample \d+.* ===\n", content, flags=re.M)[1:]]
    else:
        texts = [_text(line, number, path) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not texts:
        raise InputError(f"--samples={path} holds no samples")
    return texts


def _text(line: str, number: int, path: epath.Path) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"--samples={path}:{number} is not a JSON object with a field 'text'") from error
    if not isinstance(text, str):
        raise InputError(f"--samples={path}:{number}: the field 'text' is {text!r:.40}, not a string")
    return text


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Ids, <|endoftext|> as the end of a text and not as its letters, where the tokenizer has one."""
    if tokenizer.eot is None:
        return tokenizer.encode(text)
    parts = [part for document in text.split(END_OF_TEXT) for part in (tokenizer.encode(document), [tokenizer.eot])]
    return np.concatenate(parts[:-1]).astype(np.int32)


def judge_samples(judge: Judge, texts: list[str], batch_size: int) -> dict[str, Any]:
    """The figures of the final line. Raises InputError where no sample has a token to judge."""
    encoded = [encode(text, judge.tokenizer) for text in texts]
    samples = [tokens[: judge.length] for tokens in encoded if len(tokens) > 1]
    if not samples:
        raise InputError("none of the samples has two tokens or more, so there is nothing to judge")
    counts = np.array([len(tokens) - 1 for tokens in samples])
    # What fills a row comes after its tokens, so that none of them sees it.
    rows = np.zeros((len(samples), max(map(len, samples))), np.int32)
    for row, tokens in zip(rows, samples, strict=True):
        row[: len(tokens)] = tokens
    nats = likelihood.over_chunks(
        lambda batch, first: likelihood.Exact(judge.nats(batch)),
        rows,
        batch_size=min(batch_size, len(rows)),
        progress=lambda batches: tqdm(batches, desc="judging", unit="batch", file=sys.stderr),
    ).total
    judged = np.arange(rows.shape[1] - 1) < counts[:, None]
    return {
        **quality.perplexity(np.sum(nats, axis=1, where=judged, dtype=np.float64), counts),
        **quality.diversity(samples),
        "num_samples": len(samples),
        "num_too_short": len(texts) - len(samples),
        "tokens": int(sum(map(len, samples))),
        "tokens_judged": int(counts.sum()),
        "tokens_cut": int(sum(max(len(tokens) - judge.length, 0) for tokens in encoded)),
        "tokens_per_sample": float(np.mean([len(tokens) for tokens in samples])),
    }
