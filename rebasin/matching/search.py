"""What methods that learn share: the best permutation met so far, and the checks of a gradient step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rebasin.errors import NonFiniteError, RebasinError
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation

__all__ = ["Search", "check_step", "import_optax"]


class Search:
    """Keeps the best of all permutations that a method meets, by their loss.

    Attributes:
      current: the permutation offered last, int32 rows.
    """

    def __init__(self, loss: Callable[[Permutation], float], start: Permutation) -> None:
        self._loss = loss
        self.current = _rows(start)
        value = self._evaluate(self.current)
        self._best, self._best_loss = self.current, value
        self._losses, self._objective, self._evaluations = [value], [-value], 1
        self._unchanged = True

    def offer(self, permutation: Permutation) -> None:
        """Takes the permutation that a step ended at."""
        rows = _rows(permutation)
        self._unchanged = all(np.array_equal(row, self.current[group]) for group, row in rows.items())
        value = self._losses[-1]
        if not self._unchanged:
            self.current, value = rows, self._evaluate(rows)
            self._evaluations += 1
        if value < self._best_loss:
            self._best, self._best_loss = rows, value
        self._losses.append(value)
        self._objective.append(-self._best_loss)

    def result(self, stats: Mapping[str, Any]) -> MatchResult:
        """The match, with ``losses`` and ``evaluations`` added to `stats`."""
        stats = {**stats, "losses": np.array(self._losses), "evaluations": self._evaluations}
        num_sweeps = len(self._objective) - 1
        return MatchResult(self._best, np.array(self._objective), num_sweeps, self._unchanged, stats)

    def _evaluate(self, permutation: Permutation) -> float:
        value = self._loss(permutation)
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss between the networks is {value}: nothing can be learned from it")
        return value


def check_step(step: int, gradient: Mapping[str, Any], loss: Any) -> None:
    """Raises `NonFiniteError` if the loss of a step, or its gradient in any array, is not finite."""
    if not math.isfinite(float(loss)):
        raise NonFiniteError(f"step {step}: the loss is {float(loss)}")
    wrong = [name for name, values in gradient.items() if not np.isfinite(values).all()]
    if wrong:
        raise NonFiniteError(f"step {step}: the gradient is not finite in {wrong}")


def import_optax(user: str) -> Any:
    """Optax, which only methods that learn need."""
    try:
        import optax
    except ImportError as error:
        raise RebasinError(
            f"{user} needs Optax, which is not installed: pip install 'rebasin-jax[sinkhorn]', or optax alone"
        ) from error
    return optax


def _rows(permutation: Permutation) -> dict[str, np.ndarray]:
    return {group: np.asarray(row, np.int32) for group, row in permutation.items()}
