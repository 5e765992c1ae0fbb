"""Names for the arrays that most functions take. B sequences of length L over N states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

PRNGKey = Key[Array, ""]
Keys = Key[Array, " b"]
Scalar = Float[Array, ""]
Tokens = Int[Array, "b l"]
Mask = Bool[Array, "b l"]
LogScore = Float[Array, "b l n"]
Features = Float[Array, "b l d"]
PerSequence = Float[Array, " b"]  # one number per sequence
TokenRows = Int[np.ndarray, "b l"]  # tokens on the host

# (tokens [B, L], sigma [B]) -> log-scores [B, L, N]; sigma is the noise level of each sequence.
ScoreFn = Callable[[Tokens, PerSequence], LogScore]
Clamp = tuple[Mask, Tokens]  # given positions: (mask of what is given, values)


class Batch(NamedTuple):
    """Sequences to learn or to measure, arrays of the host or of devices; None for what none of them has. given, never
    [B, L]: positions that are known, and that stay unknown; the others are asked for. labels [B]: classes."""

    tokens: Any
    given: Any = None
    never: Any = None
    labels: Any = None

    @property
    def asked(self) -> Int[np.ndarray, " n"]:
        """On the host, the tokens asked for."""
        masks = [mask for mask in (self.given, self.never) if mask is not None]
        return self.tokens[~np.any(masks, axis=0)] if masks else self.tokens.ravel()


def as_batch(sequences: Any) -> Batch:
    """Of tokens [B, L] alone too."""
    return sequences if isinstance(sequences, Batch) else Batch(sequences)
