import jax.numpy as jnp
import numpy as np
import pytest

from rebasin.errors import NonFiniteError, TreeError, TreeMismatchError
from rebasin.trees import check_finite, check_same_shapes, leaf_table


def test_two_leaves_of_one_name():
    with pytest.raises(TreeError, match=r"two leaves of the tree are both named 'a/b'"):
        leaf_table({"a": {"b": 1}, "a/b": 2})


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
    check_finite(tree, "params_b", leaves=["b", "n"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_anywhere_and_large_ones_are_not(value):
    largest = np.full((50, 33), np.finfo(np.float32).max, np.float32)  # their sum would overflow
    check_finite({"w": jnp.asarray(largest)}, "data")
    for at in ((0, 0), (7, 31), (49, 32)):
        leaf = largest.copy()
        leaf[at] = value
        with pytest.raises(NonFiniteError, match=r"w: . NaN and . infinite of 1650 values"):
            check_finite({"w": jnp.asarray(leaf)}, "data")
