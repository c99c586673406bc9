import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin.arithmetic import distance, inner_product, interpolate
from rebasin.errors import ConfigError, TreeMismatchError
from rebasin.trees import leaf_table


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = {"up": (6, 5), "across": (5, 2, 3), "down": (2, 3, 4), "batch_stats/mean": (5,)}
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    mean = flat.pop("batch_stats/mean")
    return {**flat, "batch_stats": {"mean": mean}, "step": jnp.asarray(seed)}


def test_averages():
    trees = [draw(i) for i in range(3)]
    uniform, weighted = rebasin.average(trees), rebasin.average(trees, [1, 2, 1])
    for name in ("up", "across", "down"):
        leaves = [np.asarray(tree[name], np.float64) for tree in trees]
        np.testing.assert_allclose(uniform[name], sum(leaves) / 3, rtol=1e-5, atol=1e-6)
        expected = 0.25 * leaves[0] + 0.5 * leaves[1] + 0.25 * leaves[2]
        np.testing.assert_allclose(weighted[name], expected, rtol=1e-5, atol=1e-6)
    # A leaf that is no weight comes whole from the network of the largest weight, the first of several.
    assert (uniform["step"].tolist(), weighted["step"].tolist()) == (0, 1)
    chex.assert_trees_all_equal(weighted["batch_stats"], trees[1]["batch_stats"])
    assert jax.tree.map(lambda x: x.dtype, weighted) == jax.tree.map(lambda x: x.dtype, trees[0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_the_average_of_two_is_a_point_of_the_path(alpha):
    a, b = draw(0), draw(1)
    chex.assert_trees_all_close(
        rebasin.average([a, b], [alpha, 1 - alpha]), rebasin.interpolate(a, b, alpha), rtol=1e-6
    )


def test_averages_refuse_what_cannot_work():
    trees = [draw(i) for i in range(3)]
    with pytest.raises(ConfigError, match="an average needs at least one network, got none"):
        rebasin.average([])
    for weights in ([1, 1], [1, -1, 1], [0, 0, 0], [1, np.nan, 1]):
        with pytest.raises(ConfigError, match="weights must be 3 numbers, one for each network"):
            rebasin.average(trees, weights)
    narrow = {**trees[1], "up": jnp.ones((6, 4))}
    with pytest.raises(TreeMismatchError, match=r"up: shape \(6, 5\) in network 0, \(6, 4\) in network 1"):
        rebasin.average([trees[0], narrow])


def test_interpolation_is_exact_at_both_ends_for_every_leaf():
    rng = np.random.default_rng(0)
    a, b = (
        {
            "params": {
                "w": jnp.asarray(rng.normal(size=5), jnp.float32),
                "half": jnp.ones(2, jnp.bfloat16) * k,
            },
            "batch_stats": {"mean": jnp.full(5, k)},
            "step": jnp.asarray(k),
        }
        for k in (3, 7)
    )
    for alpha, expected in ((1.0, a), (0.0, b)):
        mixed = jax.jit(interpolate)(a, b, alpha)
        jax.tree.map(np.testing.assert_array_equal, mixed, expected)
        assert jax.tree.map(jnp.result_type, mixed) == jax.tree.map(jnp.result_type, a)
    quarter = interpolate(a, b, 0.25)
    np.testing.assert_allclose(
        quarter["params"]["w"], 0.25 * a["params"]["w"] + 0.75 * b["params"]["w"], rtol=1e-6
    )
    assert quarter["step"] == 7
    assert interpolate(a, b, 0.5)["step"] == 3  # those of A from the middle on
    np.testing.assert_array_equal(quarter["batch_stats"]["mean"], b["batch_stats"]["mean"])


class Normalised(nn.Module):
    """A network whose variables have running statistics beside the weights."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))


def test_distance_and_inner_product_count_the_weights_alone():
    """Running statistics of a BatchNorm network are 1000 apart, and change neither of the two."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Normalised().init, jax.random.key(0), jnp.ones((1, 3)))
    a, b = (jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes) for _ in range(2))
    assert set(a) == {"params", "batch_stats"}
    flat_a, flat_b = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree["params"])], dtype=np.float64)
        for tree in (a, b)
    )
    a["batch_stats"] = jax.tree.map(lambda x: x + 1000, a["batch_stats"])
    np.testing.assert_allclose(distance(a, b), np.linalg.norm(flat_a - flat_b), rtol=1e-14)
    np.testing.assert_allclose(inner_product(a, b), flat_a @ flat_b, rtol=1e-13)
    assert distance(a, b, leaves=leaf_table(a)) > 1000
    assert distance(a, a) == 0.0
    assert inner_product({"step": np.arange(3)}, {"step": np.arange(3)}) == 0.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distance_and_inner_product_are_summed_in_float64(dtype):
    """In float32, a sum of 2⁵² and 2 would be 2⁵²."""
    a = {"large": jnp.array([2.0**26, 1.0], dtype), "small": jnp.full(2**20, 2.0**-10, dtype)}
    zero = jax.tree.map(jnp.zeros_like, a)
    assert inner_product(a, a) == 2.0**52 + 1.0 + 1.0
    assert distance({"w": a["small"]}, {"w": zero["small"]}) == 1.0
    assert distance({"w": jnp.array([2.0**26, 1.0], dtype)}, {"w": jnp.array([2.0**26, 0.0], dtype)}) == 1.0
    assert isinstance(distance(a, zero), float)
    assert isinstance(inner_product(a, zero), float)


@pytest.mark.parametrize("function", [distance, inner_product])
def test_distance_and_inner_product_refuse_trees_that_differ(function):
    with pytest.raises(TreeMismatchError, match=r"w: shape \(3,\) in params_a, \(1,\) in params_b"):
        function({"w": np.ones(3)}, {"w": np.ones(1)})
    with pytest.raises(TreeMismatchError, match="v: only in params_b"):
        function({"w": np.ones(3)}, {"w": np.ones(3), "v": np.ones(3)})
    half, full = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": np.ones(3)}
    assert function(half, full) == function(full, full)
