import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.errors import ConfigError, NonFiniteError, PermutationError, TreeMismatchError

KEY = jax.random.key(0)
# Hidden layers, and heads whose insides have an order of their own.
SPEC = PermutationSpec.from_axes(
    {
        "up": (None, "P"),
        "across": ("P", "H", "D"),
        "down": ("H", "D", None),
        "batch_stats/mean": ("P",),
        "step": (),
    },
    indexed={"D": ["H"]},
)


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = {"up": (6, 5), "across": (5, 2, 3), "down": (2, 3, 4), "batch_stats/mean": (5,)}
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    mean = flat.pop("batch_stats/mean")
    return {**flat, "batch_stats": {"mean": mean}, "step": jnp.asarray(seed)}


def joint(trees):
    """Σ_{i<j} ⟨θ_i, θ_j⟩ over the weights, in float64."""
    weights = [
        np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in ("up", "across", "down")])
        for tree in trees
    ]
    return sum(float(a @ b) for a, b in itertools.combinations(weights, 2))


def planted(count):
    permutations = [rebasin.random_permutation(SPEC, draw(0), key=jax.random.key(i)) for i in range(count)]
    return [rebasin.permute(SPEC, permutation, draw(0)) for permutation in permutations]


def merge(trees):
    return rebasin.merge_many(SPEC, trees, key=KEY)


def to_first(trees):
    return rebasin.match_to_reference(SPEC, trees, functools.partial(rebasin.weight_matching, key=KEY))


@pytest.mark.parametrize("align", [merge, to_first])
def test_planted_networks_become_one(align):
    trees = planted(4)
    result = align(trees)
    for aligned in result.align(SPEC, trees):
        chex.assert_trees_all_equal(aligned, trees[0])
    merged = rebasin.average(result.align(SPEC, trees))
    chex.assert_trees_all_close(merged, trees[0], rtol=1e-6)
    moved = rebasin.permute(SPEC, result.pairwise(SPEC, 2, 3), trees[3])
    chex.assert_trees_all_equal(moved, trees[2])


@pytest.mark.parametrize("align", [merge, to_first])
def test_the_objective_is_that_of_all_pairs(align):
    trees = [draw(i) for i in range(4)]
    result = align(trees)
    assert result.objective[0] == pytest.approx(joint(trees), rel=1e-5)
    assert result.objective[-1] == pytest.approx(joint(result.align(SPEC, trees)), rel=1e-5)
    assert rebasin.fixed_points(result.permutations[0]).total == 1.0
    for permutation in result.permutations:
        rebasin.check_permutation(SPEC, trees[0], permutation)
    assert result == align(trees)


def test_merging_never_loses_and_beats_a_reference():
    for seed in range(5):
        trees = [draw(10 * seed + i) for i in range(4)]
        merged = merge(trees)
        assert merged.converged
        assert (np.diff(merged.objective) >= -1e-6).all()
        assert merged.objective[-1] >= to_first(trees).objective[-1] - 1e-6


def test_no_network_can_do_better_alone():
    """At convergence, matching any network with the mean of the others finds nothing."""
    trees = [draw(i) for i in range(3)]
    result = merge(trees)
    aligned = result.align(SPEC, trees)
    for i, tree in enumerate(trees):
        mean = rebasin.average([other for j, other in enumerate(aligned) if j != i])
        again = rebasin.weight_matching(SPEC, mean, tree, key=KEY, start=result.permutations[i])
        assert again.objective[-1] == pytest.approx(again.objective[0], rel=1e-6)


def test_another_reference_stays():
    trees = [draw(i) for i in range(3)]
    matcher = functools.partial(rebasin.weight_matching, key=KEY)
    result = rebasin.match_to_reference(SPEC, trees, matcher, reference=2)
    assert rebasin.fixed_points(result.permutations[2]).total == 1.0
    expected = rebasin.weight_matching(SPEC, trees[2], trees[0], key=KEY).permutation
    assert rebasin.fixed_points(result.permutations[0], expected).total == 1.0
    with pytest.raises(ConfigError, match="reference must be one of the networks 0 to 2, got 5"):
        rebasin.match_to_reference(SPEC, trees, matcher, reference=5)


