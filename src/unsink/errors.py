"""Errors a user can cause, shown without a traceback.

UnsinkError (exit code 3: could not run)
├── ParamsError (exit code 2: params.yaml or the command line is wrong)
├── DataError            a record or file is malformed, or cannot be written
├── ModelError           weights or an adapter are missing, truncated or do not fit; a loss is not finite
├── MissingPrerequisite  an earlier command has to run first
├── Interrupted          stopped by the user; the state is kept
├── Busy                 another process is writing the same output
└── Lost                 another process of the same job has ended

Everything else is a bug: it keeps its traceback and exits with code 4.
"""


class UnsinkError(Exception):
    """Something the user can mend.

    Args:
        message: What is wrong, where (file:line or dotted key), the value found, the values allowed.
        hint: What to do next.
    """

    exit_code = 3

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ParamsError(UnsinkError):
    """A value in params.yaml or on the command line is wrong."""

    exit_code = 2


class DataError(UnsinkError):
    """A file is malformed, empty, or cannot be written."""


class ModelError(UnsinkError):
    """Weights or adapters are missing or do not fit, or training left the finite numbers."""


class MissingPrerequisite(UnsinkError):
    """An input is missing that another command writes."""


class Interrupted(UnsinkError):
    """The user stopped the work; what was done so far is kept."""


class Busy(UnsinkError):
    """Another process is writing the same output."""


class Lost(UnsinkError):
    """Another process of the same job has ended."""
