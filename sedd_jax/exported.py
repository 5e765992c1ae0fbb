"""Text from a file of sedd_jax.export, without sedd_jax: python FILE 'It [[9]] here.' --steps=64, for 9 tokens to fill.

This is __main__.py in the file. It needs jax, numpy, flatbuffers, and for subwords tokenizers or sentencepiece."""

import argparse
import functools
import json
import re
import sys

import jax
import numpy as np
from jax import export


class Sampler:
    def __init__(self, path):
        with np.load(path) as files:  # arrays, and bytes of what is none; nothing is unpickled
            self.files = dict(files)
        self.about, self.pieces = (json.loads(self.files[name]) for name in ("about.json", "pieces.json"))
        self.weights = [jax.device_put(self.files.pop(name)) for name in self.about["weights"]]
        self.program = functools.cache(lambda name: jax.jit(export.deserialize(bytearray(self.files[name])).call))

    def __call__(self, tokens, seed, steps, temperature, first=0):
        """Tokens [B, L]. tokens: given ones, [B, L] or [L], -1 where to draw. first: number of the first sequence."""
        if not (0 <= seed < 2**32 and 1 <= steps < 2**31 and 1e-30 <= temperature <= 1e30 and 0 <= first < 2**31):
            raise ValueError(f"seed={seed}, steps={steps}, temperature={temperature} or first={first} is out of range")
        numbers = np.uint32(seed), np.int32(steps), np.float32(temperature), np.int32(first)
        program = self.program("program" if temperature == 1 else "program.temperature")
        tokens, failed = program(self.weights, np.broadcast_to(np.int32(tokens), self.about["shape"]), *numbers)
        if failed:
            raise ValueError(f"the scores at step {failed} are not finite; the weights are damaged")
        return np.asarray(tokens)

    def fill(self, template, **numbers):
        """Texts for a template; what is drawn behind it is cut off."""
        parts = enumerate(re.split(r"\[\[(\d+)\]\]", template))
        given = [token for n, part in parts for token in (int(part) * [-1] if n % 2 else self.encode(part))]
        if len(given) > (length := self.about["shape"][1]):
            raise ValueError(f"the template has {len(given)} tokens, more than the model's {length}")
        tokens = self(given + [-1] * (length - len(given)), **numbers)
        return [self.decode(row[: len(given)]) for row in tokens]

    def encode(self, text):
        if "tokenizer.model" in self.files:
            from sentencepiece import SentencePieceProcessor

            return SentencePieceProcessor(model_proto=self.files["tokenizer.model"]).encode(text)
        if "tokenizer.json" in self.files:
            from tokenizers import Tokenizer

            return Tokenizer.from_buffer(self.files["tokenizer.json"]).encode(text, add_special_tokens=False).ids
        return [self.pieces.index(chr(byte)) for byte in text.encode()]

    def decode(self, tokens):
        return b"".join(self.pieces[token].encode("latin-1") for token in tokens).decode(errors="replace")


if __name__ == "__main__":
    sampler, parser = Sampler(sys.argv[0]), argparse.ArgumentParser(description=__doc__)
    parser.add_argument("template", nargs="?", default=f"[[{sampler.about['shape'][1]}]]")
    for name, default in sampler.about["defaults"].items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    try:
        print(*sampler.fill(**vars(parser.parse_args())), sep="\n")
    except ValueError as error:
        parser.error(error)
