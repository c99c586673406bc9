"""Transport of neurons against independent solvers and closed forms, and the test of dependence."""

import itertools
import math

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog

import rebasin
from rebasin.errors import ConfigError, NonFiniteError, RebasinError
from rebasin.transport import (
    dependence_test,
    fit_decay,
    gaussian_wasserstein,
    transport_neurons,
    wasserstein_rate,
)


def moment(rng, size):
    root = rng.normal(size=(size, size))
    return root @ root.T


def costs_by_hand(a, b, sigma):
    return np.array([[(x - y) @ sigma @ (x - y) for y in b] for x in a])


@pytest.mark.parametrize("seed", range(5))
def test_equal_counts_are_the_assignment_and_the_linear_program(seed):
    rng = np.random.default_rng(seed)
    a, b, sigma = rng.normal(size=(7, 3)), rng.normal(size=(7, 3)), moment(rng, 3)
    for metric, given in ((np.eye(3), None), (sigma, sigma)):
        costs = costs_by_hand(a, b, metric)
        plan = transport_neurons(a, b, second_moment=given)
        rows, columns = linear_sum_assignment(costs)
        assert plan.cost == pytest.approx(costs[rows, columns].mean())
        np.testing.assert_array_equal(plan.permutation, columns)
        sums = np.array([np.kron(np.eye(7), np.ones(7)), np.kron(np.ones(7), np.eye(7))]).reshape(14, 49)
        program = linprog(costs.ravel(), A_eq=sums, b_eq=np.full(14, 1 / 7), method="highs-ipm")
        assert plan.cost == pytest.approx(program.fun, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(9, 9), (7, 12), (12, 5), (1, 6)])
def test_the_distance_is_that_of_python_optimal_transport(n, m):
    """POT solves the transport by a network simplex of its own."""
    ot = pytest.importorskip("ot", reason="POT is in the extra 'test'")
    rng = np.random.default_rng(100 * n + m)
    a, b, sigma = rng.normal(size=(n, 4)), 0.5 + rng.normal(size=(m, 4)), moment(rng, 4)
    for metric, given in ((np.eye(4), None), (sigma, sigma)):
        costs = costs_by_hand(a, b, metric)
        plan = transport_neurons(a, b, second_moment=given)
        expected = ot.emd2(np.full(n, 1 / n), np.full(m, 1 / m), costs)
        assert plan.cost == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(4, 6), (6, 4), (3, 5), (1, 4), (4, 2)])
