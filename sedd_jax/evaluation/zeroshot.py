"""The five test sets on which the papers compare models that have not been trained on them.

Protocol (docs/evaluation.md): each document is taken back to plain text and closed by the end-of-text token. All are
laid end to end and cut into chunks of the model's length that do not overlap."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from etils import epath

from sedd_jax.data import corpora
from sedd_jax.data.packing import Stream, tokenize
from sedd_jax.devices import processes
from sedd_jax.errors import InputError
from sedd_jax.evaluation import detokenize, perplexity, results
from sedd_jax.training.options import EvalOptions
from sedd_jax.training.trained import Trained


class TestSet(NamedTuple):
    """split: a text of the source into documents. plain: a document's plain text. published: perplexities of MODELS."""

    title: str
    split: Callable[[str], Iterable[str]]
    plain: Callable[[str], str]
    published: tuple[float, ...]


def _lines(text: str) -> Iterator[str]:
    """As the published loader of WikiText gives them: with their newline; blank ones are empty and stay."""
    for line in io.StringIO(text) if text else [""]:
        yield line if line.strip() else ""


def _sentences(text: str) -> Iterator[str]:
    return (line.strip() for line in io.StringIO(text) if line.strip())


# Table 1 of the paper (arXiv 2310.16834). SEDD's figures are upper bounds. Its authors computed GPT-2's again, without
# a sliding window, except for LM1B: these are from table 3 of GPT-2's paper (Radford et al. 2019), per word.
MODELS = [f"{name} {size}" for size in ("small", "medium") for name in ("GPT-2", "SEDD absorbing", "SEDD uniform")]
TEST_SETS = {
    "lambada": TestSet("LAMBADA", lambda text: [text], detokenize.lambada, (45.04, 50.92, 65.40, 35.66, 42.77, 51.28)),
    "wikitext2": TestSet("WikiText-2", _lines, detokenize.wikitext, (42.43, 41.84, 50.27, 31.80, 31.04, 38.93)),
    "ptb": TestSet("PTB", _sentences, detokenize.penn_treebank, (138.43, 114.24, 140.12, 123.14, 87.12, 102.28)),
    "wikitext103": TestSet("WikiText-103", _lines, detokenize.wikitext, (41.60, 40.62, 49.60, 31.39, 29.98, 36.81)),
    "lm1b": TestSet("LM1B", _sentences, detokenize.lm1b, (75.20, 79.29, 101.37, 55.72, 61.19, 79.12)),
}


def parse(given: Sequence[str]) -> dict[str, str]:
    """{name: source} of 'name=source', in the order of TEST_SETS. Raises InputError for another form or name."""
    sources = dict(text.partition("=")[::2] for text in given)
    for name, source in sources.items():
        if name not in TEST_SETS or not source:
            raise InputError(f"--corpora: {name}={source} is not NAME=SOURCE with one of {', '.join(TEST_SETS)}")
    if not sources or len(sources) < len(given):
        raise InputError(f"--corpora needs at least one of {', '.join(TEST_SETS)}, each once: NAME=SOURCE,...")
    return {name: sources[name] for name in TEST_SETS if name in sources}


def documents(name: str, source: str) -> list[str]:
    """The plain documents of a test set, of a source that `corpora.parts` reads. Raises InputError as it does."""
    test_set, field = TEST_SETS[name], "sentence" if name == "ptb" else "text"  # of records
    texts = (text for part in corpora.parts(source, text_field=field) for text in part())
    found = [test_set.plain(document) for text in texts for document in test_set.split(text)]
    if not any(found):
        raise InputError(f"--corpora={name}={source} holds no text")
    return found


def evaluate(
    trained: Trained, sources: Mapping[str, str], output: epath.Path, options: EvalOptions, *, seed: int
) -> dict[str, dict[str, Any]]:
    """{name: figures}; writes results.{json,csv,md} into `output`, which has one file per test set that is done. A test
    set that `output` has by the same model, seed and options is not computed again. Raises InputError, before anything
    is computed, if a source cannot be read or does not fill one chunk, or if `output` is of another setting."""
    causal, figures = trained.experiment.model.causal, {}
    show = results.number("perplexity", ".2f", prefix="" if causal else "≤ ")
    streams = {name: _stream(name, source, trained) for name, source in sources.items()}
    options = perplexity.fit(options, *streams.values(), length=trained.length)
    setting = {"weights": trained.fingerprint, "tokenizer": trained.tokenizer.fingerprint, "seed": seed}
    setting |= {"length": trained.length, "limit": options.num_sequences or None}
    setting |= {name: None if causal else getattr(options, name) for name in ("num_times", "estimator")}
    with results.hold(output, setting) as held:
        for name, stream in streams.items():
            digest = hashlib.sha256(stream.content()).hexdigest()[:12]
            figures[name] = held.entry(f"{name}-{digest}", partial(_figures, trained, stream, options, seed, name))
            processes.say(f"{TEST_SETS[name].title}: perplexity {show(figures[name])}")
        text = _markdown(figures, show)
        if processes.is_leader():
            results.write(output, [{"corpus": name} | line for name, line in figures.items()], text)
    processes.say(text)
    return figures


def _figures(trained: Trained, stream: Stream, options: EvalOptions, seed: int, name: str) -> dict[str, Any]:
    """Those of `perplexity.summary`, and for a diffusion model its perplexity as SEDD's was computed."""
    measure = partial(perplexity.summary, trained, stream, seed=seed)
    figures = measure(options, name=name)
    if not trained.experiment.model.causal:
        theirs = measure(dataclasses.replace(options, estimator="published"), name=f"{name}, as published")
        figures |= {f"published_{key}": theirs[key] for key in ("perplexity", "perplexity_stderr")}
    return figures


def _stream(name: str, source: str, trained: Trained) -> Stream:
    stream, length = tokenize(documents(name, source), trained.tokenizer, progress=True), trained.length
    if len(stream) < length:
        raise InputError(f"--corpora={name}={source} has {len(stream)} tokens, and one sequence takes {length}")
    return stream


def _markdown(figures: Mapping[str, Mapping[str, Any]], show: Callable[[Mapping[str, Any]], str]) -> str:
    """A table of perplexities per token with standard errors over sequences, beside the published ones."""
    theirs = "published_perplexity"
    columns: dict[str, Callable[[str], str]] = {
        "test set": lambda name: TEST_SETS[name].title,
        "this model": lambda name: show(figures[name]) if name in figures else "not given",
        "as SEDD's": lambda name: f"{figures[name][theirs]:.2f}" if theirs in figures.get(name, {}) else "",
        "its bits per byte": lambda name: f"{figures[name]['bits_per_byte']:.3f}" if name in figures else "",
    }
    for index, model in enumerate(MODELS):
        form = "≤ {:.2f}" if model.startswith("SEDD") else "{:.2f}"
        columns[model] = lambda name, index=index, form=form: form.format(TEST_SETS[name].published[index])
    return results.markdown(TEST_SETS, columns)
