"""Every error that this package raises on purpose.

All of them derive from `RebasinError`, itself a `ValueError`, and each message says what is wrong, where,
what was there and what was wanted. Messages that report several problems list them one a line, indented by
two spaces, through `problem_list`.
"""

from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "InferenceError",
    "NonFiniteError",
    "PermutationError",
    "RebasinError",
    "SpecError",
    "SpecMismatchError",
    "TrajectoryError",
    "TreeMismatchError",
    "VerificationError",
    "problem_list",
]


class RebasinError(ValueError):
    """Root of every error this package raises on purpose."""


class SpecError(RebasinError):
    """A permutation spec contradicts itself, whatever the tree."""


class SpecMismatchError(RebasinError):
    """A permutation spec and a tree do not fit together."""


class TreeMismatchError(RebasinError):
    """Two trees that should have equal leaves, shapes and dtypes do not."""


class NonFiniteError(RebasinError):
    """A tree holds NaN or infinity where numbers are needed."""


class PermutationError(RebasinError):
    """A permutation does not fit its spec, or is no permutation."""


class InferenceError(RebasinError):
    """The symmetries of a function cannot be inferred from the arguments given."""


class VerificationError(RebasinError):
    """A permutation spec changes the function that it should preserve."""


class DataError(RebasinError):
    """A dataset is unknown, not prepared, empty or of the wrong form."""


class TrajectoryError(RebasinError):
    """A training run on disk is missing, damaged or of another recipe."""


class ConfigError(RebasinError):
    """An option has a value that cannot work."""


def problem_list(headline: str, problems: Iterable[str]) -> str:
    """One message from a headline and its problems, one a line."""
    return "\n  ".join([headline, *problems])
