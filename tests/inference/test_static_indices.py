"""Updates and lookups at places that the program fixes are slices and concatenations.

Every spec is verified on an input of another length than the one that it was inferred with.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import X, random_tree
from jax import lax

from rebasin import Axis, PermutationSpec, infer_spec, verify_spec

LONGER = jnp.asarray(np.random.default_rng(9).normal(size=(8, 3)), jnp.float32)


def segments(*parts):
    return Axis.concatenate(*(Axis.product(part) for part in parts))


def check(function, tree, **expected):
    spec = infer_spec(function, tree, X)
    wanted = PermutationSpec.from_axes(expected)
    assert spec.equivalent(wanted), f"inferred:\n{spec}\nwanted:\n{wanted}"
    for x in (X, LONGER):
        verify_spec(spec, function, tree, x)
    return spec


# Changes of the units 2 and 3 of six, which leave two groups around them.
MIDDLE = {
    "set": lambda h: h.at[:, 2:4].set(0.0),
    "negative bounds": lambda h: h.at[:, -4:-2].set(0.0),
    "multiply": lambda h: h.at[:, 2:4].multiply(2.0),
    "add by an array of indices": lambda h: h.at[:, np.array([2, 3])].add(1.0),
    "add by a shifted count": lambda h: h.at[:, jnp.arange(2) + 2].add(1.0),
    "dynamic update": lambda h: lax.dynamic_update_slice(h, jnp.zeros((h.shape[0], 2), h.dtype), (0, 2)),
    "dynamic update, clamped": lambda h: (
        lax.dynamic_update_slice(h, jnp.zeros((h.shape[0], 4), h.dtype), jnp.array([0, 9]))
        + h.at[:, 2:4].add(1.0)
    ),
    "dynamic slice": lambda h: h + lax.dynamic_slice_in_dim(h, 2, 2, 1).sum(1, keepdims=True),
    "dynamic slice in a loop": lambda h: lax.fori_loop(
        0, 2, lambda _, c: c + lax.dynamic_slice_in_dim(h, 2, 2, 1).sum(1, keepdims=True), h
    ),
    "gather": lambda h: h + h[:, np.array([2, 3])].sum(1, keepdims=True),
    "gather from the end": lambda h: h + h[:, np.array([-4, -3])].sum(1, keepdims=True),
    "take": lambda h: h + jnp.take(h, jnp.array([2, 3]), axis=1).sum(1, keepdims=True),
    "gather under vmap": lambda h: h + jax.vmap(lambda row: row[np.array([2, 3])])(h).sum(1, keepdims=True),
    "boolean mask": lambda h: (
        h + h[:, np.array([False, False, True, True, False, False])].sum(1, keepdims=True)
    ),
}


@pytest.mark.parametrize("name", MIDDLE)
def test_a_static_part_is_a_segment(name):
    def function(t, x):
        return MIDDLE[name](jnp.tanh(x @ t["w"])) @ t["v"]

    axis = segments(("before", 2), ("middle", 2), ("after", 2))
    check(function, random_tree(w=(3, 6), v=(6, 2)), w=(None, axis), v=(axis, None))


def test_an_update_moves_with_what_it_overwrites():
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        h = h.at[:, 1:4].add(t["u"][None])
        return lax.dynamic_update_slice(h, jnp.tanh(x @ t["late"]), (0, 4)) @ t["v"]

    axis = segments(1, ("middle", 3), ("late", 2))
    tree = random_tree(w=(3, 6), u=(3,), late=(3, 2), v=(6, 2))
    read = segments(1, ("middle", 3), ("late", 2))
    check(function, tree, w=(None, read), u=("middle",), late=(None, "late"), v=(axis, None))


def test_blocks_that_are_written_one_after_the_other():
    """Two rows of a table of zeros are filled from different layers, then contracted."""

    def function(t, x):
        rows = jnp.zeros((2, x.shape[0], 6), x.dtype).at[0].set(jnp.tanh(x @ t["a"]))
        rows = rows.at[1, :, :4].set(jnp.tanh(x @ t["b"]))
        return jnp.einsum("kbi,kio->bo", rows, t["v"])

    axis = segments(("P", 4), ("Q", 2))
    check(
        function,
        random_tree(a=(3, 6), b=(3, 4), v=(2, 6, 2)),
        a=(None, axis),
        b=(None, "P"),
        v=(None, axis, None),
    )


def test_every_other_unit():
    """Interleaved halves, written and read by strides: pairs move, the two of a pair keep their places."""

    def function(t, x):
        h = jnp.zeros((x.shape[0], 12), x.dtype)
        h = h.at[:, ::2].set(jnp.tanh(x @ t["a"])).at[:, np.arange(1, 12, 2)].set(jnp.sin(x @ t["b"]))
        return (h @ t["v"]) * h[:, np.arange(0, 12, 2)].sum(1, keepdims=True)

    axis = Axis.product(("P", 6), 2)
    check(function, random_tree(a=(3, 6), b=(3, 6), v=(12, 2)), a=(None, "P"), b=(None, "P"), v=(axis, None))


def test_runs_may_come_in_any_order_and_overlap():
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        return h[:, np.array([5, 6, 7, 0, 1, 2, 3, 5, 6])] @ t["v"]

    made, read = segments(("A", 4), 1, ("B", 2), 1), segments(("B", 2), 1, ("A", 4), ("B", 2))
    check(function, random_tree(w=(3, 8), v=(9, 2)), w=(None, made), v=(read, None))


def test_two_axes_of_one_lookup():
    def function(t, x):
        h = jnp.einsum("bi,ijk->bjk", x, t["w"])
        picked = h[:, np.array([0, 1])[:, None], np.array([[1, 2, 3]])]
        return jnp.einsum("bjk,jko->bo", jnp.tanh(picked), t["v"]) + jnp.tanh(h).sum((1, 2))[:, None]

    rows, columns = segments(("R", 2), ("R2", 3)), segments(1, ("C", 3), ("C2", 2))
    tree = random_tree(w=(3, 5, 6), v=(2, 3, 2))
    check(function, tree, w=(None, rows, columns), v=("R", "C", None))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[:, np.array([4, 2, 0, 5, 3, 1])],
        lambda h: h.at[:, np.array([4, 2, 0])].set(0.0),
        lambda h: h.at[:, np.array([2, 3, 2])].add(h[:, :3]),
        lambda h: h.at[:, np.array([5, 6])].add(1.0),  # half of it out of bounds
    ],
    ids=["shuffled", "scattered", "twice", "out of bounds"],
)
def test_places_without_structure_pin_the_axis(change):
    def function(t, x):
        return change(jnp.tanh(x @ t["w"])) @ t["v"]

    spec = check(function, random_tree(w=(3, 6), v=(6, 2)), w=(None, None), v=(None, None))
    reasons = {pin.reason.split(": ")[-1] for pin in spec.pins if (pin.path, pin.axis) == ("w", 1)}
    by_index = {"positions are looked up by index", "positions are written by index"}
    assert reasons & by_index
    assert reasons <= by_index | {"a constant array varies along it"}


def test_entries_of_a_leaf_or_an_input_are_no_static_indices():
    def function(t, x):
        return jnp.tanh(x @ t["w"]).at[:, t["places"]].set(0.0) @ t["v"]

    tree = random_tree(w=(3, 6), v=(6, 2)) | {"places": jnp.array([2, 3])}
    check(function, tree, w=(None, None), places=(None,), v=(None, None))


def test_what_is_computed_from_static_entries_by_another_rule_is_not_static():
    """A running sum returns its operand's axes; it must not return its entries."""

    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        return h.at[:, jnp.cumsum(jnp.array([2, 1]))].set(0.0) @ t["v"]

    check(function, random_tree(w=(3, 6), v=(6, 2)), w=(None, None), v=(None, None))
