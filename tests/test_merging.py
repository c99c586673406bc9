import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin.errors import ConfigError, TreeMismatchError


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
