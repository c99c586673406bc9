import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from rebasin.errors import NonFiniteError, TreeError, TreeMismatchError
from rebasin.trees import check_finite, check_same_shapes, conform, is_below, leaf_table, longest_name


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


def as_restored(tree):
    """The tree as a checkpoint gives it back: lists become dictionaries of texts, in the order of texts."""
    if isinstance(tree, list):
        return {str(i): as_restored(x) for i, x in sorted(enumerate(tree), key=lambda pair: str(pair[0]))}
    return {str(k): as_restored(x) for k, x in tree.items()} if isinstance(tree, dict) else tree


def test_leaves_are_paired_by_name_whatever_their_containers():
    """With twelve layers "10" stands before "2" among texts, so positions differ."""
    tree = {
        "layers": [{"w": np.full(2, i)} for i in range(12)],
        "by_number": {3: np.zeros(1), 20: np.ones(1)},
    }
    restored = as_restored(tree)
    assert [int(leaf[0]) for leaf in jax.tree.leaves(restored)] != [
        int(leaf[0]) for leaf in jax.tree.leaves(tree)
    ]
    for other in (restored, FrozenDict(restored)):
        chex.assert_trees_all_equal(conform(tree, other), tree)
        chex.assert_trees_all_equal(conform(other, tree), other)
    with pytest.raises(TreeMismatchError, match="layers/11/w: only in params_a"):
        conform(tree, {**restored, "layers": {k: v for k, v in restored["layers"].items() if k != "11"}})


def test_states_of_training_that_differ_in_what_is_no_leaf():
    states = [
        TrainState.create(apply_fn=lambda: None, params={"w": jnp.full(2, i)}, tx=optax.adam(1e-3))
        for i in range(2)
    ]
    assert jax.tree.structure(states[0]) != jax.tree.structure(states[1])
    moved = conform(*states)
    assert jax.tree.structure(moved) == jax.tree.structure(states[0])
    assert moved.params["w"].tolist() == [1, 1]


def test_names_of_subtrees_and_patterns():
    assert longest_name("a/b/c", ["", "a", "a/b", "a/bc", "*/c"]) in ("a/b", "*/c")
    assert longest_name("a/b/c", ["", "a/x"]) == ""
    assert longest_name("a/b/c", ["b", "a/b/c/d"]) is None
    assert [is_below("h.3.attn.mask", name) for name in ("h.*.mask", "*attn", "h", "*")] == [
        True,
        False,
        False,
        True,
    ]
    assert is_below("layers/[x]/w", "layers/[x]")
    assert is_below("layers/[x]/w/0", "layers/*/w")


def test_a_mask_that_is_not_finite_says_how_to_leave_it_out():
    tree = {"h.mask": np.array([0.0, -np.inf]), "w": np.ones(2)}
    with pytest.raises(NonFiniteError) as info:
        check_finite(tree, "params_a", leaves=["h.mask", "w"])
    assert str(info.value).splitlines()[1] == (
        "  h.mask: 0 NaN and 1 infinite of 2 values; if this is a mask, leave it out by "
        "roles={'h.mask': 'constant'}"
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_the_largest_numbers_of_narrow_types_are_finite(dtype):
    check_finite({"w": jnp.full(70000, jnp.finfo(dtype).max, dtype)}, "params_a")
    with pytest.raises(NonFiniteError, match="1 NaN"):
        check_finite({"w": jnp.array([1, jnp.nan], dtype)}, "params_a")
