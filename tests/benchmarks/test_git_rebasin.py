"""The peer of the benchmarks is git-re-basin's algorithm: an exact assignment, and an ascent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import rebasin
from benchmarks.architectures import Architecture, draw_network
from benchmarks.git_rebasin import git_rebasin_matching, whole_axes
from benchmarks.planted_recovery import PLANTED, is_recovered
from rebasin.errors import SpecError
from rebasin.models import MLP
from rebasin.trees import leaf_table

KEY = jax.random.key(0)


def inner_product(a, b):
    a, b = leaf_table(a), leaf_table(b)
    return sum(np.vdot(np.asarray(a[p], np.float64), np.asarray(b[p], np.float64)) for p in a)


def networks(architecture, seed):
    spec, shapes = architecture.trace()
    return spec, draw_network(shapes, 2 * seed), draw_network(shapes, 2 * seed + 1)


def reached(spec, a, b, **options):
    match = git_rebasin_matching(spec, a, b, key=KEY, **options)
    return inner_product(a, rebasin.permute(spec, match.permutation, b))


@pytest.mark.parametrize("seed", range(5))
def test_one_group_is_brute_force_and_scipy(seed):
    spec, a, b = networks(Architecture(MLP((5,), 2), (1, 1, 1, 3)), seed)
    values = [
        inner_product(a, rebasin.permute(spec, {spec.groups[0]: jnp.array(row)}, b))
        for row in itertools.permutations(range(5))
    ]
    match = git_rebasin_matching(spec, a, b, key=KEY)
    (row,) = match.permutation.values()
    assert reached(spec, a, b) == pytest.approx(max(values), rel=1e-6)
    a, b = (jax.tree.map(np.asarray, tree["params"]) for tree in (a, b))
    similarity = (
        a["Dense_0"]["kernel"].T @ b["Dense_0"]["kernel"]
        + np.outer(a["Dense_0"]["bias"], b["Dense_0"]["bias"])
        + a["Dense_1"]["kernel"] @ b["Dense_1"]["kernel"].T
    )
    assert row.tolist() == linear_sum_assignment(similarity, maximize=True)[1].tolist()
    # The second iteration finds nothing better, and only then does the loop know.
    assert (match.num_iterations, match.num_assignments) == (2, 2)


@pytest.mark.parametrize("seed", range(3))
def test_objective_never_falls_and_no_group_can_do_better(seed):
    spec, a, b = networks(Architecture(MLP((12,) * 5, 3), (1, 1, 1, 5)), seed)
    match = git_rebasin_matching(spec, a, b, key=KEY)
    assert 2 < match.num_iterations < 100
    assert match.num_assignments == match.num_iterations * len(spec.groups)
    # The order of groups depends on the key alone, so a shorter run is the beginning of a longer one.
    objective = [inner_product(a, b)]
    objective += [reached(spec, a, b, max_iterations=n) for n in range(1, match.num_iterations + 1)]
    assert (np.diff(objective) >= -1e-5 * objective[-1]).all()
    assert objective[1] < objective[-1]
    assert objective[-1] == pytest.approx(objective[-2], rel=1e-6)
    # Ours, started where the loop ended, finds nothing to improve either.
    again = rebasin.weight_matching(spec, a, b, key=KEY, start=match.permutation, restarts=0)
    assert again.objective[-1] == pytest.approx(objective[-1], rel=1e-6)


@pytest.mark.slow
def test_planted_permutation_of_kernels_is_recovered():
    """Leaves of four axes, two of which move, and a group on several leaves."""
    table = {
        "first": (None, None, None, "P"),
        "scale": ("P",),
        "second": (None, None, "P", "Q"),
        "out": ("Q", None),
    }
    spec = rebasin.PermutationSpec.from_axes(table)
    shapes = {"first": (3, 3, 2, 6), "scale": (6,), "second": (3, 3, 6, 7), "out": (7, 4)}
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    for seed in range(3):
        a = draw_network(shapes, seed)
        b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
        assert is_recovered(spec, a, b, git_rebasin_matching(spec, a, b, key=KEY).permutation)


def test_table_form():
    spec, shapes = Architecture(MLP((6, 5), 2), (1, 1, 1, 3)).trace()
    first, second = spec.groups
    assert whole_axes(spec)["params/Dense_1/kernel"] == (first, second)
    assert whole_axes(spec)["params/Dense_0/kernel"] == (None, first)
    vit, shapes = PLANTED["ViT width 32"].trace()
    with pytest.raises(SpecError, match="this spec has parts of axes"):
        git_rebasin_matching(vit, draw_network(shapes, 0), draw_network(shapes, 1), key=KEY)
