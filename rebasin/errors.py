"""The errors that this package raises on purpose.

All of them derive from `RebasinError`, which is a `ValueError`. Each message says what is wrong, where it is
wrong, what was found and what was wanted. A message about several problems is made by `problem_list`, which
puts every problem on a line of its own.
"""

from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InferenceError",
    "NonFiniteError",
    "PermutationError",
    "RebasinError",
    "SpecError",
    "SpecMismatchError",
    "TrajectoryError",
    "TreeError",
    "TreeMismatchError",
    "VerificationError",
    "problem_list",
]


class RebasinError(ValueError):
    """The base class of every error that this package raises on purpose."""


class SpecError(RebasinError):
    """A permutation spec contradicts itself, whatever the tree."""


class SpecMismatchError(RebasinError):
    """A permutation spec and a tree do not fit together."""


class TreeError(RebasinError):
    """A tree has leaves that are no arrays, or that path names do not tell apart."""


class TreeMismatchError(RebasinError):
    """Two trees that should have the same leaves, shapes and dtypes differ."""


class NonFiniteError(RebasinError):
    """A tree holds NaN or infinity where finite numbers are needed."""


class PermutationError(RebasinError):
    """A permutation does not fit its spec, or its values are not a permutation."""


class InferenceError(RebasinError):
    """The symmetries of a function cannot be inferred from the arguments that were given."""


class VerificationError(RebasinError):
    """A permutation spec changes the function that it should preserve."""


class DataError(RebasinError):
    """Data are unknown, not prepared, empty or of the wrong form."""


class CheckpointError(RebasinError):
    """A checkpoint is missing, damaged, or in a form that cannot be read or written."""


class TrajectoryError(RebasinError):
    """A training run on disk is missing, damaged, or was made with another recipe."""


class ConfigError(RebasinError):
    """An option has a value that cannot work."""


def problem_list(headline: str, problems: Iterable[str]) -> str:
    """Return one message made of a headline and a list of problems.

    Args:
      headline: the first line.
      problems: the problems, each of which becomes a line that is indented by two spaces.

    Examples:
      >>> print(problem_list("the trees differ:", ["w: only in params_a", "b: only in params_b"]))
      the trees differ:
        w: only in params_a
        b: only in params_b
    """
    return "\n  ".join([headline, *problems])
