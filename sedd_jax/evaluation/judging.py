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

from sedd_jax import likelihood
from sedd_jax.autoregressive import cross_entropy
from sedd_jax.data import tokenizers
from sedd_jax.data.tokenizers import END_OF_TEXT, Tokenizer
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.evaluation import quality
from sedd_jax.interop import gpt2
from sedd_jax.training.experiment import load_trained


@dataclass(frozen=True)
class Judge:
    """length: the most tokens it reads at once. nats: jitted, tokens [B, L] -> [B, L - 1], -log p of each token but the
    first, given those before it. features: jitted, tokens [B, L] -> [B, L, D], the last hidden states, which a twin
    does not give."""

    tokenizer: Tokenizer
    length: int
    nats: Callable[[Any], jax.Array]
    features: Callable[[Any], jax.Array] | None = None


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

    @jax.jit
    def features_of_gpt2(params, x):
        return gpt2.hidden(params, config, x)

    params = jax.device_put(params)
    return Judge(tokenizer, config.n_positions, partial(nats_of_gpt2, params), partial(features_of_gpt2, params))


def read_samples(path: epath.Path, *, flag: str = "samples") -> list[str]:
    """Texts of a file, which `flag` names. Raises InputError if it is absent, empty, or neither JSON lines nor what
    `sample` prints."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--{flag}={path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if content.startswith("=== sample "):
        # The answer of the command may stand at the end.
        content = re.sub(r"\n\{[^\n]*\"samples\"[^\n]*\n?\Z", "\n", content)
        texts = [text.removesuffix("\n") for text in re.split(r"^=== sample \d+.* ===\n", content, flags=re.M)[1:]]
    else:
        texts = [
            _text(line, number, f"--{flag}={path}")
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]
    if not texts:
        raise InputError(f"--{flag}={path} holds no samples")
    return texts


def _text(line: str, number: int, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}:{number} is not a JSON object with a field 'text'") from error
    if not isinstance(text, str):
        raise InputError(f"{where}:{number}: the field 'text' is {text!r:.40}, not a string")
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
    rows = _as_rows(samples)
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


def _as_rows(samples: list[np.ndarray]) -> np.ndarray:
    """[number of samples, length of the longest], filled up with zeros."""
    rows = np.zeros((len(samples), max(map(len, samples))), np.int32)
    for row, tokens in zip(rows, samples, strict=True):
        row[: len(tokens)] = tokens
    return rows


def mauve(judge: Judge, texts: list[str], references: list[str], batch_size: int) -> dict[str, Any]:
    """How close the distribution of the texts is to that of the references, from 0 to 1 (MAUVE, Pillutla et al. 2021,
    arXiv 2102.01454), by their library from the judge's last hidden states at the last token of each text.

    Raises InputError where the library is not installed, or the judge has no such states.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise InputError(f"--references needs the extra 'mauve' ({error}): pip install 'sedd_jax[mauve]'") from error
    if judge.features is None:
        raise InputError("--references needs a GPT-2 as the judge: MAUVE is defined by its hidden states")

    def features(texts: list[str], name: str) -> np.ndarray:
        encoded = [encode(text, judge.tokenizer)[: judge.length] for text in texts]
        samples = [tokens for tokens in encoded if len(tokens)]
        if len(samples) < 2:
            raise InputError(f"MAUVE compares distributions: {len(samples)} of the {name} have text; give many")
        rows, last = _as_rows(samples), np.array([len(tokens) - 1 for tokens in samples])
        starts = tqdm(range(0, len(rows), batch_size), desc=f"reading {name}", unit="batch", file=sys.stderr)
        found = []
        for start in starts:
            part, ends = rows[start : start + batch_size], last[start : start + batch_size]
            # Filled up, so that the last batch is no other program.
            filled = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
            found.append(np.asarray(judge.features(filled))[np.arange(len(part)), ends])
        return np.concatenate(found)

    score = compute_mauve(
        p_features=features(texts, "samples"), q_features=features(references, "references"), verbose=False
    )
    return {"mauve": float(score.mauve), "mauve_clusters": int(score.num_buckets), "num_references": len(references)}
