import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from rebasin.errors import NonFiniteError, RebasinError
from rebasin.matching.assignment import maximise_assignment


@given(st.integers(1, 5).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(-1e3, 1e3))))
def test_brute_force_agrees(similarity):
    n = len(similarity)
    best = max(similarity[range(n), list(p)].sum() for p in itertools.permutations(range(n)))
    row = maximise_assignment(similarity)
    assert sorted(row) == list(range(n))
    np.testing.assert_allclose(similarity[range(n), row].sum(), best, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("kind", ["products", "ties", "heavy tail", "rows of zeros"])
def test_large_matrices_are_reduced_without_changing_the_optimum(kind):
    n = 150  # above the size from which they are
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(n, n))
    similarity = {
        "products": draws @ rng.normal(size=(n, n)),
        "ties": np.round(draws),
        "heavy tail": -np.exp(5 * draws),
        "rows of zeros": draws * (np.arange(n) < 100)[:, None],
    }[kind]
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    row = maximise_assignment(similarity)
    assert sorted(row) == list(range(n))
    np.testing.assert_allclose(similarity[range(n), row].sum(), similarity[rows, columns].sum(), rtol=1e-12)


@pytest.mark.parametrize("n", [20, 150])
def test_digits_beyond_float32_decide(n):
    """A constant that is added to all similarities leaves the optimum, but float32 would keep no more."""
    draws = np.random.default_rng(0).normal(size=(n, n))
    _, columns = linear_sum_assignment(draws, maximize=True)
    np.testing.assert_array_equal(maximise_assignment(1e8 + draws), columns)


def test_planted_permutation_in_the_gather_convention():
    rng = np.random.default_rng(0)
    units = rng.normal(size=(64, 9))
    moved = rng.permutation(64)
    row = maximise_assignment(units @ units[moved].T)  # B's unit j is A's unit moved[j]
    np.testing.assert_array_equal(moved[row], np.arange(64))


def test_ties_are_deterministic():
    np.testing.assert_array_equal(
        maximise_assignment(np.zeros((6, 6))), maximise_assignment(np.zeros((6, 6)))
    )


def test_bad_input():
    with pytest.raises(RebasinError, match=r"an assignment needs a square matrix, got shape \(2, 3\)"):
        maximise_assignment(np.zeros((2, 3)))
    with pytest.raises(NonFiniteError, match="similarities are not finite: 1 of 4"):
        maximise_assignment(np.array([[0, np.nan], [1, 2]]))
