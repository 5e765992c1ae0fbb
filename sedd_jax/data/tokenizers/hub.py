"""The local cache of Hugging Face: what other programs, or `hf download`, have left there. Nothing is downloaded."""

import huggingface_hub
from etils import epath
from huggingface_hub.errors import HFValidationError


def cached(repository: str, *names: str) -> tuple[epath.Path, ...] | None:
    """Paths of files of a repository (`owner/name`), or None if the cache lacks one of them."""
    try:
        found = [huggingface_hub.try_to_load_from_cache(repository, name) for name in names]
    except HFValidationError:
        return None
    return tuple(map(epath.Path, found)) if all(isinstance(path, str) for path in found) else None
