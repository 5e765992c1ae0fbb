"""Names for the arrays that most functions take. B sequences of length L over N states."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

PRNGKey = Key[Array, ""]
Scalar = Float[Array, ""]
Tokens = Int[Array, "b l"]
Mask = Bool[Array, "b l"]
LogScore = Float[Array, "b l n"]
# One number per sequence.
PerSequence = Float[Array, " b"]
# Tokens on the host.
TokenRows = Int[np.ndarray, "b l"]

# (tokens [B, L], sigma [B]) -> log-scores [B, L, N]; sigma is the noise level of each sequence.
ScoreFn = Callable[[Tokens, PerSequence], LogScore]
# Given positions: (mask of what is given, values).
Clamp = tuple[Mask, Tokens]
