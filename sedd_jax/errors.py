"""The two ways a run ends early by itself: the input is wrong, or the training is."""


class InputError(ValueError):
    """Bad input: one line that names the offending value and the remedy."""

    exit_code = 2


class TrainingError(RuntimeError):
    """A run that cannot go on (a non-finite loss, say): one line that says why and what is kept."""

    exit_code = 1
