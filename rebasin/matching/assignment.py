"""Linear assignment: the permutation of columns that maximises a sum of similarities."""

import numpy as np
from scipy.optimize import linear_sum_assignment

from rebasin.errors import NonFiniteError, RebasinError

__all__ = ["best_inner_match", "maximise_assignment", "maximise_assignments"]

# From this many units on, the reduction below repays its time: measured, BUILD_NOTES.md.
_REDUCED_FROM = 128


def maximise_assignment(similarity: np.ndarray) -> np.ndarray:
    """Solves max over permutations p of Σᵢ similarity[i, p[i]], exactly.

    SciPy's modified Jonker–Volgenant algorithm, O(n³), in float64. Deterministic, ties included. It starts
    without prices, so larger matrices are given to it less the maximum of each row and then of each column,
    which every permutation's sum loses alike.

    Args:
      similarity: array [n, n]; rows are units of A, columns units of B.

    Returns:
      int32 array [n]: in the gather convention, the unit of B that takes place i.

    Raises:
      RebasinError: the matrix is not square.
      NonFiniteError: it holds NaN or infinity.

    Examples:
      >>> maximise_assignment(np.array([[0.0, 2.0, 1.0], [1.0, 2.0, 0.0], [3.0, 9.0, 0.0]])).tolist()
      [2, 0, 1]
    """
    similarity = np.asarray(similarity, np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise RebasinError(f"an assignment needs a square matrix, got shape {similarity.shape}")
    if not np.isfinite(similarity).all():
        raise NonFiniteError(
            f"similarities are not finite: {(~np.isfinite(similarity)).sum()} of {similarity.size}"
        )
    if len(similarity) < _REDUCED_FROM:
        _, columns = linear_sum_assignment(similarity, maximize=True)  # rows come back as 0..n−1
    else:
        costs = similarity.max(axis=1, keepdims=True) - similarity
        costs -= costs.min(axis=0)
        _, columns = linear_sum_assignment(costs)
    return columns.astype(np.int32)


def maximise_assignments(similarity: np.ndarray) -> np.ndarray:
    """Solve an assignment for each matrix of a stack.

    Args:
      similarity: array ``[…, n, n]``.

    Returns:
      int32 array ``[…, n]``; see `maximise_assignment`.

    Examples:
      >>> maximise_assignments(np.array([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])).tolist()
      [[1, 0], [0, 1]]
    """
    matrices = similarity.reshape(-1, *similarity.shape[-2:])
    rows = np.array([maximise_assignment(matrix) for matrix in matrices], np.int32)
    return rows.reshape(similarity.shape[:-1])


def best_inner_match(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match the inner units of every pair of outer units.

    Outer units, such as the heads of attention, are paired by the value of the best match between their inner
    units, such as the dimensions of a head.

    Args:
      similarity: array ``[…, n, n]``, the similarity of inner units for each pair of outer units.

    Returns:
      int32 rows ``[…, n]`` of the best match, and its value ``[…]``, the sum of the paired similarities.

    Examples:
      >>> rows, value = best_inner_match(np.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> rows.tolist(), float(value)
      ([1, 0], 3.0)
    """
    rows = maximise_assignments(similarity)
    return rows, np.take_along_axis(similarity, rows[..., None], axis=-1)[..., 0].sum(axis=-1)