def test_cycle_error_by_hand():
    spec = PermutationSpec.from_axes({"w": ("P",)})
    stay, turn = {"P": np.array([0, 1, 2, 3])}, {"P": np.array([1, 2, 0, 3])}
    consistent = {(0, 1): turn, (1, 2): stay, (0, 2): turn}  # 2 with 0: 2 with 1, then 1 with 0
    assert rebasin.cycle_error(spec, consistent) == 0.0
    assert rebasin.cycle_error(spec, consistent | {(0, 2): stay}) == 0.75
    # Given both ways, each direction is used in its own cycle: only one of the two is broken here.
    back = {(j, i): rebasin.invert(spec, p) for (i, j), p in consistent.items()}
    assert rebasin.cycle_error(spec, consistent | back | {(2, 0): turn}) == 0.375
    # A fourth network in agreement with the others changes nothing.
    fourth = {(0, 3): stay, (1, 3): rebasin.invert(spec, turn), (2, 3): rebasin.invert(spec, turn)}
    assert rebasin.cycle_error(spec, consistent | fourth) == 0.0


def test_cycles_through_a_universe_are_closed_whatever_the_permutations():
    tree = draw(0)
    permutations = tuple(
        jax.tree.map(np.asarray, rebasin.random_permutation(SPEC, tree, key=jax.random.key(i)))
        for i in range(4)
    )
    result = rebasin.UniverseResult(permutations, np.zeros(1), 0, True)
    pairs = {(i, j): result.pairwise(SPEC, i, j) for i, j in itertools.permutations(range(4), 2)}
    assert rebasin.cycle_error(SPEC, pairs) == 0.0
    independent = {
        pair: rebasin.random_permutation(SPEC, tree, key=jax.random.key(10 + n))
        for n, pair in enumerate(itertools.combinations(range(4), 2))
    }
    assert rebasin.cycle_error(SPEC, independent) > 0.4


def test_cycles_need_all_pairs():
    stay = rebasin.identity_permutation(SPEC, draw(0))
    with pytest.raises(PermutationError) as info:
        rebasin.cycle_error(SPEC, {(0, 1): stay, (1, 2): stay})
    assert str(info.value) == (
        "cycles need all pairs of at least three networks; got networks [0, 1, 2], missing [(0, 2)]"
    )
    with pytest.raises(PermutationError, match=r"got networks \[0, 1\]"):
        rebasin.cycle_error(SPEC, {(0, 1): stay})


def test_averages():
    trees = [draw(i) for i in range(3)]
    uniform, weighted = rebasin.average(trees), rebasin.average(trees, [1, 2, 1])
    for name in ("up", "across", "down"):
        leaves = [np.asarray(tree[name], np.float64) for tree in trees]
        np.testing.assert_allclose(uniform[name], sum(leaves) / 3, rtol=1e-5, atol=1e-6)
        expected = 0.25 * leaves[0] + 0.5 * leaves[1] + 0.25 * leaves[2]
        np.testing.assert_allclose(weighted[name], expected, rtol=1e-5, atol=1e-6)
    # What is no weight comes whole from the network that counts most, the first of several.
    assert (uniform["step"].tolist(), weighted["step"].tolist()) == (0, 1)
    chex.assert_trees_all_equal(weighted["batch_stats"], trees[1]["batch_stats"])
    assert jax.tree.map(lambda x: x.dtype, weighted) == jax.tree.map(lambda x: x.dtype, trees[0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_the_average_of_two_is_a_point_of_the_segment(alpha):
    a, b = draw(0), draw(1)
    chex.assert_trees_all_close(
        rebasin.average([a, b], [alpha, 1 - alpha]), rebasin.interpolate(a, b, alpha), rtol=1e-6
    )


def test_averages_and_merges_refuse_what_cannot_work():
    trees = [draw(i) for i in range(3)]
    with pytest.raises(ConfigError, match="an average needs at least one network, got none"):
        rebasin.average([])
    for weights in ([1, 1], [1, -1, 1], [0, 0, 0], [1, np.nan, 1]):
        with pytest.raises(ConfigError, match="weights must be 3 numbers, one for each network"):
            rebasin.average(trees, weights)
    narrow = {**trees[1], "up": jnp.ones((6, 4))}
    with pytest.raises(TreeMismatchError, match=r"up: shape \(6, 5\) in network 0, \(6, 4\) in network 1"):
        rebasin.average([trees[0], narrow])
    with pytest.raises(TreeMismatchError, match="network 0 and network 1 differ"):
        merge([trees[0], narrow])
    with pytest.raises(ConfigError, match="merging needs at least two networks, got 1"):
        merge(trees[:1])
    with pytest.raises(ConfigError, match="max_iterations must be at least 1, got 0"):
        rebasin.merge_many(SPEC, trees, key=KEY, max_iterations=0)
    broken = {**trees[2], "up": trees[2]["up"].at[0, 0].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match="network 2 is not finite:\n  up: 1 NaN"):
        merge([*trees[:2], broken])
