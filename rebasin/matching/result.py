"""The result that every matching method returns."""

import dataclasses
from typing import Any

import jax
import numpy as np

__all__ = ["MatchResult"]


@dataclasses.dataclass(frozen=True, eq=False)
class MatchResult:
    """A permutation of B's units and how it was reached.

    Attributes:
      permutation: int32 array for each group of the spec; ``permute(spec, permutation, params_b)`` aligns B.
      objective: the method's objective at the start and after each sweep, float64 ``[num_iterations + 1]``.
      num_iterations: passes over all groups.
      converged: whether the last sweep changed nothing, as opposed to running into the limit.
      stats: counts, seconds and choices made, for the reader; outside equality.
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
            self.permutation.keys() == other.permutation.keys()
            and all(np.array_equal(row, other.permutation[group]) for group, row in self.permutation.items())
            and np.array_equal(self.objective, other.objective)
            and (self.num_iterations, self.converged) == (other.num_iterations, other.converged)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays


jax.tree_util.register_dataclass(
    MatchResult,
    data_fields=["permutation", "objective", "num_iterations", "converged"],
    meta_fields=[],
    drop_fields=["stats"],  # timings of two equal results would make two kinds of tree of them
)
