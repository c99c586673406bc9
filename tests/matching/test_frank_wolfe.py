import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case
from hypothesis import given, settings
from hypothesis import strategies as st

import rebasin
from rebasin import PermutationSpec
from rebasin.arithmetic import inner_product
from rebasin.errors import ConfigError
from rebasin.matching.frank_wolfe import Relaxation, best_step, frank_wolfe_matching
from rebasin.matching.soft import soft_permute, soften, uniform_soft
from rebasin.roles import weight_leaves

KEY = jax.random.key(0)
# Two hidden layers, one of them with recurrent weights.
SPEC = PermutationSpec.from_axes(
    {"up": (None, "P"), "across": ("P", "Q"), "recurrent": ("Q", "Q"), "down": ("Q", None), "free": (None,)}
)


def draw(seed, p=4, q=3):
    rng = np.random.default_rng(seed)
    shapes = {"up": (3, p), "across": (p, q), "recurrent": (q, q), "down": (q, 2), "free": (2,)}
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


def every_permutation(sizes):
    for rows in itertools.product(*(itertools.permutations(range(n)) for n in sizes.values())):
        yield {group: np.array(row) for group, row in zip(sizes, rows, strict=True)}


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_the_objective_between_soft_permutations_is_the_polynomial(seed):
    """Against direct evaluation of all leaves in float64, between two random soft permutations of each."""
    trees = [draw(seed + i) for i in range(3)]
    rng = np.random.default_rng(seed)
    ends = [
        tuple({g: rng.dirichlet(np.ones(n), size=n) for g, n in (("P", 4), ("Q", 3))} for _ in range(2))
        for _ in range(2)
    ]
    relaxation = Relaxation(SPEC, trees, weight_leaves(trees[0]))
    assert relaxation.degree == 4  # two matrices in a block, of two networks that move
    along = relaxation.along(*ends)
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree) for tree in trees]
        for t in (0.0, 0.3, 0.5, 0.9, 1.0):
            moved = [wide[0]]
            for start, end, tree in zip(*ends, wide[1:], strict=True):
                moved.append(soft_permute(SPEC, {g: start[g] + t * (end[g] - start[g]) for g in start}, tree))
            expected = sum(inner_product(a, b) for a, b in itertools.combinations(moved, 2))
            assert float(along(t)) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_the_gradient_is_that_of_the_polynomial():
    trees = [draw(i) for i in range(3)]
    relaxation = Relaxation(SPEC, trees, weight_leaves(trees[0]))
    softs = tuple(uniform_soft(SPEC, trees[0]) for _ in range(2))
    ends = tuple(
        soften(SPEC, rebasin.random_permutation(SPEC, trees[0], key=jax.random.key(i)), trees[0])
        for i in range(2)
    )
    slope = sum(
        np.sum(gradient[g] * (end[g] - soft[g]))
        for gradient, soft, end in zip(relaxation.gradient(softs), softs, ends, strict=True)
        for g in gradient
    )
    assert float(relaxation.along(softs, ends).deriv()(0.0)) == pytest.approx(slope, rel=1e-5)


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_one_layer_is_solved_exactly(seed):
    """One group: the objective is linear, and one step reaches the brute-force optimum."""
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    rng = np.random.default_rng(seed)
    a, b = (
        {"w": rng.normal(size=(3, 4)).astype(np.float32), "v": rng.normal(size=(4, 2)).astype(np.float32)}
        for _ in "ab"
    )
    match = frank_wolfe_matching(spec, a, b)
    best = max(inner_product(a, rebasin.permute(spec, p, b)) for p in every_permutation({"P": 4}))
    assert match.objective[-1] == pytest.approx(best, rel=1e-6)
    assert match.converged


