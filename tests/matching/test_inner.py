"""Outer groups are solved together with their inner groups, to any depth."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.arithmetic import inner_product

KEY = jax.random.key(0)


def draw(shapes, seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def planted(spec, tree, seed):
    return rebasin.permute(spec, rebasin.random_permutation(spec, tree, key=jax.random.key(seed)), tree)


def assert_recovered(spec, a, b, **options):
    match = rebasin.weight_matching(spec, a, b, key=KEY, **options)
    assert (np.diff(match.objective) >= 0).all()
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), jax.tree.map(jnp.asarray, a))


NESTED = PermutationSpec.from_axes(
    {"w": (None, "G", "H", "D"), "h": (None, "G", "H"), "g": ("G", None), "v": ("G", "H", "D", None)},
    indexed={"H": ["G"], "D": ["G", "H"]},
)


@pytest.mark.parametrize("seed", range(10))
def test_three_levels_are_the_brute_force_optimum(seed):
    """Two of two of two: 2! · 2!² · 2!⁴ permutations, and one joint solution finds the best."""
    shapes = {"w": (3, 2, 2, 2), "h": (3, 2, 2), "g": (2, 3), "v": (2, 2, 2, 3)}
    a, b = draw(shapes, seed), draw(shapes, seed + 50)
    two = [np.array(row) for row in itertools.permutations(range(2))]
    best = -np.inf
    for outer in two:
        for middle in itertools.product(two, repeat=2):
            for inner in itertools.product(two, repeat=4):
                permutation = {"G": outer, "H": np.array(middle), "D": np.array(inner).reshape(2, 2, 2)}
                best = max(best, inner_product(a, rebasin.permute(NESTED, permutation, b)))
    match = rebasin.weight_matching(NESTED, a, b, key=KEY, start="identity", restarts=0)
    np.testing.assert_allclose(match.objective[-1], best, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 2, 3), (4, 2, 3), (3, 4, 5), (8, 2, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_permutation_of_three_levels_is_recovered(sizes, seed):
    g, h, d = sizes
    a = draw({"w": (3, g, h, d), "h": (3, g, h), "g": (g, 3), "v": (g, h, d, 3)}, seed)
    assert_recovered(NESTED, a, planted(NESTED, a, seed), restarts=0)


def test_four_levels_and_two_families_below_one_group():
    """Units of units of units, beside another inner group of the same outer group."""
    spec = PermutationSpec.from_axes(
        {
            "w": ("G", "H", "D", "E", None),
            "other": (None, "G", "X"),
            "scale": ("E", "D", "H", "G"),  # the axes in another order
        },
        indexed={"H": ["G"], "D": ["G", "H"], "E": ["G", "H", "D"], "X": ["G"]},
    )
    for seed in range(5):
        a = draw({"w": (3, 2, 3, 4, 2), "other": (3, 3, 4), "scale": (4, 3, 2, 3)}, seed)
        assert_recovered(spec, a, planted(spec, a, seed), restarts=3)


def test_a_level_that_no_leaf_of_its_own_tells_apart():
    """Nothing but the innermost units differs, and the groups above are paired by them alone."""
    spec = PermutationSpec.from_axes({"w": (None, "G", "H", "D")}, indexed={"H": ["G"], "D": ["G", "H"]})
    for seed in range(5):
        a = draw({"w": (4, 3, 2, 5)}, seed)
        assert_recovered(spec, a, planted(spec, a, seed))


def group_norm(h, groups):
    z = h.reshape(len(h), groups, -1)
    z = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-6)
    return z.reshape(h.shape)


@pytest.mark.parametrize(("few", "many", "channels"), [(2, 4, 12), (4, 8, 24), (8, 16, 64)])
def test_two_group_norms_on_the_same_channels(few, many, channels):
    def apply_fn(params, x):
        h = x @ params["in"]
        h = jnp.tanh(group_norm(h, few)) @ params["a"] + jnp.tanh(group_norm(h, many)) @ params["b"]
        return jnp.tanh(h) @ params["out"]

    a = draw({"in": (3, channels), "a": (channels, 4), "b": (channels, 4), "out": (4, 2)}, 0)
    x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    spec = rebasin.infer_spec(apply_fn, a, x)
    rebasin.verify_spec(spec, apply_fn, a, x)
    sizes = spec.group_sizes(a)
    assert sizes["in#3"] == (few, many // few, channels // many)
    for seed in range(20):
        assert_recovered(spec, a, planted(spec, a, seed))


class UNet(nn.Module):
    """Group norms before and after a skip is concatenated, as in diffusion models."""

    @nn.compact
    def __call__(self, x):
        down = nn.Conv(8, (3, 3))(x)
        h = nn.relu(nn.GroupNorm(4)(down))
        h = nn.Conv(16, (3, 3), strides=(2, 2))(h)
        h = nn.Conv(8, (3, 3))(nn.relu(nn.GroupNorm(4)(h)))
        h = jnp.concatenate([jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2), down], axis=-1)
        h = nn.relu(nn.GroupNorm(8)(h))
        return nn.Dense(3)(nn.relu(nn.Conv(6, (3, 3))(h)).mean(axis=(1, 2)))


def test_a_unet_with_group_norms_before_and_after_concatenated_skips():
    model, x = UNet(), np.ones((1, 4, 4, 2), np.float32)
    shapes = jax.eval_shape(model.init, KEY, x)
    rng = np.random.default_rng(0)
    a = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    spec = rebasin.infer_spec(model.apply, a, x)
    rebasin.verify_spec(spec, model.apply, a, rng.normal(size=x.shape).astype(np.float32))
    assert max(len(outer) for _, outer in spec.indexed) >= 1
    for seed in range(5):
        assert_recovered(spec, a, planted(spec, a, seed))
