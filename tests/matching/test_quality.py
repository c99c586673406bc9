"""What weight matching promises beyond an ascent: small groups, symmetry, restarts, many at once."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_optimum import exact_optimum
from hypothesis import given, settings
from hypothesis import strategies as st

import rebasin
from rebasin import PermutationSpec
from rebasin.arithmetic import inner_product
from rebasin.errors import ConfigError, TreeMismatchError
from rebasin.matching.blocks import lay_out_units, pair_blocks
from rebasin.matching.weights import weight_matchings
from rebasin.trees import leaf_table

KEY = jax.random.key(0)

# Specs of small networks with the shapes of their leaves: every way in which groups meet.
SMALL = {
    "chain of three": (
        {"w0": (None, "P"), "b0": ("P",), "w1": ("P", "Q"), "w2": ("Q", "R"), "w3": ("R", None)},
        {"w0": (2, 4), "b0": (4,), "w1": (4, 3), "w2": (3, 4), "w3": (4, 2)},
        {},
    ),
    "residual stream": (
        {
            "in": (None, "S"),
            "u": ("S", "P"),
            "v": ("P", "S"),
            "x": ("S", "Q"),
            "y": ("Q", "S"),
            "o": ("S", None),
        },
        {"in": (1, 4), "u": (4, 3), "v": (3, 4), "x": (4, 4), "y": (4, 4), "o": (4, 1)},
        {},
    ),
    "recurrent": (
        {"w": (None, "P"), "r": ("P", "P"), "v": ("P", "Q"), "o": ("Q", None)},
        {"w": (1, 4), "r": (4, 4), "v": (4, 3), "o": (3, 1)},
        {},
    ),
    "three in a leaf": (
        {"t": ("P", "Q", "R"), "p": ("P", None), "q": ("Q", None), "r": ("R", None)},
        {"t": (3, 3, 3), "p": (3, 1), "q": (3, 1), "r": (3, 1)},
        {},
    ),
    "heads": (
        {"e": (None, "R"), "q": ("R", "H", "D"), "o": ("H", "D", "R"), "u": ("R", None)},
        {"e": (2, 3), "q": (3, 2, 3), "o": (2, 3, 3), "u": (3, 2)},
        {"D": ["H"]},
    ),
}


def network(shapes, seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def all_permutations(spec, tree):
    identity = rebasin.identity_permutation(spec, tree)
    choices = []
    for rows in identity.values():
        each = list(itertools.permutations(range(rows.shape[-1])))
        count = rows.size // rows.shape[-1]
        choices.append([np.array(c).reshape(rows.shape) for c in itertools.product(each, repeat=count)])
    for choice in itertools.product(*choices):
        yield dict(zip(identity, choice, strict=True))


def moved_by_hand(spec, permutation, leaf, axes):
    """`permute` in plain NumPy, for the thousands of calls of a brute force."""
    groups = [axis.groups[0] if axis.groups else None for axis in axes]
    for dim in sorted(range(leaf.ndim), key=lambda d: groups[d] in dict(spec.indexed)):
        if groups[dim] is None:
            continue
        rows = permutation[groups[dim]]
        if rows.ndim == 1:
            leaf = np.take(leaf, rows, axis=dim)
        else:
            outer = groups.index(dict(spec.indexed)[groups[dim]][0])
            parts = [
                np.take(part, rows[i], axis=dim - (dim > outer))
                for i, part in enumerate(np.moveaxis(leaf, outer, 0))
            ]
            leaf = np.moveaxis(np.stack(parts), 0, outer)
    return leaf


def brute_force(spec, a, b):
    table = spec.table
    return max(
        sum(
            float(np.sum(np.multiply(a[p], moved_by_hand(spec, q, b[p], table[p]), dtype=np.float64)))
            for p in a
        )
        for q in all_permutations(spec, a)
    )


def optimum(spec, a, b):
    """The highest objective of all permutations, by elimination of one group after the other."""
    identity = rebasin.identity_permutation(spec, a)
    best = exact_optimum(list(pair_blocks(spec, {p: (a[p], b[p]) for p in a}, {})), identity)
    return None if best is None else inner_product(a, rebasin.permute(spec, best, b))


@pytest.mark.parametrize("name", ["chain of three", "recurrent", "three in a leaf", "heads"])
@pytest.mark.parametrize("seed", range(2))
def test_brute_force_agrees_where_no_group_has_more_than_four_units(name, seed):
    table, shapes, indexed = SMALL[name]
    if name == "chain of three":  # 24 · 6 · 24 permutations
        shapes = {"w0": (2, 4), "b0": (4,), "w1": (4, 3), "w2": (3, 3), "w3": (3, 2)}
    spec = PermutationSpec.from_axes(table, indexed=indexed)
    a, b = network(shapes, seed), network(shapes, seed + 50)
    best = brute_force(spec, a, b)
    np.testing.assert_allclose(optimum(spec, a, b), best, rtol=1e-6)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", range(2))
def test_the_best_of_many_ascents_is_the_optimum_of_small_groups(name, seed):
    table, shapes, indexed = SMALL[name]
    spec = PermutationSpec.from_axes(table, indexed=indexed)
    a, b = network(shapes, seed), network(shapes, seed + 50)
    best = optimum(spec, a, b)
    reached = [rebasin.weight_matching(spec, a, b, key=KEY).objective[-1]]
    for number in range(30):
        start = rebasin.random_permutation(spec, a, key=jax.random.key(number))
        match = rebasin.weight_matching(spec, a, b, key=KEY, start=start, restarts=3)
        reached.append(match.objective[-1])
    assert max(reached) <= best * (1 + 1e-6)
    if name != "recurrent":  # there the objective is quadratic in a group, and no assignment maximises it
        assert max(reached) == pytest.approx(best, rel=1e-5)


def test_the_exact_search_declines_what_is_too_large():
    spec = PermutationSpec.from_axes({"w": (None, "P")})
    assert optimum(spec, *[{"w": np.ones((2, 7), np.float32)}] * 2) is None
    # Five groups of four that all meet in one leaf: 24⁵ entries.
    five = PermutationSpec.from_axes({"w": tuple("PQRST")})
    assert optimum(five, *[{"w": np.ones((4,) * 5, np.float32)}] * 2) is None


def residual(width, blocks):
    table = {"in": (None, "S"), "out": ("S", None)}
    shapes = {"in": (8, width), "out": (width, 4)}
    for i in range(blocks):
        table |= {f"u{i}": ("S", f"P{i}"), f"b{i}": (f"P{i}",), f"v{i}": (f"P{i}", "S")}
        shapes |= {f"u{i}": (width, width), f"b{i}": (width,), f"v{i}": (width, width)}
    return PermutationSpec.from_axes(table), shapes


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_units_of_b_does_not_matter(seed):
    spec, shapes = residual(16, 3)
    a, b = network(shapes, seed), network(shapes, seed + 100)
    shuffled = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), b)
    first, second = (rebasin.weight_matching(spec, a, x, key=KEY) for x in (b, shuffled))
    assert first.stats["start"] == second.stats["start"] == "depth"
    np.testing.assert_allclose(first.objective, second.objective, rtol=1e-5)
    chex.assert_trees_all_equal(
        rebasin.permute(spec, first.permutation, b), rebasin.permute(spec, second.permutation, shuffled)
    )


def test_groups_that_meet_nothing_fixed_are_found_whatever_their_order():
    """No leaf has all its other axes known at first, so the first group goes by its sorted weights."""
    spec = PermutationSpec.from_axes({"w": ("P", "Q"), "v": ("Q", "R")})
    for seed in range(5):
        a = network({"w": (12, 9), "v": (9, 7)}, seed)
        planted = rebasin.random_permutation(spec, a, key=jax.random.key(seed))
        b = rebasin.permute(spec, planted, a)
        match = rebasin.weight_matching(spec, a, b, key=KEY)
        chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)


@given(st.integers(0, 10**6), st.integers(2, 12))
@settings(max_examples=20)
def test_swapping_the_networks_gives_the_same_objective_for_a_single_assignment(seed, width):
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    shapes = {"w": (3, width), "v": (width, 2)}
    a, b = network(shapes, seed), network(shapes, seed + 1)
    there, back = rebasin.weight_matching(spec, a, b, key=KEY), rebasin.weight_matching(spec, b, a, key=KEY)
    np.testing.assert_allclose(there.objective[-1], back.objective[-1], rtol=1e-6)
    chex.assert_trees_all_equal(rebasin.invert(spec, there.permutation), dict(back.permutation))


@pytest.mark.parametrize("blocks", [4, 8])
@pytest.mark.parametrize("seed", range(10))
def test_planted_permutations_of_residual_networks_are_recovered(blocks, seed):
    spec, shapes = residual(24, blocks)
    a = network(shapes, seed)
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)
    assert (match.num_iterations, match.stats["certificates"]) == (1, blocks + 1)


def test_restarts_never_lose_and_are_deterministic():
    spec, shapes = residual(12, 4)
    gains = []
    for seed in range(4):
        a, b = network(shapes, seed), network(shapes, seed + 100)
        plain = rebasin.weight_matching(spec, a, b, key=KEY, restarts=0)
        first, second = (rebasin.weight_matching(spec, a, b, key=KEY, restarts=8) for _ in range(2))
        assert first == second
        assert (np.diff(first.objective) >= 0).all()
        assert first.objective[: plain.num_iterations + 1].tolist() == plain.objective.tolist()
        assert len(first.objective) == first.num_iterations + 1
        aligned = rebasin.permute(spec, first.permutation, b)
        assert sum(np.vdot(a[p], aligned[p]) for p in a) == pytest.approx(first.objective[-1], rel=1e-5)
        gains.append(first.objective[-1] - plain.objective[-1])
    assert max(gains) > 0


def test_similarities_updated_are_similarities_computed_anew():
    """Through a long ascent, in which rows are added and exchanged, no error builds up."""
    spec, shapes = residual(40, 4)
    a, b = network(shapes, 1), network(shapes, 2)
    match = rebasin.weight_matching(spec, a, b, key=KEY, start="identity", restarts=5)
    again = rebasin.weight_matching(spec, a, b, key=KEY, start=match.permutation)
    assert again.objective[0] == pytest.approx(match.objective[-1], rel=1e-6)
    for group, rows in again.permutation.items():  # nothing was left to gain
        np.testing.assert_array_equal(rows, match.permutation[group])


def test_one_permutation_for_two_trajectories():
    """The joint objective is the sum; one pair is the plain matching; noise in each is averaged away."""
    spec, shapes = residual(20, 2)
    base = network(shapes, 0)
    planted = rebasin.random_permutation(spec, base, key=KEY)

    def noisy(tree, seed):
        return jax.tree.map(lambda x, e: x + 1.5 * e, tree, network(shapes, seed))

    trees_a = [noisy(base, 10 + i) for i in range(8)]
    trees_b = [rebasin.permute(spec, planted, noisy(base, 20 + i)) for i in range(8)]
    joint = rebasin.joint_weight_matching(spec, trees_a, trees_b, key=KEY)
    single = rebasin.weight_matching(spec, trees_a[0], trees_b[0], key=KEY)
    truth = rebasin.invert(spec, planted)
    assert rebasin.fixed_points(joint.permutation, truth).total == 1.0
    assert rebasin.fixed_points(single.permutation, truth).total < 1.0
    moved = [rebasin.permute(spec, joint.permutation, b) for b in trees_b]
    expected = sum(np.vdot(a[p], m[p]) for a, m in zip(trees_a, moved, strict=True) for p in a)
    assert joint.objective[-1] == pytest.approx(expected, rel=1e-5)
    assert rebasin.joint_weight_matching(spec, trees_a[:1], trees_b[:1], key=KEY) == single
    with pytest.raises(TreeMismatchError, match="got 8 of A and 7 of B"):
        rebasin.joint_weight_matching(spec, trees_a, trees_b[:7], key=KEY)
    wider = network(residual(21, 2)[1], 0)
    with pytest.raises(TreeMismatchError, match=r"in trees_a\[0\], \(8, 21\) in trees_a\[1\]"):
        rebasin.joint_weight_matching(spec, [trees_a[0], wider], [trees_b[0], wider], key=KEY)


def test_a_restart_assigns_inner_groups_that_their_outer_group_could_not():
    """The dimensions of heads meet nothing that is known while the stream is being assigned too."""
    table, shapes, indexed = SMALL["heads"]
    spec = PermutationSpec.from_axes(table, indexed=indexed)
    for seed in range(5):
        a, b = network(shapes, seed), network(shapes, seed + 50)
        match = rebasin.weight_matching(spec, a, b, key=KEY, restarts=20)
        assert (np.diff(match.objective) >= 0).all()


def test_many_matchings_at_once_are_those_of_one_after_the_other():
    spec, shapes = residual(24, 3)
    pairs = [(network(shapes, i), network(shapes, i + 50)) for i in range(6)]
    together = weight_matchings(spec, pairs, key=KEY, workers=3, restarts=2)
    apart = [rebasin.weight_matching(spec, a, b, key=KEY, restarts=2) for a, b in pairs]
    assert together == apart
    assert weight_matchings(spec, [], key=KEY) == []
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        weight_matchings(spec, pairs, key=KEY, workers=0)


def test_no_more_than_one_copy_of_a_leaf_for_each_group_it_carries():
    """The matrices of a leaf's last axis are views of the leaf itself."""
    spec, shapes = residual(24, 2)
    a, b = (jax.tree.map(jnp.asarray, network(shapes, seed)) for seed in (0, 1))
    leaves = {p: (x, leaf_table(b)[p]) for p, x in leaf_table(a).items()}
    for block in pair_blocks(spec, leaves, {}):
        last = lay_out_units(block, block.a.ndim - 1)
        assert np.shares_memory(last.a, block.a)
        assert np.shares_memory(last.b, block.b)
