"""The two ways a run ends early by itself: the input is wrong, or the training is."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: one line that names the offending value and the remedy."""

    exit_code = 2


class TrainingError(RuntimeError):
    """A run that cannot go on (a non-finite loss, say): one line that says why and what is kept."""

    exit_code = 1


@contextlib.contextmanager
def explained(subject: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into an InputError of one line: "subject: reason; remedy"."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        raise InputError(f"{subject}: {lines[0] if lines else type(error).__name__}; {remedy}") from error
