"""Which weights are pruned: counts, magnitudes, ties, random draws, and masks that travel."""

from fractions import Fraction

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case, random_tree

import rebasin
from rebasin.errors import ConfigError, NonFiniteError, TreeMismatchError
from rebasin.masks import apply_mask, full_mask, sparsity_report
from rebasin.models import build_model
from rebasin.permutation import invert, random_permutation
from rebasin.pruning import (
    count_kept,
    edge_leaves,
    level_sparsity,
    magnitude_mask,
    prunable_leaves,
    random_mask,
)
from rebasin.trees import leaf_table

TREE = random_tree(u=(4, 6), v=(6, 5), bias=(6,))


def kept(mask, leaves=None):
    return sparsity_report(mask, leaves).total.kept


def test_a_level_keeps_powers_of_four_fifths_rounded_down():
    for level in range(25):
        assert count_kept(101_770, level_sparsity(level)) == 101_770 * 4**level // 5**level
    assert level_sparsity(3, fraction=0.5) == Fraction(7, 8)
    # Binary floating point would round the product 10 · (1 − 0.9) to 0.99…
    assert count_kept(10, 0.9) == 1


@pytest.mark.parametrize("value", [1, 1.0, -0.1, float("nan"), float("inf"), Fraction(7, 5)])
def test_a_sparsity_outside_its_range(value):
    for prune in (
        lambda: magnitude_mask(TREE, value),
        lambda: random_mask(TREE, value, key=jax.random.key(0)),
    ):
        with pytest.raises(ConfigError) as info:
            prune()
        assert str(info.value) == f"sparsity: wanted at least 0 and less than 1, got {value}"
    with pytest.raises(ConfigError, match="fraction: wanted at least 0 and less than 1, got"):
        level_sparsity(2, fraction=value)


def test_a_negative_level():
    with pytest.raises(ConfigError, match="level: wanted at least 0, got -1"):
        level_sparsity(-1)


def test_fewer_weights_than_leaves():
    message = "sparsity: 0.981986 keeps 0 of the 54 weights of 2 leaves; wanted at least one weight per leaf"
    with pytest.raises(ConfigError) as info:
        magnitude_mask(TREE, level_sparsity(18))
    assert str(info.value) == message
    assert kept(magnitude_mask(TREE, level_sparsity(14)), ["u", "v"]) == 2
    # Layer by layer the smaller leaf is the first to have none left.
    with pytest.raises(ConfigError, match="keeps 0 of the 24 weights of u"):
        magnitude_mask(TREE, level_sparsity(15), layerwise=True)


def test_kernels_are_pruned_and_nothing_else():
    def shapes(name):
        model = build_model(name, width=8, num_classes=10)
        return jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))

    for name in ("mlp", "resnet20_batchnorm", "vgg16", "vit"):
        table = leaf_table(shapes(name))
        assert prunable_leaves(table) == tuple(sorted(p for p in table if p.endswith("/kernel")))
    assert prunable_leaves({"layer.weight": np.ones((2, 2)), "attn.in_proj_bias": np.ones((2, 2))}) == (
        "layer.weight",
    )


def test_leaves_that_are_left_out():
    assert prunable_leaves(TREE, exclude=["u"]) == ("v",)
    assert prunable_leaves(TREE, roles={"v": "constant"}) == ("u",)
    with pytest.raises(ConfigError, match="no leaf 'w'"):
        prunable_leaves(TREE, exclude=["w"])
    with pytest.raises(ConfigError, match="no leaf is left to prune"):
        prunable_leaves(TREE, exclude=["*"])
    for prune in (magnitude_mask, lambda *args, **rest: random_mask(*args, key=jax.random.key(0), **rest)):
        with pytest.raises(ConfigError, match="no leaf 'w'"):
            prune(TREE, 0.5, leaves=["u", "w"])
        with pytest.raises(ConfigError, match="wanted at least one leaf to prune, got none"):
            prune(TREE, 0.5, leaves=[])


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("mlp", {"params/Dense_0/kernel", "params/Dense_2/kernel"}),
        pytest.param("resnet", {"params/Conv_0/kernel", "params/Dense_0/kernel"}, marks=pytest.mark.slow),
    ],
)
def test_edges_are_the_first_and_the_last_layer(name, edges):
    case = build_case(name)
    assert set(edge_leaves(case.spec, case.params_a)) == edges


