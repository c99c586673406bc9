"""The result of aligning several networks: one permutation each, into a common order of units."""

import dataclasses
from typing import Any

import jax
import numpy as np

from rebasin.permutation import compose, invert, permute
from rebasin.spec import PermutationSpec

__all__ = ["UniverseResult"]


@dataclasses.dataclass(frozen=True, eq=False)
class UniverseResult:
    """A permutation for each of several networks, and how they were reached.

    Attributes:
      permutations: one for each network; ``permute(spec, permutations[i], trees[i])`` brings network i into
        the common order.
      objective: Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ at the start and after each iteration, float64
        ``[num_iterations + 1]``.
      num_iterations: sweeps or steps.
      converged: whether the last sweep changed nothing, as opposed to running into the limit.
      stats: counts, seconds and choices made, for the reader; outside equality.
    """

    permutations: tuple[dict[str, np.ndarray], ...]
    objective: np.ndarray
    num_iterations: int
    converged: bool
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)

    def align(self, spec: PermutationSpec, trees: Any) -> list[Any]:
        """The networks, all in the common order."""
        return [permute(spec, p, tree) for p, tree in zip(self.permutations, trees, strict=True)]

    def pairwise(self, spec: PermutationSpec, i: int, j: int) -> dict[str, jax.Array]:
        """The permutation of network j that aligns it with network i as it is: P_j, then P_i undone."""
        return compose(spec, self.permutations[j], invert(spec, self.permutations[i]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UniverseResult):
            return NotImplemented
        return (
            len(self.permutations) == len(other.permutations)
            and all(
                p.keys() == q.keys() and all(np.array_equal(row, q[group]) for group, row in p.items())
                for p, q in zip(self.permutations, other.permutations, strict=True)
            )
            and np.array_equal(self.objective, other.objective)
            and (self.num_iterations, self.converged) == (other.num_iterations, other.converged)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays


jax.tree_util.register_dataclass(
    UniverseResult,
    data_fields=["permutations", "objective", "num_iterations", "converged"],
    meta_fields=[],
    drop_fields=["stats"],  # timings of two equal results would make two kinds of tree of them
)
