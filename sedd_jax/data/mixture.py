"""A weighted mixture of token streams."""

import dataclasses
import math

import grain

from sedd_jax.data.packing import TokenStream
from sedd_jax.errors import InputError

PREFIX = "mix:"


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """streams: each is repeated independently of its size. weights: the shares of the sequences, in any unit."""

    streams: tuple[TokenStream, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    def content(self) -> bytes:
        return repr(self.weights).encode() + b"".join(stream.content() for stream in self.streams)

    def order(self, endless: int) -> grain.MapDataset:
        """Sequence number -> (number of the stream, sequence number within it). The first n sequences hold each
        stream's share to within about one, for every n."""
        every = grain.MapDataset.range(endless)
        numbered = [every.map(lambda index, stream=stream: (stream, index)) for stream in range(len(self.streams))]
        return grain.MapDataset.mix(numbered, self.weights)


def parse(source: str) -> list[tuple[float, str]]:
    """(weight, source) of each part of `mix:3*SOURCE,1.5*SOURCE`; any other source has the weight 1. Raises InputError
    for an invalid weight or a mixture within a mixture."""
    if not source.startswith(PREFIX):
        return [(1.0, source)]
    found = []
    for part in source.removeprefix(PREFIX).split(","):
        number, star, name = part.partition("*")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (star and name and 1e-15 <= weight <= 1e15) or name.startswith(PREFIX):
            raise InputError(f"data source {source!r}: {part!r} is not WEIGHT*SOURCE with a weight of 1e-15 to 1e15")
        found.append((weight, name))
    return found
