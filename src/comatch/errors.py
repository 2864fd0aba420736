"""Every error that comatch raises on purpose.

ComatchError
├── ContentError        something a person passed in cannot be embedded
│   └── ImageError      a picture is missing, hostile, truncated or of a refused format
├── RecipeError         a recipe or stage contradicts itself, or a declared bottleneck leaks
├── ConfigError         a run config has an unknown key, a wrong type or contradicting settings
├── DataError           a data source is missing a column, has too many bad rows, or is empty
├── ModelError          weights are missing, unexpected, re-initialised, unsafe, or of another recipe
├── TrainingError       a run cannot go on: non-finite loss, damaged checkpoint, changed config or data
│   └── Stopped         a signal ended a run after a saved step
├── EvaluationError     vectors or candidates that cannot be scored
├── StudyError          runs of a study failed, or its results are of other settings
├── SearchError         an index is damaged or was made by another model
└── MissingExtra        an optional package is not installed

A message names the value given, what is allowed and the next step.
"""

from __future__ import annotations


class ComatchError(Exception):
    """Root of all errors raised by comatch on purpose."""


class ContentError(ComatchError):
    """Something a person passed in cannot be embedded.

    `position` is the item's place in the list that was passed, where known.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message if position is None else f"item {position}: {message}")
        self.reason = message
        self.position = position

    def at(self, position: int) -> ContentError:
        """The same error, naming the item's position."""
        return type(self)(self.reason, position)


class ImageError(ContentError):
    """A picture is missing, hostile, truncated or of a refused format."""


class RecipeError(ComatchError):
    """A recipe or stage contradicts itself, or a declared bottleneck leaks."""


class ConfigError(ComatchError):
    """A run config has an unknown key, a wrong type or contradicting settings."""


class DataError(ComatchError):
    """A data source is missing a column, has too many bad rows, or is empty."""


class ModelError(ComatchError):
    """Weights are missing, unexpected, re-initialised, unsafe, or of another recipe."""


class TrainingError(ComatchError):
    """A run cannot go on: non-finite loss, damaged checkpoint, changed config or data."""


class Stopped(TrainingError):
    """A signal ended a run after a saved step; the same command goes on from there. `code` is the exit code that says so."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class EvaluationError(ComatchError):
    """Vectors or candidates cannot be scored."""


class StudyError(ComatchError):
    """Runs of a study failed, or its results are of other settings."""


class SearchError(ComatchError):
    """An index is damaged, or was made by another model."""


class MissingExtra(ComatchError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed; it comes with: pip install "comatch[{extra}]"')
