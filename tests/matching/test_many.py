import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case

import rebasin
from rebasin import PermutationSpec
from rebasin.arithmetic import inner_product
from rebasin.errors import ConfigError, NonFiniteError, PermutationError, TreeMismatchError
from rebasin.matching.frank_wolfe import FrankWolfeMatching, frank_wolfe_matching
from rebasin.matching.many import (
    UniverseResult,
    cycle_error,
    match_to_reference,
    merge_many,
    universe_matching,
)
from rebasin.permutation import check_permutation

KEY = jax.random.key(0)
# A hidden layer, and heads whose dimensions are permuted differently in each head.
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
    return merge_many(SPEC, trees, key=KEY)


def to_first(trees):
    return match_to_reference(SPEC, trees, key=KEY)


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
        check_permutation(SPEC, trees[0], permutation)
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
    result = match_to_reference(SPEC, trees, key=KEY, reference=2)
    assert rebasin.fixed_points(result.permutations[2]).total == 1.0
    expected = rebasin.weight_matching(SPEC, trees[2], trees[0], key=KEY).permutation
    assert rebasin.fixed_points(result.permutations[0], expected).total == 1.0
    with pytest.raises(ConfigError, match="reference must be one of the networks 0 to 2, got 5"):
        match_to_reference(SPEC, trees, key=KEY, reference=5)


def test_cycle_error_by_hand():
    spec = PermutationSpec.from_axes({"w": ("P",)})
    stay, turn = {"P": np.array([0, 1, 2, 3])}, {"P": np.array([1, 2, 0, 3])}
    consistent = {(0, 1): turn, (1, 2): stay, (0, 2): turn}  # 2 with 0: 2 with 1, then 1 with 0
    assert cycle_error(spec, consistent) == 0.0
    assert cycle_error(spec, consistent | {(0, 2): stay}) == 0.75
    # Given both ways, each direction is used in its own cycle: only one of the two is broken here.
    back = {(j, i): rebasin.invert(spec, p) for (i, j), p in consistent.items()}
    assert cycle_error(spec, consistent | back | {(2, 0): turn}) == 0.375
    # A fourth network in agreement with the others changes nothing.
    fourth = {(0, 3): stay, (1, 3): rebasin.invert(spec, turn), (2, 3): rebasin.invert(spec, turn)}
    assert cycle_error(spec, consistent | fourth) == 0.0


def test_cycles_through_a_universe_are_closed_whatever_the_permutations():
    tree = draw(0)
    permutations = tuple(
        jax.tree.map(np.asarray, rebasin.random_permutation(SPEC, tree, key=jax.random.key(i)))
        for i in range(4)
    )
    result = UniverseResult(permutations, np.zeros(1), 0, True)
    pairs = {(i, j): result.pairwise(SPEC, i, j) for i, j in itertools.permutations(range(4), 2)}
    assert cycle_error(SPEC, pairs) == 0.0
    independent = {
        pair: rebasin.random_permutation(SPEC, tree, key=jax.random.key(10 + n))
        for n, pair in enumerate(itertools.combinations(range(4), 2))
    }
    assert cycle_error(SPEC, independent) > 0.4


def test_cycles_need_all_pairs():
    stay = rebasin.identity_permutation(SPEC, draw(0))
    with pytest.raises(PermutationError) as info:
        cycle_error(SPEC, {(0, 1): stay, (1, 2): stay})
    assert str(info.value) == (
        "cycles need all pairs of at least three networks; got networks [0, 1, 2], missing [(0, 2)]"
    )
    with pytest.raises(PermutationError, match=r"got networks \[0, 1\]"):
        cycle_error(SPEC, {(0, 1): stay})


def test_any_method_matches_to_a_reference():
    """By name or by value, and with what the method needs."""
    trees = [draw(i) for i in range(3)]
    by_value = match_to_reference(SPEC, trees, FrankWolfeMatching(start="identity"))
    for i in (1, 2):
        expected = frank_wolfe_matching(SPEC, trees[0], trees[i], start="identity").permutation
        assert rebasin.fixed_points(by_value.permutations[i], expected).total == 1.0
    assert match_to_reference(SPEC, trees, "frank_wolfe") == match_to_reference(
        SPEC, trees, FrankWolfeMatching()
    )
    case = build_case("mlp")
    pair = [case.params_a, case.planted]
    learned = match_to_reference(
        case.spec, pair, "straight_through", key=KEY, metrics_fn=case.metrics_fn, data=case.data
    )
    chex.assert_trees_all_equal(*learned.align(case.spec, pair))
    with pytest.raises(ConfigError, match="the method 'straight_through' needs metrics_fn, data, key:"):
        match_to_reference(case.spec, pair, "straight_through", key=KEY)


