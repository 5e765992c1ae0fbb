"""The two ways a run ends early by itself: the input is wrong, or the training is."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input: one line that names the offending value and the remedy."""

    exit_code = 2


class TrainingError(RuntimeError):
    """A run that cannot go on (a non-finite loss, say): one line that says why and what is kept."""

    exit_code = 1


@contextlib.contextmanager
def explained(subject: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into an InputError of one line: "subject: reason; remedy", without an empty remedy.
    An InputError passes as it is, unless it is among the kinds."""
    try:
        yield
    except kinds as error:
        if isinstance(error, InputError) and InputError not in kinds:
            raise
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        reason = "; ".join(filter(None, (lines[0] if lines else type(error).__name__, remedy)))
        raise InputError(f"{subject}: {reason}") from error


def utf8(text: str, where: str = "text") -> bytes:
    """Raises InputError for half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start}; write both halves") from error


def check_fields(section: str, values: Mapping[str, Any], **allowed: Any) -> None:
    """Raises InputError for the first of these fields whose value is not allowed. allowed: an interval in the notation
    of mathematics, such as "(0, 2^31)" or "[0, inf)", which holds no NaN; or choices."""
    number = lambda text: float(text.split("^")[0]) ** int(text.partition("^")[2] or 1)  # noqa: E731
    for name, within in allowed.items():
        value, what = values[name], f"{section}.{name}={values[name]!r}"
        if not isinstance(within, str):
            if value not in within:
                raise InputError(f"{what} is unknown; choose one of {', '.join(map(repr, within))}")
            continue
        low, high = map(number, within[1:-1].split(","))
        if not (value >= low if within[0] == "[" else value > low):
            raise InputError(f"{what} must be {'at least' if within[0] == '[' else 'above'} {low:.12g}")
        if not (value <= high if within[-1] == "]" else value < high):
            raise InputError(f"{what} must be {'at most' if within[-1] == ']' else 'below'} {high:.12g}")


def require_finite(values: T, what: str) -> T:
    """The tree of arrays; raises TrainingError that names the first with NaN or infinite numbers. By the devices."""
    import jax  # here, since much that reads text does without it

    count = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.size - jax.numpy.isfinite(leaf).sum(), tree))
    for path, odd in jax.tree.leaves_with_path(jax.device_get(count(values))):
        if odd:
            what += f" {jax.tree_util.keystr(path, simple=True, separator='/')}" if path else ""
            raise TrainingError(f"{what}: {odd} are NaN or infinite; training diverged or the weights are damaged")
    return values
