"""How likely held-out text is under a trained model: its complete bound, or the likelihood itself of a causal one."""

import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from sedd_jax import likelihood
from sedd_jax.data.packing import TokenStream, chunks
from sedd_jax.devices import processes
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError
from sedd_jax.training.experiment import Trained


def of_rows(
    trained: Trained, rows: Int[np.ndarray, "n l"], *, num_times: int, batch_size: int, seed: int, name: str = "rows"
) -> likelihood.Bound | likelihood.Exact:
    """One entry per row, which depends on the seed and the row's number, and not on batch_size. name: of these rows,
    used once in a run."""
    bound = processes.in_step(f"bound of {name}", trained.experiment.bound_fn(num_times))
    key = jax.random.key(seed)
    with jax.set_mesh(trained.experiment.mesh):
        return likelihood.over_chunks(
            lambda batch, first: bound(trained.params, key, trained.experiment.place(batch), first),
            rows,
            batch_size=min(batch_size, len(rows)),
            progress=lambda batches: tqdm(
                batches, desc=f"evaluating {name}", unit="batch", file=sys.stderr, disable=not processes.is_leader()
            ),
        )


def of_stream(
    trained: Trained,
    stream: TokenStream,
    *,
    num_times: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    name: str = "text",
) -> dict[str, Any]:
    """The figures of `likelihood.summarise` for the stream cut into chunks that do not overlap.

    limit: only the first so many chunks. Raises InputError where there is not one.
    """
    length = trained.config.data.length
    try:
        rows, dropped = chunks(stream, length, limit=limit)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    say(f"{name}: {len(rows)} sequences of {length} tokens; {dropped} tokens at the end do not fill another")
    bounds = of_rows(trained, rows, num_times=num_times, batch_size=batch_size, seed=seed, name=name)
    # Where the likelihood is exact, there is nothing to average over.
    made = {"num_sequences": len(rows), "num_times": None if trained.experiment.model.causal else num_times}
    return likelihood.summarise(bounds, length, stream.tokens_per_byte) | made | {"step": trained.step}
