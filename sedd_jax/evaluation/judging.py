"""Samples in a file, a judge, and its figures of the samples: all in the judge's tokens."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sedd_jax.autoregressive import nats
from sedd_jax.data import tokenizers
from sedd_jax.devices import sharding
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError, explained, require_finite
from sedd_jax.evaluation import quality
from sedd_jax.interop import causal, gpt2, llama
from sedd_jax.training.trained import load_trained
from sedd_jax.transformer import attention


class Judge(NamedTuple):
    """length: the most tokens it reads at once. mesh: its devices. nats: jitted, (tokens [B, L], lengths [B]) -> [B],
    -log p of each token but the first, given those before it, summed over the first tokens of each sequence, as many as
    its length. features: jitted, (tokens, lengths) -> [B, D], the last hidden state at the last of them."""

    tokenizer: tokenizers.Tokenizer
    length: int
    mesh: jax.sharding.Mesh
    nats: Callable[[Any, Any], jax.Array]
    features: Callable[[Any, Any], jax.Array] | None = None

    def read(self, function: Callable, samples: list[np.ndarray], batch_size: int, what: str) -> np.ndarray:
        """function(tokens, lengths) of all samples, each [at most L], in batches of one shape. The padding comes after
        the tokens of a sample, so none sees it. Lengths become powers of two that TPU kernels take: few programs."""
        lengths = np.array(list(map(len, samples)), np.int32)
        length = min(self.length, max(attention.LANES, 1 << (int(lengths.max()) - 1).bit_length()))
        padded = np.stack([np.pad(tokens, (0, length - len(tokens))) for tokens in samples], dtype=np.int32)
        run = lambda batch, first: function(*batch)  # noqa: E731
        return sharding.map_batches(run, (padded, lengths), batch_size, mesh=self.mesh, progress=what)


def _judged(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    number = jnp.arange(tokens.shape[1])
    return (number > 0) & (number < lengths[:, None])


def load_judge(name: str, tokenizer_path: str | None = None, *, flag: str = "model", mesh: dict | None = None) -> Judge:
    """A GGUF file, a GPT-2 by its folder or hub id, or the AR baseline of a workdir. Raises InputError for anything
    else, a model without an exact likelihood, or a vocabulary that does not fit the model. flag: that gave the name.
    mesh: as in `load_trained`; by default models of others are split over all devices by `fsdp`."""
    if (epath.Path(name) / "checkpoints").exists():
        trained = load_trained(epath.Path(name), log=say, mesh=mesh)
        if not trained.experiment.model.causal:
            raise InputError(f"--{flag}={name} holds a diffusion model, which gives no exact likelihood; give another")
        experiment = trained.experiment
        score = lambda params, x, lengths: nats(experiment.network(params), x, _judged(x, lengths))  # noqa: E731
        score = jax.jit(score, out_shardings=sharding.replicated(experiment.mesh))
        return Judge(trained.tokenizer, trained.length, experiment.mesh, partial(score, trained.params))
    if name.endswith(".gguf") or os.path.exists(name) and not os.path.isdir(name):
        if tokenizer_path:
            raise InputError(f"--{flag}={name} holds its tokenizer; leave --tokenizer_path={tokenizer_path} out")
        (params, config, tokenizer), hidden = llama.load(name), llama.hidden
    else:
        (params, config, folder), hidden = gpt2.load(name), gpt2.hidden
        folder = epath.Path(tokenizer_path or folder)
        alone = (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists()
        tokenizer = tokenizers.make("huggingface" if alone else "gpt2", path=str(folder))
        if (size := tokenizer.vocab_size) > (most := config.vocab_size):
            raise InputError(f"{folder} has {size} tokens, --{flag}={name} only {most}; give --tokenizer_path")
    devices = sharding.make_mesh(**mesh) if mesh else sharding.fitting_mesh(data=1, fsdp=-1)
    params = jax.tree.map(sharding.place, params, causal.places(params, devices))

    def score(params, tokens, lengths):
        network = causal.network(params, lambda tokens: hidden(params, config, tokens), devices)
        return nats(network, tokens, _judged(tokens, lengths), shift=1)

    def features(params, tokens, lengths):
        return hidden(params, config, tokens)[jnp.arange(len(tokens)), lengths - 1]

    jitted = (jax.jit(function, out_shardings=sharding.replicated(devices)) for function in (score, features))
    return Judge(tokenizer, config.n_positions, devices, *(partial(function, params) for function in jitted))


def read_samples(path: epath.Path, *, flag: str = "samples") -> list[str]:
    """The texts in a file, which `flag` names: JSON lines, or the output of `sample`. Raises InputError for others."""
    with explained(f"--{flag}={path} cannot be read", "name a file of text", OSError, UnicodeDecodeError):
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "a folder, pipe or device")
        content = path.read_text(encoding="utf-8")
    if content.startswith("=== sample "):
        # The JSON line of the command may stand at the end.
        content = re.sub(r"\n\{[^\n]*\"samples\"[^\n]*\n?\Z", "\n", content)
        return [text.removesuffix("\n") for text in re.split(r"^=== sample \d+.* ===\n", content, flags=re.M)[1:]]
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        text, what = None, "is not a JSON object with a string as its field 'text'"
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            text = json.loads(line)["text"]
        if isinstance(text, str):
            texts.append(text)
        elif line.strip():
            raise InputError(f"--{flag}={path}:{number} {what}: {line:.60}")
    if not texts:
        raise InputError(f"--{flag}={path} holds no samples")
    return texts


def encode(text: str, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Ids; <|endoftext|> is the end of a text and not its letters, if the tokenizer has an end of text."""
    if tokenizer.eot is None:
        return tokenizer.encode(text)
    parts = [part for each in text.split(tokenizers.END_OF_TEXT) for part in (tokenizer.encode(each), [tokenizer.eot])]
    return np.concatenate(parts[:-1]).astype(np.int32)


