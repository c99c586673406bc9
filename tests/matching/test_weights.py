import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case, count_compilations
from hypothesis import given, settings
from hypothesis import strategies as st

import rebasin
from rebasin import PermutationSpec
from rebasin.arithmetic import inner_product
from rebasin.errors import ConfigError, NonFiniteError, PermutationError, SpecMismatchError, TreeMismatchError
from rebasin.matching import ascent, weights
from rebasin.matching.ascent import lay_out
from rebasin.matching.blocks import pair_blocks
from rebasin.matching.weights import WeightMatching
from rebasin.trees import leaf_table

KEY = jax.random.key(0)


def chain_spec(num_hidden):
    sides = [None, *(f"P{i}" for i in range(num_hidden)), None]
    table = {}
    for i, (into, out) in enumerate(itertools.pairwise(sides)):
        table |= {f"Dense_{i}/kernel": (into, out), f"Dense_{i}/bias": (out,)}
    return PermutationSpec.from_axes(table)


def chain_tree(seed, widths):
    rng = np.random.default_rng(seed)
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.normal(size=(m, n)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=n), jnp.float32),
        }
        for i, (m, n) in enumerate(itertools.pairwise(widths))
    }


def permutations_of(sizes):
    for rows in itertools.product(*(itertools.permutations(range(n)) for n in sizes.values())):
        yield {group: np.array(row) for group, row in zip(sizes, rows, strict=True)}


@pytest.mark.parametrize("start", ["depth", "identity"])
@pytest.mark.parametrize("seed", range(20))
def test_planted_permutation_of_one_hidden_layer_is_recovered_exactly(seed, start):
    spec, a = chain_spec(1), chain_tree(seed, [8, 32, 4])
    planted = rebasin.random_permutation(spec, a, key=jax.random.key(seed))
    b = rebasin.permute(spec, planted, a)
    match = rebasin.weight_matching(spec, a, b, key=KEY, start=start)
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)
    assert match.converged
    np.testing.assert_allclose(match.objective[-1], inner_product(a, a), rtol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_planted_permutation_of_a_deep_chain_is_recovered_from_the_depth_start(seed):
    spec, a = chain_spec(5), chain_tree(seed, [8, 64, 64, 64, 64, 64, 4])
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)
    assert match.num_iterations == 1  # nothing is left to do after the first pass


@given(st.integers(0, 10**6))
@settings(max_examples=8)
def test_no_single_group_can_do_better(seed):
    """At convergence every group is optimal given the others."""
    spec, a, b = chain_spec(2), chain_tree(seed, [3, 4, 3, 2]), chain_tree(seed + 1, [3, 4, 3, 2])
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    reached = inner_product(a, rebasin.permute(spec, match.permutation, b))
    np.testing.assert_allclose(match.objective[-1], reached, rtol=1e-5)
    assert match.converged
    for group, size in spec.group_sizes(a).items():
        for row in itertools.permutations(range(size)):
            other = inner_product(a, rebasin.permute(spec, match.permutation | {group: np.array(row)}, b))
            assert other <= reached + 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_an_ascent_from_where_another_ended_finds_nothing(seed):
    spec, widths = chain_spec(3), [4, 30, 30, 30, 3]
    a, b = chain_tree(seed, widths), chain_tree(seed + 100, widths)
    match = rebasin.weight_matching(spec, a, b, key=KEY, start="identity", restarts=0)
    assert match.num_iterations > 1
    again = rebasin.weight_matching(spec, a, b, key=KEY, start=match.permutation, restarts=0)
    assert rebasin.fixed_points(again.permutation, match.permutation).total == 1.0


def test_the_identity_stands_in_where_the_order_of_depth_leads_astray():
    """The first layer, tiny and in another order, misleads the pass; all else says that B is A."""
    spec, a = chain_spec(2), chain_tree(0, [4, 30, 30, 3])
    a["Dense_0"] = jax.tree.map(lambda x: 1e-3 * x, a["Dense_0"])
    b = {**a, "Dense_0": jax.tree.map(lambda x: x[..., ::-1], a["Dense_0"])}
    match = rebasin.weight_matching(spec, a, b, key=KEY, restarts=0)
    assert match.stats["start"] == "identity"
    np.testing.assert_allclose(match.objective[-1], inner_product(a, b), rtol=1e-9)


