"""The whole symmetry group of tiny networks, by brute force over every permutation of every axis.

A permutation of the units of a flattened or concatenated axis is one of the n! permutations of that axis. So
the count covers factors, segments and inner groups, whatever they are called.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin

X = np.random.default_rng(0).normal(size=(12, 2))


def plain(xp, w, x):
    return xp.tanh(x @ w("in", 2, 4)) @ w("out", 4, 1)


def two_layers(xp, w, x):
    return xp.tanh(xp.tanh(x @ w("in", 2, 3)) @ w("mid", 3, 4)) @ w("out", 4, 1)


def gated(xp, w, x):
    """Each unit has one element in the first half and one in the second."""
    h = x @ w("in", 2, 6)
    return (h[:, :3] * xp.tanh(h[:, 3:])) @ w("out", 3, 1)


def maxout(xp, w, x):
    """Pairs move as a whole, and the two pieces of each pair by themselves."""
    return (x @ w("in", 2, 6)).reshape(12, 3, 2).max(-1) @ w("out", 3, 1)


def concatenated(xp, w, x):
    h = xp.concatenate([xp.tanh(x @ w("a", 2, 2)), xp.sin(x @ w("b", 2, 3))], axis=1)
    return h @ w("out", 5, 1)


def skip(xp, w, x):
    """The skipped value is read twice: on an axis of its own and as a segment of another."""
    h = xp.tanh(x @ w("in", 2, 2))
    return xp.concatenate([h, xp.sin(h @ w("mid", 2, 2))], axis=1) @ w("out", 4, 1)


def flattened(xp, w, x):
    """Three channels at two places, which are told apart by their scales."""
    h = xp.tanh(x[:, None, :] @ w("in", 2, 3) * xp.asarray([1.0, 2.0])[None, :, None])
    return h.reshape(12, 6) @ w("out", 6, 1)


def heads(xp, w, x):
    """Two heads of two dimensions in a fused axis; each head weighs its own values."""
    q, v = ((x @ w(name, 2, 4)).reshape(12, 2, 2) for name in ("q", "v"))
    says = xp.exp(xp.tanh(xp.einsum("bhd,bhd->bh", q, xp.sin(q))))
    return (says[:, :, None] * v).reshape(12, 4) @ w("out", 4, 1)


def fused(xp, w, x):
    """A projection that is taken apart: its first half is weighed by the sum of the second."""
    parts = (x @ w("in", 2, 6)).reshape(12, 2, 3)
    return (xp.tanh(parts[:, 0]) * xp.sin(parts[:, 1]).sum(-1, keepdims=True)) @ w("out", 3, 1)


def residual(xp, w, x):
    h = x @ w("in", 2, 3)
    h = h + xp.tanh(h @ w("up", 3, 2)) @ w("down", 2, 3)
    return h @ w("out", 3, 1)


def routed(xp, w, x):
    """The best of three experts, looked up by its position."""
    which = (x @ w("router", 2, 3) + w("bias", 3)[None]).argmax(1)
    return xp.einsum("bi,bio->bo", x, w("experts", 3, 2, 1)[which])


def routed_with_ties(xp, w, x):
    """A known limit: of equal values the first is chosen, so the other two could change places."""
    which = xp.maximum(x @ w("router", 2, 3), 0).argmax(1)
    return xp.einsum("bi,bio->bo", x, w("experts", 3, 2, 1)[which])


def bilinear(xp, w, x):
    h = xp.tanh(x @ w("in", 2, 3))
    return xp.einsum("bi,ij,bj->b", h, w("form", 3, 3), h)


def running(xp, w, x):
    return xp.cumsum(xp.tanh(x @ w("in", 2, 4)), axis=1) @ w("out", 4, 1)


def rows_and_columns(xp, w, x):
    """A known limit: all four units could move freely, but two axes are never merged into one."""
    h = xp.tanh(xp.einsum("bi,ijk->bjk", x, w("in", 2, 2, 2)))
    return xp.einsum("bjk,jko->bo", h, w("out", 2, 2, 1))


def shapes_of(function):
    shapes = {}

    def weight(name, *shape):
        shapes[name] = shape
        return np.ones(shape)

    function(np, weight, X)
    return shapes


def count_symmetries(function, shapes):
    """Count the ways of permuting every axis of every leaf that leave the function as it is."""
    rng = np.random.default_rng(1)
    tree = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    before = function(np, lambda name, *_: tree[name], X)
    choices = [itertools.permutations(range(n)) for shape in shapes.values() for n in shape]
    count = 0
    for rows in itertools.product(*choices):
        queue = iter(rows)
        moved = {name: w[np.ix_(*(next(queue) for _ in w.shape))] for name, w in tree.items()}
        count += np.allclose(function(np, lambda name, *_, t=moved: t[name], X), before, rtol=1e-9, atol=1e-9)
    return count


def count_in_spec(function, shapes):
    """Count the permutations that the inferred spec allows."""
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def traced(weights, x):
        return function(jnp, lambda name, *_: weights[name], x)

    spec = rebasin.infer_spec(traced, tree, jax.ShapeDtypeStruct(X.shape, jnp.float32))
    sizes = [size if isinstance(size, tuple) else (size,) for size in spec.group_sizes(tree).values()]
    return math.prod(math.factorial(size[-1]) ** math.prod(size[:-1]) for size in sizes)


EXPECTED = {
    plain: 24,
    two_layers: 6 * 24,
    gated: 6,
    maxout: 6 * 2**3,
    concatenated: 2 * 6,
    skip: 2 * 2,
    flattened: 6,
    heads: 2 * 2**2 * 2**2,
    fused: 6 * 6,
    residual: 6 * 2,
    routed: 6,
    bilinear: 6,
    running: 1,
}


@pytest.mark.parametrize("function", EXPECTED, ids=lambda function: function.__name__)
def test_no_symmetry_is_missing(function):
    """The numbers worked out by hand agree with brute force and with the spec."""
    shapes = shapes_of(function)
    assert count_in_spec(function, shapes) == EXPECTED[function]
    assert count_symmetries(function, shapes) == EXPECTED[function]


def test_known_limits():
    """Compare what is found with what brute force over axes sees."""
    shapes = shapes_of(rows_and_columns)
    assert count_in_spec(rows_and_columns, shapes) == 2 * 2**2  # of 4! that move rows and columns together
    assert count_symmetries(rows_and_columns, shapes) == 2 * 2
    shapes = shapes_of(routed_with_ties)
    assert count_in_spec(routed_with_ties, shapes) == 1
    assert count_symmetries(routed_with_ties, shapes) == 2
