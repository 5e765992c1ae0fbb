"""Quality of samples by a judge: python -m sedd_jax.judge --samples=FILE --model=FOLDER [--output=FILE]

Figures are per token of the judge, and of each sample only the tokens that the judge reads at once count. The first
token of a sample is not judged, as in the papers that quote GPT-2's perplexity. Read generative perplexity beside the
entropy and the distinct n-grams: repetitive text is likely text.
--references=FILE adds MAUVE of the samples against real texts (extra 'mauve'). Its paper takes 5000 of each, and
figures compare only at equal numbers and lengths."""

import json

from absl import flags

from sedd_jax import cli
from sedd_jax.evaluation.judging import judge_samples, load_judge, make_mauve, read_samples
from sedd_jax.files import write_atomically
from sedd_jax.training.options import MOST

cli.define_path("samples", "Samples as `sample` writes them (JSON lines with a field 'text') or prints them.")
cli.define_model("A GPT-2 (folder, or hub id such as openai-community/gpt2-large), GGUF file, or AR workdir.", "model")
cli.define_path("tokenizer_path", "Folder of GPT-2's vocabulary; by default that of --model.")
cli.define_path("references", "File of real texts, like --samples, for MAUVE.")
flags.DEFINE_integer("batch_size", 8, "Samples per network call.", lower_bound=1, upper_bound=MOST)
cli.define_path("output", "File for the figures as well, JSON.", output=True)


def main() -> dict:
    values = flags.FLAGS
    texts = read_samples(cli.path("samples"))
    references = values.references and read_samples(cli.path("references"), flag="references")
    judge = load_judge(cli.required("model"), values.tokenizer_path, mesh=values.mesh)
    result = judge_samples(judge, texts, values.batch_size) | {"model": values.model}
    if references:
        result |= make_mauve(judge, references, values.batch_size)(texts)
    if values.output:
        write_atomically(values.output, json.dumps(cli.to_json(result)) + "\n")
    return result


if __name__ == "__main__":
    cli.run(main)
