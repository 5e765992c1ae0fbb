"""Documents of data sets of two libraries: TensorFlow Datasets by name, Hugging Face datasets saved to a folder.

Both are read by random access, so that processes can read different parts, and neither needs TensorFlow or torch.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

from sedd_jax.data.files import check_field, check_text, decode
from sedd_jax.errors import InputError, explained

TFDS = "tfds:"
HUGGING_FACE = "hf:"


def parts(source: str, *, text_field: str, size: int) -> list[functools.partial[Iterator[str]]]:
    """Ranges of examples of about `size` bytes, each as a function that reads its documents.

    source: `tfds:NAME` or `hf:PATH`, followed by `@SPLIT` for another split than train. text_field: its text's feature.
    """
    examples, num_bytes = _open(source, text_field)
    step = max(1, round(size * len(examples) / max(num_bytes, 1)))
    starts = range(0, len(examples), step)
    return [functools.partial(_range, source, text_field, start, start + step) for start in starts]


def _range(source: str, text_field: str, start: int, stop: int) -> Iterator[str]:
    examples, _ = _open(source, text_field)
    for index in range(start, min(stop, len(examples))):
        where = f"{source}, example {index}"
        text = examples[index][text_field]
        yield check_text(decode(text, where=where) if isinstance(text, bytes) else text, text_field, where=where)


@functools.lru_cache(maxsize=4)
def _open(source: str, text_field: str) -> tuple[Any, int]:
    """The examples, a sequence of mappings from fields to values, and about how many bytes they take."""
    kind, _, name = source.partition(":")
    name, _, split = name.partition("@")
    if not name:
        raise InputError(f"data source {source!r} has no name: give {kind}:NAME or {kind}:NAME@SPLIT")
    opened = _open_tfds if f"{kind}:" == TFDS else _open_hugging_face
    examples, fields, num_bytes = opened(source, name, split or "train")
    check_field(text_field, fields, where=source)
    return examples, num_bytes


def _open_tfds(source: str, name: str, split: str) -> tuple[Any, list[str], int]:
    import tensorflow_datasets as tfds  # here, since it takes seconds to import

    with explained(f"data source {source!r} is no TFDS data set", "check the name", ValueError, OSError, ImportError):
        if name.startswith(("/", ".", "~")) or "://" in name:
            builder = tfds.builder_from_directory(os.path.expanduser(name))
        else:
            builder = tfds.builder(name)
    if not builder.is_prepared():
        raise InputError(
            f"data source {source!r} is not in {builder.data_dir}: build it with "
            f"`tfds build {name} --file_format=array_record`, or set TFDS_DATA_DIR to where it is"
        )
    splits = f"its splits are {', '.join(builder.info.splits)}"
    with (
        explained(f"data source {source!r}", splits, ValueError, AssertionError, OSError),
        explained(f"data source {source!r}", "build it with --file_format=array_record", NotImplementedError),
    ):
        examples = builder.as_data_source(split=split)
    total = sum(info.num_examples for info in builder.info.splits.values())
    return examples, list(builder.info.features), int(builder.info.dataset_size) * len(examples) // max(total, 1)


def _open_hugging_face(source: str, path: str, split: str) -> tuple[Any, list[str], int]:
    with explained(f"data source {source!r} needs the extra 'hf'", "pip install 'sedd_jax[hf]'", ImportError):
        import datasets

    problem = f"data source {source!r} is no folder that datasets' save_to_disk wrote"
    # ValueError, KeyError: JSON files beside the data that are not what they should be.
    with explained(problem, "check the path", OSError, ValueError, KeyError):
        found = datasets.load_from_disk(os.path.expanduser(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"data source {source!r} has no split {split!r}: give hf:PATH@ one of {[*found]}")
        found = found[split]
    elif split != "train":
        raise InputError(f"data source {source!r} has one part and no splits: leave out @{split}")
    return found, found.column_names, found.data.nbytes