def test_the_objective_is_summed_in_float64():
    """2²⁴ + 3 has no float32."""
    tree = {"bias": np.array([2**12, 1, 1, 1], np.float32)}
    match = rebasin.weight_matching(PermutationSpec.from_axes({"bias": ("P0",)}), tree, tree, key=KEY)
    assert match.objective[-1] == 2**24 + 3


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_one_hidden_layer_is_the_brute_force_optimum(seed):
    spec, a, b = chain_spec(1), chain_tree(seed, [3, 4, 2]), chain_tree(seed + 1, [3, 4, 2])
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    best = max(inner_product(a, rebasin.permute(spec, p, b)) for p in permutations_of(spec.group_sizes(a)))
    np.testing.assert_allclose(match.objective[-1], best, rtol=1e-5)


@pytest.mark.parametrize("start", ["depth", "identity"])
@pytest.mark.parametrize("seed", range(5))
def test_objective_never_falls_and_is_the_inner_product(seed, start):
    spec, a, b = (
        chain_spec(4),
        chain_tree(seed, [6, 40, 30, 20, 10, 3]),
        chain_tree(seed + 100, [6, 40, 30, 20, 10, 3]),
    )
    match = rebasin.weight_matching(spec, a, b, key=KEY, start=start)
    assert (np.diff(match.objective) >= 0).all()
    assert len(match.objective) == match.num_iterations + 1
    assert match.objective[-1] >= inner_product(a, b)  # never worse than not permuting
    moved = rebasin.permute(spec, match.permutation, b)
    np.testing.assert_allclose(match.objective[-1], inner_product(a, moved), rtol=1e-5)
    # The closed form of the docstring: the distance falls as the objective rises.
    distance = sum(
        float(((np.asarray(x, np.float64) - y) ** 2).sum())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(moved), strict=True)
    )
    expected = inner_product(a, a) + inner_product(b, b) - 2 * match.objective[-1]
    np.testing.assert_allclose(distance, expected, rtol=1e-5)


def test_group_on_two_axes_of_a_leaf():
    """A recurrent kernel: the objective is quadratic in the group, and still never falls."""
    spec = PermutationSpec.from_axes({"w": (None, "P"), "recurrent": ("P", "P"), "v": ("P", None)})
    for seed in range(10):
        rng = np.random.default_rng(seed)
        a, b = (
            {
                "w": rng.normal(size=(2, 5)),
                "recurrent": 3 * rng.normal(size=(5, 5)),
                "v": rng.normal(size=(5, 2)),
            }
            for _ in "ab"
        )
        a, b = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (a, b))
        match = rebasin.weight_matching(spec, a, b, key=KEY)
        assert (np.diff(match.objective) >= 0).all()
        moved = rebasin.permute(spec, match.permutation, b)
        np.testing.assert_allclose(match.objective[-1], inner_product(a, moved), rtol=1e-5)


def test_segments_and_factors_are_matched():
    spec = PermutationSpec.from_axes(
        {
            "left": (None, "P0"),
            "right": (None, "P1"),
            "joined": (
                rebasin.Axis.concatenate(rebasin.Axis.product(3, ("P0", 6)), rebasin.Axis.product(("P1", 5))),
                None,
            ),
        }
    )
    rng = np.random.default_rng(0)
    a = {
        "left": rng.normal(size=(2, 6)),
        "right": rng.normal(size=(2, 5)),
        "joined": rng.normal(size=(23, 4)),
    }
    a = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), a)
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=KEY), a)
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)


def test_heads_of_fused_projections_are_matched():
    """Queries, keys and values head by head: each block is a strided part of the kernel."""
    case = build_case("fused")
    assert [str(axis) for axis in case.spec.table["params/Dense_0/kernel"]][1].count("+") == 4
    match = rebasin.weight_matching(case.spec, case.params_a, case.planted, key=KEY)
    chex.assert_trees_all_equal(
        rebasin.permute(case.spec, match.permutation, case.planted),
        jax.tree.map(jnp.asarray, case.params_a),
    )


def test_deterministic_for_a_key():
    spec, a, b = chain_spec(3), chain_tree(0, [6, 20, 20, 20, 3]), chain_tree(1, [6, 20, 20, 20, 3])
    first, second = (rebasin.weight_matching(spec, a, b, key=KEY) for _ in range(2))
    assert first == second
    assert first != rebasin.weight_matching(spec, a, a, key=KEY)