# A few shapes only, as each is compiled for.
SHAPES = [[(1, 1)], [(2, 3), (3, 1)], [(4, 5)], [(1, 6), (6, 6), (6, 2)]]


@st.composite
def trees(draw):
    """A tree of a few kernels, in which equal magnitudes are common or absent."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.sampled_from(SHAPES))
    tied = draw(st.booleans())
    dtype = draw(st.sampled_from(["float32", "bfloat16", "complex64"]))

    def values(shape):
        found = rng.integers(-2, 3, shape) if tied else rng.normal(size=shape)
        return jnp.asarray(found, dtype)

    return {f"k{i}": values(shape) for i, shape in enumerate(shapes)} | {"bias": values((3,))}


def pruned_by_sorting(tree, sparsity, within=None):
    """A stable sort of all magnitudes, from which the first are dropped."""
    paths = [path for path in sorted(tree) if path != "bias"]
    values = np.concatenate([np.abs(np.asarray(tree[p], np.complex128)).ravel() for p in paths])
    if within is not None:
        values[~np.concatenate([within[p].ravel() for p in paths])] = -1
    count = int(len(values) * (1 - Fraction(sparsity)))
    flags = np.zeros(len(values), bool)
    flags[np.argsort(values, kind="stable")[len(values) - count :]] = True
    parts = np.split(flags, np.cumsum([tree[p].size for p in paths])[:-1])
    mask = {p: part.reshape(tree[p].shape) for p, part in zip(paths, parts, strict=True)}
    return mask | {"bias": np.ones(3, bool)}


@hypothesis.given(trees(), st.integers(0, 4), st.integers(0, 3))
@hypothesis.settings(max_examples=40)
def test_global_magnitude_is_a_stable_sort(tree, level, further):
    size = sum(leaf.size for path, leaf in tree.items() if path != "bias")
    hypothesis.assume(count_kept(size, level_sparsity(level + further)) >= len(tree) - 1)
    mask = magnitude_mask(tree, level_sparsity(level))
    chex.assert_trees_all_equal(mask, pruned_by_sorting(tree, level_sparsity(level)))
    chex.assert_trees_all_equal_shapes(mask, tree)

    later = magnitude_mask(
        apply_mask(mask, tree), level_sparsity(level + further), within=mask, leaves=prunable_leaves(tree)
    )
    chex.assert_trees_all_equal(later, pruned_by_sorting(tree, level_sparsity(level + further), mask))
    assert all(not (later[path] & ~mask[path]).any() for path in tree)
    # In one step the same weights are pruned as in two, as long as they are not trained between.
    chex.assert_trees_all_equal(later, magnitude_mask(tree, level_sparsity(level + further)))


@hypothesis.given(trees(), st.fractions(0, Fraction(4, 5)), st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=20)
def test_counts_of_random_and_layerwise_masks(tree, sparsity, seed):
    sizes = {path: leaf.size for path, leaf in tree.items() if path != "bias"}
    hypothesis.assume(all(count_kept(size, sparsity) >= 1 for size in sizes.values()))
    key = jax.random.key(seed)
    for mask in (magnitude_mask(tree, sparsity), random_mask(tree, sparsity, key=key)):
        assert kept(mask, list(sizes)) == count_kept(sum(sizes.values()), sparsity)
        assert mask["bias"].all()
    for mask in (
        magnitude_mask(tree, sparsity, layerwise=True),
        random_mask(tree, sparsity, key=key, layerwise=True),
    ):
        for path, size in sizes.items():
            assert kept(mask, [path]) == count_kept(size, sparsity)
    for path in sizes:  # each leaf by itself is a network of one leaf
        alone = magnitude_mask({path: tree[path]}, sparsity)[path]
        np.testing.assert_array_equal(magnitude_mask(tree, sparsity, layerwise=True)[path], alone)


def test_random_masks_follow_their_key_and_nest():
    first, again, other = (random_mask(TREE, 0.5, key=jax.random.key(i)) for i in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first["u"], other["u"])
    inner = random_mask(TREE, 0.75, key=jax.random.key(2), within=first)
    assert kept(inner, ["u", "v"]) == 54 // 4
    assert all(not (inner[path] & ~first[path]).any() for path in TREE)
    # Every weight has the same chance: 100 draws of a half, whose standard deviation is 5.
    draws = sum(random_mask(TREE, 0.5, key=jax.random.key(i))["u"].astype(int) for i in range(100))
    assert np.abs(draws - 50).max() < 30


def test_containers_and_names_do_not_matter_to_ties():
    flat = {"v": np.ones((2, 2)), "u": np.ones((2, 2))}
    assert magnitude_mask(flat, 0.5)["u"].sum() == 0
    listed = [np.ones((2, 2)) for _ in range(11)]  # "10" comes before "2"
    named = {str(i): leaf for i, leaf in enumerate(listed)}
    masks = magnitude_mask(listed, 0.5), magnitude_mask(named, 0.5)
    chex.assert_trees_all_equal({str(i): leaf for i, leaf in enumerate(masks[0])}, masks[1])


def test_a_mask_within_which_too_little_is_left():
    narrow = magnitude_mask(TREE, 0.9)
    with pytest.raises(ConfigError) as info:
        magnitude_mask(TREE, 0.5, within=narrow)
    assert str(info.value) == (
        "within: wanted at least 27 of the 54 weights of 2 leaves, for a sparsity of 0.5, got 5"
    )
    with pytest.raises(TreeMismatchError, match="u: only in the network"):
        magnitude_mask(TREE, 0.5, within={"v": narrow["v"], "bias": narrow["bias"]})


def test_weights_that_are_not_finite():
    broken = TREE | {"u": TREE["u"].at[0, 0].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match="the network to prune is not finite"):
        magnitude_mask(broken, 0.5)
    assert magnitude_mask(broken, 0.5, leaves=["v"])["u"].all()


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "fused"))]
)
def test_masks_travel_with_the_units(name):
    """Masking and permuting commute, and a planted permutation carries A's mask to B's own."""
    case = build_case(name)
    spec, leaves = case.spec, prunable_leaves(case.params_a)
    planted = random_permutation(spec, case.params_a, key=jax.random.key(1))
    for level, layerwise in ((4, False), (2, True)):
        mask = magnitude_mask(case.params_a, level_sparsity(level), layerwise=layerwise)
        moved = rebasin.permute(spec, planted, mask)
        chex.assert_trees_all_equal(
            apply_mask(moved, rebasin.permute(spec, planted, case.params_a)),
            rebasin.permute(spec, planted, apply_mask(mask, case.params_a)),
        )
        assert sparsity_report(moved, leaves) == sparsity_report(mask, leaves)
        own = magnitude_mask(case.planted, level_sparsity(level), layerwise=layerwise)
        chex.assert_trees_all_equal(moved, own)
        back = rebasin.permute(spec, invert(spec, planted), own)
        chex.assert_trees_all_equal(back, mask)
    assert all(np.asarray(leaf).dtype == bool for leaf in jax.tree.leaves(moved))


def test_level_zero_prunes_nothing():
    chex.assert_trees_all_equal(magnitude_mask(TREE, level_sparsity(0)), full_mask(TREE))
