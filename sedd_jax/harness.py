"""A run as a model of lm-evaluation-harness 0.4 (github.com/EleutherAI/lm-evaluation-harness), by its interface `LM`.

A likelihood is the bound given the context (of an AR baseline, exact), and text is infilled behind the context."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sedd_jax.data.tokenizers import END_OF_TEXT
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError, explained, require_finite
from sedd_jax.evaluation import perplexity
from sedd_jax.files import typed_path
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import FREE
from sedd_jax.network import sum_over_positions
from sedd_jax.training.trained import load_trained
from sedd_jax.typing import Batch

Requests = list[Instance]


class Run(LM):
    """draws: of noise per text, by default eval.num_times of the run. options: of sampling; max_batch_size and device,
    which the harness gives, have no use here. Raises InputError for values that do not fit."""

    def __init__(self, workdir: str, draws: Any = 0, seed: Any = 0, batch_size: Any = 1, **options: Any):
        super().__init__()
        trained = self._trained = load_trained(epath.Path(typed_path(str(workdir))), log=say)
        self._experiment, self._encode, self._length = trained.experiment, trained.tokenizer.encode, trained.length
        evaluation, sampling = self._experiment.eval, self._experiment.sampling
        options = {name: options[name] for name in options.keys() - {"max_batch_size", "device"}}
        with explained("--model_args", "give workdir, draws, seed and options of sampling", TypeError, ValueError):
            size = evaluation.batch_size if batch_size == "auto" else int(batch_size)
            draws, self._seed = int(draws) or evaluation.num_times, int(seed)
            self._options = dataclasses.replace(evaluation, num_times=draws, batch_size=size)
            self._sampling = dataclasses.replace(sampling, **options)
        if not self._experiment.model.causal:
            self._sampling.check(self._experiment.graph, self._sampling.steps)
        # What stands before a text without context.
        self._start = [] if trained.tokenizer.eot is None else [trained.tokenizer.eot]

    def loglikelihood(self, requests: Requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(text | context) in nats, whether each token of the text is the likeliest at its position: given the
        context and what is before it, and of a diffusion model given the context alone)."""
        pairs = []
        for context, text in (request.args for request in requests):
            kept = context.rstrip()  # a space belongs to the word behind it
            pairs.append((self._encode(kept) if kept else self._start, self._encode(context[len(kept) :] + text)))
        nats, windows = self._nats(pairs)
        count = jax.jit(self._count_mistaken)
        run = lambda batch, first: count(self._trained.params, batch)  # noqa: E731
        mistaken = self._experiment.map_batches(run, windows, self._options.batch_size)
        return [(-float(cost), bool(wrong == 0)) for cost, wrong in zip(nats, mistaken, strict=True)]

    def loglikelihood_rolling(self, requests: Requests, disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats: each window is given the last token before it, and the last one what it has room for."""
        pairs, numbers, totals = [], [], [0.0] * len(requests)
        for number, request in enumerate(requests):
            ids = self._encode(request.args[0]).tolist()
            for window in get_rolling_token_windows(ids, FREE, self._length - 1, 1):
                context, text = make_disjoint_window(window)
                pairs.append((self._start if context == [FREE] else context, text))
                numbers.append(number)
        for number, cost in zip(numbers, self._nats(pairs)[0] if pairs else (), strict=True):
            totals[number] -= float(cost)
        return totals

    def generate_until(self, requests: Requests, disable_tqdm: bool = False) -> list[str]:
        """Holes of max_gen_toks tokens behind each context, infilled, up to the first of the strings `until`. Without
        do_sample each token is the likeliest when its turn comes (top_k=1)."""
        texts, groups = [""] * len(requests), dict[Any, list[Any]]()
        for number, (context, asked) in enumerate(request.args for request in requests):
            count, stops = min(int(asked.get("max_gen_toks", 256)), self._length), asked.get("until") or []
            how = {"temperature": float(asked.get("temperature", 1))} if asked.get("do_sample") else {"top_k": 1}
            given = self._encode(context)
            given = given[max(0, len(given) + count - self._length) :]  # the end of a long context
            stops = [stops] if isinstance(stops, str) else stops
            groups.setdefault(dataclasses.replace(self._sampling, **how), []).append((number, given, count, stops))
        for options, group in groups.items():
            windows = [np.pad(given, (0, self._length - len(given)), constant_values=FREE) for _, given, *_ in group]
            generator = Generator(self._trained, options, self._options.batch_size)
            tokens = generator.generate(np.stack(windows), steps=options.steps, seed=self._seed).tokens
            for (number, given, count, stops), row in zip(group, tokens, strict=True):
                texts[number] = self._trained.tokenizer.decode(row[len(given) :][:count])
                for stop in filter(None, [*stops, END_OF_TEXT]):
                    texts[number] = texts[number].split(stop)[0]
        return texts

    def _nats(self, pairs: list[tuple[Any, Any]]) -> tuple[np.ndarray, Batch]:
        """Of pairs (context, text) -log p(text | context) [N], and their windows, with the end of a long context."""
        rows = []
        for context, text in pairs:
            if (room := self._length - len(text)) < 0:
                raise InputError(f"a text has {len(text)} tokens, the model's windows {self._length}; drop this task")
            ids = np.concatenate([context[max(0, len(context) - room) :], text]).astype(np.int32)
            counts = len(ids) - len(text), len(text), self._length - len(ids)
            rows.append((np.pad(ids, (0, counts[2])), np.repeat(range(3), counts)))
        tokens, role = (np.stack(part) for part in zip(*rows, strict=True))
        windows, name = Batch(tokens, given=role == 0, never=role == 2), f"{len(rows)} requests"
        found = perplexity.bounds(self._trained, windows, self._options, seed=self._seed, name=name)
        return require_finite(found.total, f"nats of {name}"), windows

    def _count_mistaken(self, params: Any, batch: Batch) -> jax.Array:
        """Tokens of each text that are not the likeliest at their position, by one network call."""
        experiment, x, sigma = self._experiment, batch.tokens, jnp.zeros(len(batch.tokens))
        probs = lambda x, logits, sigma: logits  # noqa: E731
        if not experiment.model.causal:
            x, probs = jnp.where(batch.given, x, experiment.graph.mask), experiment.graph.denoise_probs
            sigma += experiment.noise.total(jnp.ones(()))
        asked = ~(batch.given | batch.never)
        wrong = lambda score, sigma, x, x0: jnp.float32(probs(x, score, sigma).argmax(-1) != x0)  # noqa: E731
        return sum_over_positions(experiment.network(params), x, sigma, asked, wrong, batch.tokens)