def test_a_result_is_a_tree_without_its_timings():
    spec, a = chain_spec(1), chain_tree(0, [3, 6, 2])
    first, second = (rebasin.weight_matching(spec, a, a, key=KEY) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.map(lambda leaf: leaf, first) == first
    assert first.stats["assignments"] > 0


def test_equal_networks_stay():
    spec, a = chain_spec(3), chain_tree(0, [6, 20, 20, 20, 3])
    match = rebasin.weight_matching(spec, a, a, key=KEY)
    assert rebasin.fixed_points(match.permutation).total == 1.0
    assert match.converged


@pytest.mark.parametrize("start", ["depth", "identity"])
def test_zeros_and_ties_and_width_one(start):
    spec = chain_spec(2)
    zeros = jax.tree.map(jnp.zeros_like, chain_tree(0, [3, 6, 1, 2]))
    match = rebasin.weight_matching(spec, zeros, zeros, key=KEY, start=start)
    assert match.converged
    assert match.objective.tolist() == [0.0] * (match.num_iterations + 1)
    ones = jax.tree.map(jnp.ones_like, zeros)
    assert rebasin.weight_matching(spec, ones, ones, key=KEY, start=start).converged


def test_state_does_not_count():
    """Running statistics move with their units but do not decide which."""
    spec = PermutationSpec.from_axes({"batch_stats/mean": ("P",), "params/w": (None, "P"), "step": ()})
    a = {
        "params": {"w": jnp.array([[1.0, 2.0, 3.0]])},
        "batch_stats": {"mean": jnp.array([9.0, 9.0, 0.0])},
        "step": jnp.array(3),
    }
    b = {
        "params": {"w": jnp.array([[3.0, 2.0, 1.0]])},
        "batch_stats": {"mean": jnp.array([9.0, 9.0, jnp.nan])},
        "step": jnp.array(4),
    }
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    assert match.permutation["P"].tolist() == [2, 1, 0]
    everything = rebasin.weight_matching(
        spec, a, a, key=KEY, roles={"": "constant", "batch_stats/mean": "weight"}
    )
    assert everything.objective[-1] == 162.0


def test_a_given_start_and_its_limit_on_iterations():
    spec, a, b = chain_spec(3), chain_tree(0, [6, 20, 20, 20, 3]), chain_tree(1, [6, 20, 20, 20, 3])
    start = rebasin.random_permutation(spec, a, key=KEY)
    match = rebasin.weight_matching(spec, a, b, key=KEY, start=start, max_iterations=1, restarts=0)
    np.testing.assert_allclose(
        match.objective[0], inner_product(a, rebasin.permute(spec, start, b)), rtol=1e-6
    )
    assert (match.num_iterations, match.converged, match.stats["start"]) == (1, False, "given")
    again = rebasin.weight_matching(spec, a, b, key=KEY, start=match.permutation)
    assert again.objective[0] == pytest.approx(match.objective[-1])
    with pytest.raises(PermutationError, match=r"group 'P0': missing"):
        rebasin.weight_matching(spec, a, b, key=KEY, start={})


def test_bad_input_is_refused():
    spec, a = chain_spec(1), chain_tree(0, [3, 4, 2])
    with pytest.raises(
        TreeMismatchError, match=r"Dense_0/kernel: shape \(3, 4\) in params_a, \(3, 8\) in params_b"
    ):
        rebasin.weight_matching(spec, a, chain_tree(0, [3, 8, 2]), key=KEY)
    broken = jax.tree.map(lambda x: x, a)
    broken["Dense_0"]["kernel"] = a["Dense_0"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(NonFiniteError) as info:
        rebasin.weight_matching(spec, a, broken, key=KEY)
    assert str(info.value) == "params_b is not finite:\n  Dense_0/kernel: 1 NaN and 0 infinite of 12 values"
    with pytest.raises(SpecMismatchError, match="the spec does not fit params_a"):
        rebasin.weight_matching(chain_spec(2), a, a, key=KEY)
    with pytest.raises(
        ConfigError, match=r"unknown start 'random'; known: 'depth', 'identity', or a permutation"
    ):
        rebasin.weight_matching(spec, a, a, key=KEY, start="random")
    with pytest.raises(ConfigError, match="max_iterations must be at least 1, got 0"):
        rebasin.weight_matching(spec, a, a, key=KEY, max_iterations=0)


def test_groups_of_one_width_share_one_compiled_program():
    """Whatever their leaves are, in whichever pass, and a second network adds none.

    No other test has groups of 37 units, so nothing is compiled beforehand.
    """
    rebasin.weight_matching(chain_spec(1), *(chain_tree(seed, [6, 7, 3]) for seed in (0, 1)), key=KEY)
    widths = [6, 37, 37, 37, 37, 37, 3]
    a, b = chain_tree(0, widths), chain_tree(1, widths)
    with count_compilations() as first:
        rebasin.weight_matching(chain_spec(5), a, b, key=KEY)
    assert len(first) <= 1  # none if another test has compiled for this width before
    c, d = (chain_tree(seed, [9, 37, 37, 2]) for seed in (0, 1))
    with count_compilations() as second:
        rebasin.weight_matching(chain_spec(2), c, d, key=KEY)
    assert len(second) == 0


def attention_spec():
    """Projections of one attention layer between residual streams, with head dimensions by head."""
    return PermutationSpec.from_axes(
        {
            "embed": (None, "R"),
            "query": ("R", "H", "QK"),
            "key": ("R", "H", "QK"),
            "key_bias": (rebasin.Axis.product(("H", 3), ("QK", 4)),),
            "value": ("VO", "R", "H"),  # the inner group before the head
            "out": ("H", "VO", "R"),
            "gate": ("H",),
            "unembed": ("R", None),
        },
        indexed={"QK": ["H"], "VO": ["H"]},
    )


def attention_tree(seed):
    shapes = {
        "embed": (9, 6),
        "query": (6, 3, 4),
        "key": (6, 3, 4),
        "key_bias": (12,),
        "value": (5, 6, 3),
        "out": (3, 5, 6),
    }
    shapes |= {"gate": (3,), "unembed": (6, 7)}
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}


@pytest.mark.parametrize("start", ["depth", "identity"])
@pytest.mark.parametrize("seed", range(10))
def test_planted_heads_and_their_inner_groups_are_recovered(seed, start):
    spec, a = attention_spec(), attention_tree(seed)
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
    match = rebasin.weight_matching(spec, a, b, key=KEY, start=start)
    assert (np.diff(match.objective) >= 0).all()
    np.testing.assert_allclose(
        match.objective[-1], inner_product(a, rebasin.permute(spec, match.permutation, b)), rtol=1e-5
    )
    if start == "depth":
        chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)


