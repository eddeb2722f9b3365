"""The exception tree. Every message says what was got, what was expected, and the remedy.

`UserError` and its children end a command with one line and exit code 2. `InfrastructureError` is what the farm
forgives: the trial goes back to pending and is never counted as the policy's failure.
"""

from typing import Any


class SpvlaError(Exception):
    """Anything this project raises on purpose."""


class UserError(SpvlaError, ValueError):
    """Bad input. Raised before long work starts."""

    def __init__(self, got: str, *, expected: str, remedy: str) -> None:
        super().__init__(f"{got}; expected {expected}. {remedy}")
        self.got, self.expected, self.remedy = got, expected, remedy

    def __reduce__(self) -> tuple[Any, ...]:  # keyword arguments must survive a trip through Ray
        return _rebuild, (type(self), self.got, self.expected, self.remedy)


def _rebuild(kind: type[UserError], got: str, expected: str, remedy: str) -> UserError:
    return kind(got, expected=expected, remedy=remedy)


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, pickled, or of another shape."""


class DatasetError(UserError):
    """A data set or index that is missing, corrupt, or of another form."""


class LedgerError(UserError):
    """A ledger that is corrupt, newer than this code, or of another protocol."""


class ClusterError(UserError):
    """Ray cannot be reached, or cannot give what was asked for."""


class TrainingError(SpvlaError):
    """A run that cannot go on, such as too many non-finite steps in a row. The last checkpoint stays."""


class InfrastructureError(SpvlaError):
    """A crash, hang or lost machine under a trial: task, init state and step are in the message."""
