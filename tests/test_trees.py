import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebasin.errors import NonFiniteError, SpecError, TreeMismatchError
from rebasin.trees import (
    check_finite,
    check_same_shapes,
    distance,
    inner_product,
    interpolate,
    is_weight,
    leaf_table,
)


def test_two_leaves_of_one_name():
    with pytest.raises(SpecError, match=r"two leaves of the tree are both named 'a/b'"):
        leaf_table({"a": {"b": 1}, "a/b": 2})


@pytest.mark.parametrize(
    ("path", "dtype", "expected"),
    [
        ("params/Dense_0/kernel", jnp.float32, True),
        ("params/Dense_0/kernel", jnp.bfloat16, True),
        ("params/count", jnp.int32, False),
        ("batch_stats/BatchNorm_0/mean", jnp.float32, False),
        ("opt_state/0/trace/kernel", jnp.float32, False),
        ("batch_stats_like/kernel", jnp.float32, True),
    ],
)
def test_what_counts_as_a_weight(path, dtype, expected):
    assert is_weight(path, jnp.zeros(3, dtype)) is expected


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
    assert distance(a, b, predicate=lambda path, leaf: True) > 1000
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


def test_every_difference_is_listed():
    a = {"w": jnp.zeros((3, 8)), "b": jnp.zeros(8), "only_a": jnp.zeros(1), "same": jnp.zeros(2)}
    b = {
        "w": jnp.zeros((3, 16)),
        "b": jnp.zeros(8, jnp.bfloat16),
        "only_b": jnp.zeros(1),
        "same": jnp.ones(2),
    }
    with pytest.raises(TreeMismatchError) as info:
        check_same_shapes(a, b)
    assert str(info.value).splitlines() == [
        "params_a and params_b differ:",
        "  only_a: only in params_a",
        "  only_b: only in params_b",
        "  b: dtype float32 in params_a, bfloat16 in params_b",
        "  w: shape (3, 8) in params_a, (3, 16) in params_b",
    ]


def test_every_leaf_that_is_not_finite_is_listed():
    tree = {
        "a": jnp.array([1.0, jnp.nan, jnp.inf, jnp.nan]),
        "b": jnp.ones(2),
        "c": jnp.array([-jnp.inf]),
        "n": 3 * jnp.ones(1, int),
    }
    with pytest.raises(NonFiniteError) as info:
        check_finite(tree, "params_b")
    assert str(info.value).splitlines() == [
        "params_b is not finite:",
        "  a: 2 NaN and 1 infinite of 4 values",
        "  c: 0 NaN and 1 infinite of 1 values",
    ]
    check_finite({"b": jnp.ones(2)}, "params_a")
    check_finite(tree, "params_b", predicate=lambda path, leaf: path in "bn")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_anywhere_and_large_ones_are_not(value):
    largest = np.full((50, 33), np.finfo(np.float32).max, np.float32)  # their sum would overflow
    check_finite({"w": jnp.asarray(largest)}, "data")
    for at in ((0, 0), (7, 31), (49, 32)):
        leaf = largest.copy()
        leaf[at] = value
        with pytest.raises(NonFiniteError, match=r"w: . NaN and . infinite of 1650 values"):
            check_finite({"w": jnp.asarray(leaf)}, "data")