def test_different_counts_are_the_assignment_of_copies(n, m):
    """Copies of every neuron, so many that both sides have equally many, are the same measures."""
    rng = np.random.default_rng(10 * n + m)
    a, b, sigma = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)), moment(rng, 3)
    whole = math.lcm(n, m)
    costs = costs_by_hand(np.repeat(a, whole // n, 0), np.repeat(b, whole // m, 0), sigma)
    plan = transport_neurons(a, b, second_moment=sigma)
    assert plan.cost == pytest.approx(costs[linear_sum_assignment(costs)].mean())
    assert plan.permutation is None
    np.testing.assert_allclose(plan.mass.sum(1), 1 / n)
    np.testing.assert_allclose(plan.mass.sum(0), 1 / m)


def test_the_plan_of_equal_counts_is_what_weight_matching_finds():
    spec = rebasin.PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    rng = np.random.default_rng(0)
    a, b = ({"w": rng.normal(size=(5, 16)), "v": np.ones((16, 2))} for _ in range(2))
    match = rebasin.weight_matching(spec, a, b, key=jax.random.key(0))
    found = transport_neurons(a["w"].T, b["w"].T).permutation
    np.testing.assert_array_equal(found, match.permutation["P"])


def test_a_soft_map_to_copies_keeps_the_function():
    rng = np.random.default_rng(1)
    w, v = rng.normal(size=(3, 4)), rng.normal(size=(3, 2))
    wide = np.repeat(w, 2, axis=0)[[3, 0, 5, 1, 2, 4]]
    plan = transport_neurons(wide, w)
    x = rng.normal(size=(8, 4))
    new_w, new_v = plan.producing @ w, plan.consuming @ v
    np.testing.assert_allclose(new_w, wide, atol=1e-12)
    np.testing.assert_allclose(np.maximum(x @ new_w.T, 0) @ new_v, np.maximum(x @ w.T, 0) @ v, atol=1e-12)


def test_gaussians_against_samples_and_commuting_covariances():
    scale = np.array([1.0, 2.0, 0.5])
    closed = gaussian_wasserstein(np.zeros(3), np.eye(3), np.ones(3), np.diag(scale**2))
    assert closed == pytest.approx(math.sqrt(3 + ((1 - scale) ** 2).sum()))
    rng = np.random.default_rng(2)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned = gaussian_wasserstein(
        np.zeros(3), rotation @ rotation.T, rotation @ np.ones(3), rotation @ np.diag(scale**2) @ rotation.T
    )
    assert turned == pytest.approx(closed)
    a, b = rng.normal(size=(600, 3)), 1 + rng.normal(size=(600, 3)) * scale
    # Gaussians are the closest distributions of given moments (Gelbrich), so that the distance of samples is
    # at least the closed form at their own moments, and it is little more.
    moments = [part for sample in (a, b) for part in (sample.mean(0), np.cov(sample.T, bias=True))]
    own = gaussian_wasserstein(*moments)
    assert own == pytest.approx(closed, rel=0.08)
    assert own < transport_neurons(a, b).distance < 1.05 * own


def test_distances_of_samples_fall_with_their_number_at_the_rate_of_the_dimension():
    rng, counts, means = np.random.default_rng(3), (16, 32, 64, 128), {}
    for dimension in (2, 8):
        means[dimension] = [
            np.mean([transport_neurons(*rng.normal(size=(2, n, dimension))).distance for _ in range(12)])
            for n in counts
        ]
        assert all(x > y for x, y in itertools.pairwise(means[dimension]))
    slow, fast = fit_decay(counts, means[8]), fit_decay(counts, means[2])
    assert slow.exponent == pytest.approx(wasserstein_rate(8), abs=0.04)
    assert fast.exponent > 2 * slow.exponent
    assert 0 < slow.standard_error < 0.02
    assert math.isnan(fit_decay([1, 2], [2.0, 1.0]).standard_error)
    assert fit_decay([2, 8, 32], [3 / 2**0.5, 3 / 8**0.5, 3 / 32**0.5]).scale == pytest.approx(3)


def test_independent_neurons_pass_and_dependent_ones_do_not():
    rng = np.random.default_rng(6)
    spread = np.linspace(0.2, 2, 6)
    values = [
        dependence_test(rng.normal(size=(3, 10, 6)) * spread, num_permutations=99, seed=seed).p_value
        for seed in range(40)
    ]
    assert 0.3 < np.mean(values) < 0.7
    assert np.mean(np.array(values) <= 0.05) < 0.2
    apart = [np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(3)]  # share out all directions
    found = dependence_test(apart, num_permutations=199)
    assert (found.statistic, found.p_value) == (pytest.approx(0, abs=1e-12), 1 / 200)
    assert found.z_score < -3
    gathered = [rng.normal(size=(8, 6)) * 0.3 + rng.normal(size=6) for _ in range(3)]
    found = dependence_test(gathered, num_permutations=199)
    assert found.p_value == 1 / 200
    assert found.z_score > 3


def test_the_statistic_is_the_mean_squared_cosine_within_networks():
    layers = np.random.default_rng(7).normal(size=(2, 4, 3))
    cosines = [
        (x @ y / np.linalg.norm(x) / np.linalg.norm(y)) ** 2
        for layer in layers
        for x, y in itertools.permutations(layer, 2)
    ]
    assert dependence_test(layers, num_permutations=1).statistic == pytest.approx(np.mean(cosines))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: transport_neurons(np.ones((2, 3)), np.ones((2, 4))),
            RebasinError,
            "neurons_b: wanted neurons of dimension 3 as in A, got 4",
        ),
        (
            lambda: transport_neurons([[1.0], [np.nan]], [[1.0]]),
            NonFiniteError,
            "neurons_a: 1 of 2 entries are not finite",
        ),
        (
            lambda: transport_neurons(
                np.ones((2, 2)), np.ones((2, 2)), second_moment=[[1.0, 0.0], [0.0, -1.0]]
            ),
            RebasinError,
            "second_moment: wanted a symmetric positive semidefinite matrix",
        ),
        (
            lambda: transport_neurons(np.ones((2, 2)), np.ones((2, 2)), second_moment=np.eye(3)),
            RebasinError,
            "second_moment: wanted shape [2, 2], got [3, 3]",
        ),
        (
            lambda: transport_neurons(np.ones(3), np.ones((2, 2))),
            RebasinError,
            "neurons_a: wanted a matrix with at least one entry, got shape [3]",
        ),
        (
            lambda: fit_decay([2, 2], [1.0, 1.0]),
            RebasinError,
            "wanted a distance for each of at least two counts, got [2. 2.] and [1. 1.]",
        ),
        (
            lambda: fit_decay([2, 4], [1.0, 0.0]),
            RebasinError,
            "wanted positive counts and distances, got [2. 4.] and [1. 0.]",
        ),
        (
            lambda: dependence_test([np.ones((3, 2))]),
            RebasinError,
            "wanted a layer of at least two neurons for each of at least two networks, of one shape; "
            "got [[3, 2]]",
        ),
        (
            lambda: dependence_test(np.ones((2, 3, 2)), num_permutations=0),
            ConfigError,
            "num_permutations: wanted at least 1, got 0",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error) as info:
        call()
    assert str(info.value) == message