def test_heads_are_paired_by_their_best_inner_match():
    """Three heads of three dimensions: brute force over 3! · (3!)³ permutations."""
    spec = PermutationSpec.from_axes(
        {"up": (None, "H", "D"), "down": ("H", "D", None), "gate": ("H",)}, indexed={"D": ["H"]}
    )
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a, b = (
            {"up": rng.normal(size=(2, 3, 3)), "down": rng.normal(size=(3, 3, 2)), "gate": rng.normal(size=3)}
            for _ in range(2)
        )
        rows = list(itertools.permutations(range(3)))
        scores = {}
        for h, k in itertools.product(
            range(3), repeat=2
        ):  # A's head h against B's head k, inner units by brute force
            inside = max(
                sum(
                    a["up"][:, h, i] @ b["up"][:, k, row[i]] + a["down"][h, i] @ b["down"][k, row[i]]
                    for i in range(3)
                )
                for row in rows
            )
            scores[h, k] = inside + a["gate"][h] * b["gate"][k]
        best = max(sum(scores[h, row[h]] for h in range(3)) for row in rows)
        a, b = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (a, b))
        match = rebasin.weight_matching(spec, a, b, key=KEY, start="identity")
        np.testing.assert_allclose(match.objective[-1], best, rtol=1e-5)


def test_outer_groups_of_outer_groups_are_recovered():
    """Stacked layers that stay, heads by layer, head dimensions by both, and a second outer group between."""
    spec = PermutationSpec.from_axes(
        {
            "up": ("layer", None, "H", "D"),
            "down": ("D", "H", "layer", None),
            "both": ("layer", "G", "H", "D2", None),
            "gate": ("layer", "H"),
            "g": ("G", None),
        },
        indexed={"H": ["layer"], "D": ["layer", "H"], "D2": ["layer", "G", "H"]},
        fixed=["layer"],
    )
    shapes = {"up": (2, 5, 3, 4), "down": (4, 3, 2, 5), "both": (2, 3, 3, 4, 2), "gate": (2, 3), "g": (3, 4)}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
        b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
        match = rebasin.weight_matching(spec, a, b, key=KEY)
        assert (np.diff(match.objective) >= 0).all()
        chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)


def problem_of(spec, a, b, **options):
    """What weight matching lays out for two networks."""
    leaves = {path: (leaf, leaf_table(b)[path]) for path, leaf in leaf_table(a).items()}
    return lay_out(spec, pair_blocks(spec, leaves, {}), rebasin.identity_permutation(spec, a), **options)