@given(st.integers(0, 10**6))
@settings(max_examples=4)
def test_objective_is_the_inner_product_and_below_the_optimum(seed):
    a, b = draw(seed), draw(seed + 1)
    match = frank_wolfe_matching(SPEC, a, b)
    reached = inner_product(a, rebasin.permute(SPEC, match.permutation, b))
    assert match.objective[-1] == pytest.approx(reached, rel=1e-6)
    assert match.objective[0] == pytest.approx(inner_product(a, b), rel=1e-5)
    assert (np.diff(match.objective) >= 0).all()
    best = max(inner_product(a, rebasin.permute(SPEC, p, b)) for p in every_permutation({"P": 4, "Q": 3}))
    assert match.objective[-1] <= best + 1e-5
    # Exact steps: the relaxed objective never falls, and at vertices it is the hard one.
    assert (np.diff(match.stats["relaxed"]) >= -1e-9).all()
    assert match.stats["gap"] >= -1e-3  # float32 gradients of an objective of a few units


@pytest.mark.parametrize("name", ["mlp", pytest.param("vit", marks=pytest.mark.slow)])
def test_planted_permutations_from_the_published_start(name):
    case = build_case(name)
    match = frank_wolfe_matching(case.spec, case.params_a, case.planted, start="identity")
    restored = rebasin.permute(case.spec, match.permutation, case.planted)
    chex.assert_trees_all_equal(restored, jax.tree.map(jnp.asarray, case.params_a))
    assert match.converged
    # No gap is left at the planted vertex, in float32 gradients of an objective of that size.
    assert abs(match.stats["gap"]) <= 1e-5 * match.objective[-1]


@pytest.mark.parametrize("name", ["mlp", pytest.param("vit", marks=pytest.mark.slow)])
def test_the_barycentre_does_not_see_the_order_of_units(name):
    """Permuting B beforehand changes the permutation found, not the network it makes."""
    case = build_case(name)
    first = frank_wolfe_matching(case.spec, case.params_a, case.params_b)
    shuffle = rebasin.random_permutation(case.spec, case.params_b, key=KEY)
    shuffled = rebasin.permute(case.spec, shuffle, case.params_b)
    second = frank_wolfe_matching(case.spec, case.params_a, shuffled)
    chex.assert_trees_all_equal(
        rebasin.permute(case.spec, first.permutation, case.params_b),
        rebasin.permute(case.spec, second.permutation, shuffled),
    )


@pytest.mark.parametrize(
    ("coefficients", "step"),
    [
        ([0, 1, -1], 0.5),  # t − t²
        ([0, -1, 1], 0.0),  # down, and up to where it began: a tie stays
        ([0, -1, 2], 1.0),
        ([0, 4, -1], 1.0),  # largest at t = 2, beyond the end
        ([0, 3, -4, 1], (4 - 7**0.5) / 3),  # 3t − 4t² + t³: the smaller root of 3 − 8t + 3t²
        ([2], 0.0),
    ],
)
def test_the_step_is_where_the_polynomial_is_largest(coefficients, step):
    polynomial = np.polynomial.Polynomial(coefficients, domain=[0, 1], window=[0, 1])
    assert best_step(polynomial) == pytest.approx(step, abs=1e-12)


def test_the_history_of_steps():
    a, b = draw(0, 8, 7), draw(1000, 8, 7)
    match = frank_wolfe_matching(SPEC, a, b)
    steps, relaxed = match.stats["steps"], match.stats["relaxed"]
    assert ((steps > 0) & (steps <= 1)).all()
    assert ((steps > 0) & (steps < 1)).any()  # not every step goes all the way
    assert len(relaxed) == len(steps) + 1
    # Vertices met on the way count: the history of hard permutations rises before the end.
    assert match.objective[0] < match.objective[-2] <= match.objective[-1]


def test_options_are_checked():
    a = draw(0)
    with pytest.raises(ConfigError, match="max_iterations must be at least 1, got 0"):
        frank_wolfe_matching(SPEC, a, a, max_iterations=0)
    with pytest.raises(ConfigError, match="tolerance must be at least 0, got -1"):
        frank_wolfe_matching(SPEC, a, a, tolerance=-1)
    one = frank_wolfe_matching(SPEC, a, draw(1), max_iterations=1)
    assert (one.num_iterations, len(one.objective)) == (1, 2)


def test_a_spec_without_groups_has_nothing_to_do():
    spec = PermutationSpec.from_axes({"w": (None,)})
    a = {"w": jnp.array([1.0, 2.0])}
    match = frank_wolfe_matching(spec, a, a)
    assert (match.permutation, match.objective.tolist(), match.converged) == ({}, [5.0], True)