def judge_samples(judge: Judge, texts: list[str], batch_size: int) -> dict[str, Any]:
    """The figures of the final line. Raises InputError if no sample has a token to judge."""
    encoded = [encode(text, judge.tokenizer) for text in texts]
    samples = [tokens[: judge.length] for tokens in encoded if len(tokens) > 1]
    if not samples:
        raise InputError("none of the samples has two tokens or more, so there is nothing to judge")
    lengths = np.array([len(tokens) for tokens in samples])
    found = judge.read(judge.nats, samples, min(batch_size, len(texts)), "judging")
    figures = quality.perplexity(found, lengths - 1) | quality.diversity(samples)
    figures |= {"num_samples": len(samples), "num_too_short": len(texts) - len(samples), "tokens": int(lengths.sum())}
    cut = sum(len(tokens[judge.length :]) for tokens in encoded)
    figures |= {"tokens_judged": int((lengths - 1).sum()), "tokens_cut": cut}
    return figures | {"tokens_per_sample": float(lengths.mean())}


def make_mauve(judge: Judge, references: list[str], batch_size: int) -> Callable[[list[str]], dict[str, Any]]:
    """Texts -> how close their distribution is to that of the references, from 0 to 1 (MAUVE, Pillutla et al. 2021,
    arXiv 2102.01454), by the authors' library from the judge's last hidden states at the last token of each text.
    Raises InputError if the library is not installed, or the judge has no such states."""
    with explained("--references needs the extra 'mauve'", "pip install 'sedd_jax[mauve]'", ImportError):
        from mauve import compute_mauve
    if judge.features is None:
        raise InputError("--references needs a GPT-2 or a GGUF file as the judge: MAUVE takes its hidden states")

    def features(texts: list[str], name: str) -> np.ndarray:
        samples = [ids for text in texts if len(ids := encode(text, judge.tokenizer)[: judge.length])]
        if len(samples) < 2:
            raise InputError(f"MAUVE compares distributions: {len(samples)} of the {name} have text; give many")
        states = judge.read(judge.features, samples, min(batch_size, len(samples)), f"reading {name}")
        return require_finite(states, f"hidden states of {name}")

    held = features(references, "references")

    def mauve(texts: list[str]) -> dict[str, Any]:
        found = compute_mauve(features(texts, "samples"), held, verbose=False)
        clusters = int(found.num_buckets)
        return {"mauve": float(found.mauve), "mauve_clusters": clusters, "num_references": len(references)}

    return mauve