@pytest.mark.parametrize("widths", [[2, *[24] * 6, 2], [2, 48, 2, 48, 2]])
def test_kept_similarities_take_no_more_than_the_two_networks(widths, monkeypatch):
    """The float64 similarities of wide layers are larger than their float32 kernels together."""
    spec, a, b = chain_spec(len(widths) - 2), chain_tree(0, widths), chain_tree(1, widths)
    networks = sum(leaf.nbytes for leaf in jax.tree.leaves((a, b)))
    sizes = {group: 8 * size**2 for group, size in spec.group_sizes(a).items()}
    kept = problem_of(spec, a, b).kept
    assert 0 < sum(sizes[group] for group in kept) <= networks < sum(sizes.values())

    limited = rebasin.weight_matching(spec, a, b, key=KEY)
    monkeypatch.setattr(weights, "lay_out", functools.partial(lay_out, memory=np.inf))
    assert problem_of(spec, a, b, memory=np.inf).kept == set(spec.groups)
    chex.assert_trees_all_equal(rebasin.weight_matching(spec, a, b, key=KEY).permutation, limited.permutation)
    monkeypatch.setattr(weights, "lay_out", functools.partial(lay_out, memory=0))
    chex.assert_trees_all_equal(rebasin.weight_matching(spec, a, b, key=KEY).permutation, limited.permutation)


@pytest.mark.parametrize("case", ["chain", "attention", "recurrent"])
def test_rows_gathered_on_the_device_give_the_same_match(case, monkeypatch):
    """The form for accelerators, which the CPU can run too: similarities agree up to rounding."""
    if case == "chain":
        widths = [40, 64, 64, 48, 5]
        spec, a, b = chain_spec(3), chain_tree(0, widths), chain_tree(1, widths)
    elif case == "attention":
        spec, a, b = attention_spec(), attention_tree(0), attention_tree(1)
    else:
        spec = PermutationSpec.from_axes({"w": (None, "P"), "recurrent": ("P", "P"), "v": ("P", None)})
        a, b = (
            {"w": rng.normal(size=(2, 5)), "recurrent": rng.normal(size=(5, 5)), "v": rng.normal(size=(5, 2))}
            for rng in map(np.random.default_rng, range(2))
        )
    host = rebasin.weight_matching(spec, a, b, key=KEY, restarts=3)
    monkeypatch.setattr(ascent, "gathers_on_device", lambda: True)
    assert problem_of(spec, a, b).stacks
    device = rebasin.weight_matching(spec, a, b, key=KEY, restarts=3)
    chex.assert_trees_all_equal(device.permutation, host.permutation)
    np.testing.assert_allclose(device.objective, host.objective, rtol=1e-6)


def test_options_are_a_value():
    method = WeightMatching(restarts=3, leaf_weights={"Dense_0/bias": 2.0})
    assert method == WeightMatching(restarts=3, leaf_weights=(("Dense_0/bias", 2.0),))
    assert len({method, WeightMatching(restarts=3, leaf_weights={"Dense_0/bias": 2.0})}) == 1
    assert repr(method) == "WeightMatching(restarts=3, leaf_weights=(('Dense_0/bias', 2.0),))"
    assert repr(WeightMatching(roles={})) == "WeightMatching()"
    spec, a, b = chain_spec(2), chain_tree(0, [6, 20, 20, 3]), chain_tree(1, [6, 20, 20, 3])
    by_function = rebasin.weight_matching(spec, a, b, key=KEY, restarts=3, leaf_weights={"Dense_0/bias": 2.0})
    assert method.match(spec, a, b, key=KEY) == by_function
    with pytest.raises(ConfigError) as info:
        rebasin.weight_matching(spec, a, b, key=KEY, max_sweeps=3, kernel="cosine")
    assert str(info.value).splitlines() == [
        "the method 'weights' takes roles, start, max_iterations, restarts, leaf_weights:",
        "  max_sweeps: not known",
        "  kernel: not known",
    ]
    with pytest.raises(ConfigError, match=r"the method 'weights' needs key:\n  key: missing"):
        method.match(spec, a, b)


@pytest.mark.parametrize("exponent", [-100, -66, -40, 40, 66, 120])
def test_the_scale_of_the_networks_does_not_matter(exponent):
    """Products of weights of 1e-20 underflow in float32, and those of 1e20 overflow."""
    spec, widths = chain_spec(2), [6, 20, 16, 3]
    a, b = chain_tree(0, widths), chain_tree(1, widths)
    plain = rebasin.weight_matching(spec, a, b, key=KEY, restarts=3)
    scaled = (jax.tree.map(lambda x: np.ldexp(np.asarray(x), exponent), tree) for tree in (a, b))
    match = rebasin.weight_matching(spec, *scaled, key=KEY, restarts=3)
    chex.assert_trees_all_equal(match.permutation, plain.permutation)
    np.testing.assert_allclose(match.objective, np.ldexp(plain.objective, 2 * exponent), rtol=1e-12)