def test_merges_refuse_what_cannot_work():
    trees = [draw(i) for i in range(3)]
    narrow = {**trees[1], "up": jnp.ones((6, 4))}
    with pytest.raises(TreeMismatchError, match="network 0 and network 1 differ"):
        merge([trees[0], narrow])
    with pytest.raises(ConfigError, match="merging needs at least two networks, got 1"):
        merge(trees[:1])
    with pytest.raises(ConfigError, match="max_iterations must be at least 1, got 0"):
        merge_many(SPEC, trees, key=KEY, max_iterations=0)
    broken = {**trees[2], "up": trees[2]["up"].at[0, 0].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match="network 2 is not finite:\n  up: 1 NaN"):
        merge([*trees[:2], broken])


# Two hidden layers, one of them with recurrent weights.
CHAIN = PermutationSpec.from_axes(
    {"up": (None, "P"), "across": ("P", "Q"), "recurrent": ("Q", "Q"), "down": ("Q", None), "free": (None,)}
)


def draw_chain(seed, p=4, q=3):
    rng = np.random.default_rng(seed)
    shapes = {"up": (3, p), "across": (p, q), "recurrent": (q, q), "down": (q, 2), "free": (2,)}
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


@pytest.mark.parametrize("reference", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_universe_recovers_planted_networks(reference):
    case = build_case("vit")
    keys = jax.random.split(KEY, 3)
    trees = [
        rebasin.permute(case.spec, rebasin.random_permutation(case.spec, case.params_a, key=k), case.params_a)
        for k in keys
    ]
    result = universe_matching(case.spec, trees, reference=reference)
    for aligned in result.align(case.spec, trees):
        chex.assert_trees_all_equal(aligned, trees[reference])
    assert result.objective[-1] == pytest.approx(3 * inner_product(case.params_a, case.params_a), rel=1e-6)
    moved = rebasin.permute(case.spec, result.pairwise(case.spec, 1, 2), trees[2])
    chex.assert_trees_all_equal(moved, trees[1])


def test_a_universe_is_consistent_and_reports_its_objective():
    trees = [draw_chain(i) for i in range(4)]
    result = universe_matching(CHAIN, trees)
    aligned = result.align(CHAIN, trees)
    expected = sum(inner_product(a, b) for a, b in itertools.combinations(aligned, 2))
    assert result.objective[-1] == pytest.approx(expected, rel=1e-5)
    assert (np.diff(result.objective) >= 0).all()
    pairwise = {(i, j): result.pairwise(CHAIN, i, j) for i, j in itertools.permutations(range(4), 2)}
    assert cycle_error(CHAIN, pairwise) == 0.0
    assert rebasin.fixed_points(result.permutations[0]).total == 1.0
    assert result == universe_matching(CHAIN, trees)
    assert result != universe_matching(CHAIN, trees[:3])
    again = universe_matching(CHAIN, trees, start=result.permutations)
    assert again.objective[0] == pytest.approx(result.objective[-1], rel=1e-9)


def test_two_networks_are_the_pairwise_method():
    a, b = draw_chain(0), draw_chain(1)
    match, result = frank_wolfe_matching(CHAIN, a, b), universe_matching(CHAIN, [a, b])
    np.testing.assert_array_equal(match.objective, result.objective)
    assert rebasin.fixed_points(match.permutation, result.permutations[1]).total == 1.0


def test_a_universe_refuses_what_cannot_work():
    trees = [draw_chain(i) for i in range(3)]
    identity = rebasin.identity_permutation(CHAIN, trees[0])
    with pytest.raises(ConfigError, match="a universe needs at least two networks, got 1"):
        universe_matching(CHAIN, trees[:1])
    with pytest.raises(ConfigError, match="reference must be one of the networks 0 to 2, got 3"):
        universe_matching(CHAIN, trees, reference=3)
    with pytest.raises(ConfigError, match="start must hold a permutation for each of 3 networks, got 1"):
        universe_matching(CHAIN, trees, start=[identity])
    swapped = {**identity, "P": np.array([1, 0, 2, 3])}
    with pytest.raises(
        ConfigError, match="the permutation of the reference, network 0, must be the identity"
    ):
        universe_matching(CHAIN, trees, start=[swapped, identity, identity])
    with pytest.raises(PermutationError, match="group 'P': missing"):
        universe_matching(CHAIN, trees, start=[identity, {}, identity])
    broken = {**trees[1], "free": jnp.array([jnp.inf, 0.0])}
    with pytest.raises(NonFiniteError, match="network 1 is not finite"):
        universe_matching(CHAIN, [trees[0], broken])
