"""Plain text of the zero-shot test sets, and `evaluate --suite=zeroshot`."""

import json
import math

import pytest
from running import close, run

from sedd_jax.errors import InputError
from sedd_jax.evaluation import detokenize, zeroshot


@pytest.mark.parametrize(
    ("rules", "text", "plain"),
    [
        (
            detokenize.wikitext,
            " The game 's 1 @,@ 000 units , sold in mid @-@ 2011 ( Japan ) . \n",
            " The game's 1,000 units, sold in mid-2011 (Japan).\n",
        ),
        (detokenize.wikitext, " = = Plot = = \n", " == Plot ==\n"),
        (
            detokenize.penn_treebank,
            "the company 's shares do n't cost $ N N <unk>",
            "the company's shares don't cost $1 1 ?",
        ),
        (detokenize.lm1b, 'He said , " Yes " ( twice ) .', 'He said, "Yes" (twice) .'),
        (detokenize.lambada, " \u201cHi\u201d she said ", '\n"Hi" she said'),
    ],
)
def test_plain_text(rules, text, plain):
    assert rules(text) == plain


def test_documents_are_those_of_the_published_loaders(tmp_path):
    (tmp_path / "wiki.raw").write_text(" \n = A title = \n \n It 's 1 @,@ 000 . \n")
    (tmp_path / "ptb.txt").write_text(" no it was n't \n they cost N N \n")
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "He said \u201cno\u201d\n\nShe"}) + "\n")
    # Blank lines of WikiText are documents too: each is closed by an end of text.
    assert zeroshot.documents("wikitext2", str(tmp_path / "wiki.raw")) == ["", " = A title =\n", "", " It's 1,000.\n"]
    assert zeroshot.documents("ptb", str(tmp_path / "ptb.txt")) == ["no it wasn't", "they cost 1 N"]
    assert zeroshot.documents("lambada", str(tmp_path / "lambada.jsonl")) == ['\nHe said "no"\n\nShe']


@pytest.mark.parametrize("given", [[], ["wikitext2"], ["wikitext=a"], ["ptb=a", "ptb=b"]])
def test_bad_corpora_are_refused(given):
    with pytest.raises(InputError, match="--corpora"):
        zeroshot.parse(given)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """Two small test sets."""
    folder = tmp_path_factory.mktemp("zeroshot")
    lines = (models / "text.txt").read_text(encoding="utf-8").splitlines()
    (folder / "wiki.raw").write_text("".join(f" {line[:-1]} . \n" for line in lines[:12]), encoding="utf-8")
    (folder / "lm1b.txt").write_text("".join(f"{line[:-1]} .\n" for line in lines[12:20]), encoding="utf-8")
    return folder


def answer(out):
    return json.loads(out.splitlines()[-1])


def test_suite_continues_and_does_not_depend_on_the_batch_size(models, folder, tmp_path):
    corpora = f"--corpora=lm1b={folder}/lm1b.txt,wikitext2={folder}/wiki.raw"
    asked = ["--suite=zeroshot", corpora, "--num_times=3", "--num_sequences=7"]
    first = [f"--workdir={models}/diffusion", *asked, f"--output={tmp_path}/a", "--batch_size=4"]
    out, err = run("evaluate", *first, JAX_LOG_COMPILES="1")
    found = answer(out)["corpora"]
    assert list(found) == ["wikitext2", "lm1b"] and "LM1B: perplexity ≤ " in err
    # One program for the bound, one for the figure as published.
    assert err.count("Finished XLA compilation of jit(bound)") == 2, err[-2000:]

    # The same documents by `--data`.
    documents = zeroshot.documents("wikitext2", f"{folder}/wiki.raw")
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    direct = ["--num_times=3", "--num_sequences=7", f"--data={tmp_path}/plain.jsonl"]
    # And the figure as published, without the prior and the last noise.
    theirs = answer(run("evaluate", f"--workdir={models}/diffusion", *direct, "--estimator=published")[0])
    theirs = {f"published_{name}": theirs[name] for name in ("perplexity", "perplexity_stderr")}
    expected = answer(run("evaluate", f"--workdir={models}/diffusion", *direct)[0]) | theirs
    assert found["wikitext2"] == close(expected, 1e-5)

    table = (tmp_path / "a" / "results.md").read_text()
    perplexity, error = (found["lm1b"][f"perplexity{end}"] for end in ("", "_stderr"))
    published = found["lm1b"]["published_perplexity"]
    assert f"| LM1B | ≤ {perplexity:.2f} ± {error:.2f} | {published:.2f} |" in table and "| PTB | not given |" in table
    assert [row["corpus"] for row in json.loads((tmp_path / "a" / "results.json").read_text())] == list(found)

    kept, gone = sorted((tmp_path / "a" / "points").iterdir(), reverse=True)
    before = kept.stat().st_mtime_ns
    gone.unlink()
    out, err = run("evaluate", f"--workdir={models}/diffusion", *asked, f"--output={tmp_path}/a", "--batch_size=1")
    assert err.count("done already") == 1 and kept.stat().st_mtime_ns == before
    assert answer(out)["corpora"]["lm1b"] == close(found["lm1b"], 1e-5)

    _, err = run("evaluate", f"--workdir={models}/ar", *asked, f"--output={tmp_path}/a", expect=2)
    assert "weights" in err and "choose another --output" in err
    out, _ = run("evaluate", f"--workdir={models}/ar", *asked, f"--output={tmp_path}/b")
    exact = answer(out)["corpora"]["lm1b"]
    assert exact["num_times"] is None and 1 < exact["perplexity"] < math.exp(8)
    lines = (tmp_path / "b" / "results.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| LM1B")]
    assert line.split("|")[2].strip()[0].isdigit() and line.split("|")[3].strip() == ""


@pytest.mark.parametrize("source", ["absent.txt", "short.txt"])
def test_a_source_shorter_than_one_chunk_is_refused_before_the_suite_begins(models, folder, tmp_path, source):
    (tmp_path / "short.txt").write_text("no")
    # After one that could be evaluated.
    corpora = f"--corpora=ptb={folder}/lm1b.txt,lm1b={tmp_path}/{source}"
    options = ["--suite=zeroshot", corpora, f"--output={tmp_path}/out"]
    _, err = run("evaluate", f"--workdir={models}/diffusion", *options, expect=2)
    assert source in err and not (tmp_path / "out").exists()
