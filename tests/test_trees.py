import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebasin.errors import NonFiniteError, SpecError, TreeMismatchError
from rebasin.trees import check_finite, check_same_shapes, interpolate, is_weight, leaf_table


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
    np.testing.assert_array_equal(quarter["batch_stats"]["mean"], b["batch_stats"]["mean"])


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_anywhere_and_large_ones_are_not(value):
    largest = np.full((50, 33), np.finfo(np.float32).max, np.float32)  # their sum would overflow
    check_finite({"w": jnp.asarray(largest)}, "data")
    for at in ((0, 0), (7, 31), (49, 32)):
        leaf = largest.copy()
        leaf[at] = value
        with pytest.raises(NonFiniteError, match=r"w: . NaN and . infinite of 1650 values"):
            check_finite({"w": jnp.asarray(leaf)}, "data")
