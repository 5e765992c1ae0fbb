"""Files of other implementations: from the hub, or in safetensors format."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from sedd_jax.errors import InputError


def download(name: str, patterns: Sequence[str]) -> Path:
    """The folder with these files of the hub's model `name`. Raises InputError if they cannot be had."""
    from huggingface_hub import snapshot_download  # here, since it is slow to import

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    # An absent model, no network, no permission, a full disk: some ten types, of three libraries.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} is not a path here, and could not be had from the hub: {reason}") from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name. Raises InputError if the file is absent or damaged."""
    try:
        return safetensors.numpy.load_file(path)
    # TypeError: a dtype that numpy does not have.
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} is absent, damaged or not a safetensors file ({error}); get a sound copy") from error
