"""A weighted mixture of token streams."""

import dataclasses
import re

from sedd_jax.data.packing import TokenStream
from sedd_jax.errors import InputError

PREFIX = "mix:"


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """streams: each is repeated independently of its size. weights: shares of the sequences, in any unit. The first n
    sequences hold each stream's share to within about one, for every n."""

    streams: tuple[TokenStream, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    def content(self) -> bytes:
        return repr(self.weights).encode() + b"".join(stream.content() for stream in self.streams)


def parse(source: str) -> list[tuple[float, str]]:
    """(weight, source) of each part of `mix:3*SOURCE,1.5*SOURCE`; any other source has the weight 1. Raises InputError
    for an invalid weight or a mixture within a mixture."""
    if not source.startswith(PREFIX):
        return [(1.0, source)]
    found = []
    for part in source.removeprefix(PREFIX).split(","):
        match = re.fullmatch(r"(\d*\.?\d+(?:e[+-]?\d+)?)\*(?!mix:)(.+)", part)
        if not match or not 1e-15 <= float(match[1]) <= 1e15:
            raise InputError(f"data source {source!r}: {part!r} is not WEIGHT*SOURCE with a weight of 1e-15 to 1e15")
        found.append((float(match[1]), match[2]))
    return found
