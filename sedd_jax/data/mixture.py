"""Several token streams by weights, as one."""

import dataclasses
import math

import grain

from sedd_jax.data.packing import TokenStream
from sedd_jax.errors import InputError

PREFIX = "mix:"


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """streams: each is repeated for itself, whatever its size. weights: the shares of the rows, in any unit."""

    streams: tuple[TokenStream, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    def content(self) -> bytes:
        return repr(self.weights).encode() + b"".join(stream.content() for stream in self.streams)

    def order(self, endless: int) -> grain.MapDataset:
        """Row number -> (number of the stream, row number within it): of any n rows in succession from the first on,
        each stream has its share to within a row or so, in a regular interleaving that a number alone decides."""
        rows = [
            grain.MapDataset.range(endless).map(lambda row, number=number: (number, row))
            for number in range(len(self.streams))
        ]
        return grain.MapDataset.mix(rows, self.weights)


def parse(source: str) -> list[tuple[float, str]]:
    """(weight, source) of each part of `mix:3*SOURCE,1.5*SOURCE`; of another source, itself with weight 1.

    Raises InputError for a weight that is none, and for a mixture within a mixture.
    """
    if not source.startswith(PREFIX):
        return [(1.0, source)]
    found = []
    for part in source.removeprefix(PREFIX).split(","):
        number, star, name = part.partition("*")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (star and name and 0 < weight < math.inf) or name.startswith(PREFIX):
            raise InputError(f"data source {source!r}: {part!r} is not WEIGHT*SOURCE; give mix:3*shards:A,1*shards:B")
        found.append((weight, name))
    return found
