"""The result that every matching method returns."""

import dataclasses
from typing import Any

import jax
import numpy as np

from rebasin.permutation import Permutation

__all__ = ["MatchResult", "same_permutation"]


@dataclasses.dataclass(frozen=True, eq=False)
class MatchResult:
    """A permutation of B's units, and how the method arrived at it.

    Attributes:
      permutation: int32 array for each group of the spec; ``permute(spec, permutation, params_b)`` aligns B.
      objective: the method's objective at the start and after each iteration, float64
        ``[num_iterations + 1]``.
      num_iterations: number of iterations made; each method's documentation says what one iteration is.
      converged: whether the last iteration changed nothing, as opposed to reaching the limit.
      stats: counts, seconds and choices made, for the reader; two results may differ in them and be equal.
    """

    permutation: dict[str, np.ndarray]
    objective: np.ndarray
    num_iterations: int
    converged: bool
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatchResult):
            return NotImplemented
        return (
            same_permutation(self.permutation, other.permutation)
            and np.array_equal(self.objective, other.objective)
            and (self.num_iterations, self.converged) == (other.num_iterations, other.converged)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays


# `stats` is dropped from the pytree: as metadata, the timings of two equal results would give them different
# tree structures.
jax.tree_util.register_dataclass(
    MatchResult,
    data_fields=["permutation", "objective", "num_iterations", "converged"],
    meta_fields=[],
    drop_fields=["stats"],
)


def same_permutation(first: Permutation, second: Permutation) -> bool:
    """Return whether two permutations have the same groups and the same rows.

    Examples:
      >>> same_permutation({"P0": np.array([1, 0])}, {"P0": np.array([1, 0])})
      True
      >>> same_permutation({"P0": np.array([1, 0])}, {"P0": np.array([0, 1])})
      False
    """
    return first.keys() == second.keys() and all(
        np.array_equal(row, second[group]) for group, row in first.items()
    )
