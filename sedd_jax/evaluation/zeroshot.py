"""The five test sets on which the paper's line of work compares models that have not been trained on them.

Protocol (docs/evaluation.md): rows of text are taken back to plain text, each is closed by the end-of-text token, all
are laid end to end and cut into chunks of the model's length that do not overlap.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from sedd_jax.data import corpora
from sedd_jax.data.packing import Stream, check_length, tokenize
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.evaluation import detokenize, perplexity, tables
from sedd_jax.evaluation.ledger import Ledger
from sedd_jax.training.experiment import Trained


@dataclass(frozen=True)
class TestSet:
    """rows: of one document of the source. plain: of one row. field: of a record, where the source has records.
    published: perplexities in the order of MODELS."""

    title: str
    rows: Callable[[str], Iterator[str]]
    plain: Callable[[str], str]
    published: tuple[float, ...]
    field: str = "text"


def _lines(text: str) -> Iterator[str]:
    """As WikiText's published loader yields them: with their newline, and blank ones empty but not left out."""
    for line in io.StringIO(text) if text else [""]:
        yield line if line.strip() else ""


def _sentences(text: str) -> Iterator[str]:
    return (line.strip() for line in io.StringIO(text) if line.strip())


# Table 1 of the paper (arXiv 2310.16834). SEDD's are upper bounds. GPT-2's were computed anew by its authors, without a
# sliding window, but for LM1B, where they are those of table 3 of GPT-2's paper (Radford et al. 2019): per word.
MODELS = (
    "GPT-2 small",
    "SEDD absorbing small",
    "SEDD uniform small",
    "GPT-2 medium",
    "SEDD absorbing medium",
    "SEDD uniform medium",
)
TEST_SETS = {
    "lambada": TestSet(
        "LAMBADA", lambda text: iter([text]), detokenize.lambada, (45.04, 50.92, 65.40, 35.66, 42.77, 51.28)
    ),
    "wikitext2": TestSet("WikiText-2", _lines, detokenize.wikitext, (42.43, 41.84, 50.27, 31.80, 31.04, 38.93)),
    "ptb": TestSet(
        "PTB", _sentences, detokenize.penn_treebank, (138.43, 114.24, 140.12, 123.14, 87.12, 102.28), field="sentence"
    ),
    "wikitext103": TestSet("WikiText-103", _lines, detokenize.wikitext, (41.60, 40.62, 49.60, 31.39, 29.98, 36.81)),
    "lm1b": TestSet("LM1B", _sentences, detokenize.lm1b, (75.20, 79.29, 101.37, 55.72, 61.19, 79.12)),
}


def parse(given: Sequence[str]) -> dict[str, str]:
    """{name: source} of 'name=source', in the order of TEST_SETS. Raises InputError for another form or name."""
    sources = {}
    for text in given:
        name, equals, source = text.partition("=")
        if name not in TEST_SETS or not source:
            raise InputError(f"--corpora: {text!r} is not NAME=SOURCE with one of {', '.join(TEST_SETS)}")
        if name in sources:
            raise InputError(f"--corpora: {name} is given twice")
        sources[name] = source
    if not sources:
        raise InputError(f"--corpora is missing; give NAME=SOURCE for at least one of {', '.join(TEST_SETS)}")
    return {name: sources[name] for name in TEST_SETS if name in sources}


def rows(name: str, source: str) -> list[str]:
    """The plain rows of a test set, from what `corpora.documents` reads. Raises InputError as it does, or if empty."""
    test_set = TEST_SETS[name]
    found = [
        test_set.plain(row)
        for part in corpora.parts(source, text_field=test_set.field)
        for text in part()
        for row in test_set.rows(text)
    ]
    if not any(found):
        raise InputError(f"--corpora={name}={source} holds no text")
    return found


def evaluate(
    trained: Trained,
    sources: Mapping[str, str],
    output: epath.Path,
    *,
    num_times: int,
    batch_size: int,
    seed: int,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """{name: figures}; results.{json,csv,md} in `output`, which has one file per test set that is done.

    A test set that `output` has by the same model, seed and noise levels is not computed again. Raises InputError,
    before anything is computed, if a source cannot be read or does not fill one chunk, or if `output` is of another
    setting.
    """
    causal = trained.experiment.model.causal
    streams = {name: _stream(name, source, trained) for name, source in sources.items()}
    setting = {"weights": trained.fingerprint, "tokenizer": trained.tokenizer.fingerprint, "seed": seed}
    setting |= {"length": trained.config.data.length, "num_times": None if causal else num_times, "limit": limit}
    ledger, figures = Ledger(output, setting), {}
    for name, stream in streams.items():
        digest = hashlib.sha256(stream.content()).hexdigest()[:12]
        figures[name] = ledger.entry(
            f"{name}-{digest}",
            lambda name=name, stream=stream: perplexity.of_stream(
                trained, stream, num_times=num_times, batch_size=batch_size, seed=seed, limit=limit, name=name
            ),
        )
        say(f"{TEST_SETS[name].title}: perplexity {_with_error(figures[name], causal)}")
    return figures


def _stream(name: str, source: str, trained: Trained) -> Stream:
    stream = tokenize(rows(name, source), trained.tokenizer, progress=True)
    try:
        check_length(stream, trained.config.data.length)
    except InputError as error:
        raise InputError(f"--corpora={name}={source}: {error}") from error
    return stream


def _with_error(figures: Mapping[str, Any], exact: bool) -> str:
    value, error = figures["perplexity"], figures["perplexity_stderr"]
    return f"{'' if exact else '≤ '}{value:.2f}" + ("" if error is None or error != error else f" ± {error:.2f}")


def markdown(figures: Mapping[str, Mapping[str, Any]], *, exact: bool) -> str:
    """A table of perplexities per token with standard errors over sequences, beside the published ones."""
    lines = []
    for name, test_set in TEST_SETS.items():
        own, bits = "not given", ""
        if name in figures:
            own, bits = _with_error(figures[name], exact), f"{figures[name]['bits_per_byte']:.3f}"
        sign = ["≤ " if model.startswith("SEDD") else "" for model in MODELS]
        others = [f"{mark}{value:.2f}" for mark, value in zip(sign, test_set.published, strict=True)]
        lines.append([test_set.title, own, bits, *others])
    return tables.as_markdown(["test set", "this model", "its bits per byte", *MODELS], lines)


def write(output: epath.Path, figures: Mapping[str, Mapping[str, Any]], *, exact: bool) -> None:
    """Leaves results.json, results.csv and results.md."""
    table = [{"corpus": name} | dict(row) for name, row in figures.items()]
    tables.write_table(output, table, markdown(figures, exact=exact))
