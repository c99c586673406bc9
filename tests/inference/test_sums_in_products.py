"""Axes that are products of concatenations: heads of several parts, and concatenations that all stay.

Soundness is checked on sequences of another length, with other values, than the spec was inferred with.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check, random_tree

import rebasin
from rebasin import Axis, verify_spec

IN, HEADS, DIMS = 6, 3, 4


def sequence(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(length, IN)), jnp.float32)


def check_lengths(function, params, **expected):
    """Like `check` on five tokens, and sound on eight."""
    spec = check(function, params, sequence(5), **expected)
    verify_spec(spec, function, params, sequence(8, seed=1))
    return spec


def attend(q, k, v, out):
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1) @ out


def turn(x, turned):
    """Rotary embedding, by halves, of the first `turned` dimensions of each head; the others pass."""
    a, b, rest = x[..., : turned // 2], x[..., turned // 2 : turned], x[..., turned:]
    angles = jnp.arange(len(x))[:, None] / 10.0 ** jnp.arange(turned // 2)[None]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


def rotary(turned, kernel):
    """Attention with (partial) rotary embedding, whose kernels are ``[in, heads·dims]`` or not flat."""

    def function(t, x):
        q, k, v = (jnp.tensordot(x, t[n], 1).reshape(-1, HEADS, DIMS) for n in "qkv")
        return attend(turn(q, turned), turn(k, turned), v, t["out"])

    return function, random_tree(q=kernel, k=kernel, v=kernel, out=(HEADS * DIMS, 2))


VALUES = Axis.product(("H", HEADS), ("V", DIMS))


def test_rotary_by_halves_on_a_flat_kernel():
    """Both halves stay, so the whole dimension of a head does; heads move."""
    function, params = rotary(DIMS, (IN, HEADS * DIMS))
    turned = Axis.product(("H", HEADS), DIMS)
    table = {"q": (None, turned), "k": (None, turned), "v": (None, VALUES), "out": (VALUES, None)}
    check_lengths(function, params, **table, indexed={"V": ["H"]})


@pytest.mark.parametrize("flat", [True, False])
def test_partial_rotary(flat):
    """The dimensions that pass move in each head."""
    function, params = rotary(2, (IN, HEADS * DIMS) if flat else (IN, HEADS, DIMS))
    dims = Axis.concatenate(Axis.product(2), Axis.product(("P", 2)))
    turned = (None, Axis.product(("H", HEADS), dims)) if flat else (None, "H", dims)
    values = (None, VALUES) if flat else (None, "H", "V")
    table = {"q": turned, "k": turned, "v": values, "out": (VALUES, None)}
    spec = check_lengths(function, params, **table, indexed={"P": ["H"], "V": ["H"]})
    assert spec.group_sizes(params) == {"q": 3, "q#2": (3, 2), "v": (3, 4)}


PART = (("D", DIMS), ("D", DIMS), ("V", DIMS))  # dimensions of queries, keys and values


def by_splitting(x):
    return jnp.split(x.reshape(-1, HEADS, 3 * DIMS), 3, axis=-1)


def by_slicing(x):
    x = x.reshape(-1, HEADS, 3 * DIMS)
    return [x[..., i * DIMS : (i + 1) * DIMS] for i in range(3)]


def by_reshaping(x):
    x = x.reshape(-1, HEADS, 3, DIMS)
    return [x[:, :, i] for i in range(3)]


def by_unstacking(x):
    return jnp.unstack(x.reshape(-1, HEADS, 3, DIMS), axis=2)


@pytest.mark.parametrize("take_apart", [by_splitting, by_slicing, by_reshaping, by_unstacking])
def test_queries_keys_and_values_fused_head_by_head(take_apart):
    def function(t, x):
        return attend(*take_apart(x @ t["qkv"] + t["bias"][None]), t["out"])

    size = HEADS * 3 * DIMS
    params = random_tree(qkv=(IN, size), bias=(size,), out=(HEADS * DIMS, 2))
    fused = Axis.product(("H", HEADS), Axis.concatenate(*(Axis.product(part) for part in PART)))
    table = {"qkv": (None, fused), "bias": (fused,), "out": (VALUES, None)}
    spec = check_lengths(function, params, **table, indexed={"D": ["H"], "V": ["H"]})
    assert rebasin.PermutationSpec.from_json(spec.to_json()) == spec


def test_partial_rotary_of_a_projection_fused_head_by_head():
    def function(t, x):
        q, k, v = by_splitting(x @ t["qkv"])
        return attend(turn(q, 2), turn(k, 2), v, t["out"])

    params = random_tree(qkv=(IN, HEADS * 3 * DIMS), out=(HEADS * DIMS, 2))
    passed = Axis.product(("P", 2))
    parts = Axis.concatenate(Axis.product(2), passed, Axis.product(2), passed, Axis.product(("V", DIMS)))
    table = {"qkv": (None, Axis.product(("H", HEADS), parts)), "out": (VALUES, None)}
    check_lengths(function, params, **table, indexed={"P": ["H"], "V": ["H"]})


def test_several_queries_of_each_key_fused_group_by_group():
    """Two keys with two queries each, ``[keys, (2 + 1 + 1), dims]``, partly turned: sums at two depths."""

    def function(t, x):
        fused = (x @ t["qkv"]).reshape(len(x), 2, 4, DIMS)
        q, k, v = fused[:, :, :2], fused[:, :, 2:3], fused[:, :, 3:]
        q, k = (turn(z.reshape(len(x), -1, DIMS), 2).reshape(z.shape) for z in (q, k))
        weights = jax.nn.softmax(jnp.einsum("tkqd,skd->kqts", q, k[:, :, 0]))
        return jnp.einsum("kqts,skd->tkqd", weights, v[:, :, 0]).reshape(len(x), -1) @ t["out"]

    params = random_tree(qkv=(IN, 2 * 4 * DIMS), out=(2 * 2 * DIMS, 3))
    turned = Axis.concatenate(Axis.product(2), Axis.product(("P", 2)))
    parts = Axis.concatenate(Axis.product(("Q", 2), turned), turned, Axis.product(("V", DIMS)))
    table = {
        "qkv": (None, Axis.product(("K", 2), parts)),
        "out": (Axis.product(("K", 2), ("Q", 2), ("V", DIMS)), None),
    }
    check_lengths(function, params, **table, indexed={"Q": ["K"], "P": ["K"], "V": ["K"]})


@pytest.mark.parametrize("form", ["positions", "split", "unstack", "stride"])
def test_interleaved_gate_and_value(form):
    """Gate and value of a unit stand beside each other; the unit moves with both."""

    def function(t, x):
        h = x @ t["up"] + t["bias"][None]
        pairs = h.reshape(*h.shape[:-1], -1, 2)
        if form == "stride":
            gate, value = h[:, ::2], h[:, 1::2]
        elif form == "split":
            gate, value = (part[..., 0] for part in jnp.split(pairs, 2, axis=-1))
        elif form == "unstack":
            gate, value = jnp.unstack(pairs, axis=-1)
        else:
            gate, value = pairs[..., 0], pairs[..., 1]
        return (jax.nn.silu(gate) * value) @ t["down"]

    axis = Axis.product(("F", 5), 2)
    params = random_tree(up=(IN, 10), bias=(10,), down=(5, 2))
    check_lengths(function, params, up=(None, axis), bias=(axis,), down=("F", None))


def test_gated_units_of_each_expert():
    """Experts of units of pairs, flat in one kernel."""

    def function(t, x):
        h = (x @ t["up"]).reshape(len(x), 3, 4, 2)
        gates = jax.nn.softmax(x @ t["router"])
        return jnp.einsum("te,teh,eho->to", gates, jax.nn.silu(h[..., 0]) * h[..., 1], t["down"])

    params = random_tree(up=(IN, 24), router=(IN, 3), down=(3, 4, 2))
    check_lengths(
        function,
        params,
        up=(None, Axis.product(("E", 3), ("F", 4), 2)),
        router=(None, "E"),
        down=("E", "F", None),
        indexed={"F": ["E"]},
    )


def test_a_concatenation_at_every_place_of_a_flattened_image():
    """Channels of two branches are joined and then flattened with positions that stay."""

    def function(t, x):
        h = jnp.concatenate([jnp.tanh(x @ t["a"]), jnp.sin(x @ t["b"])], axis=-1)
        return h.reshape(1, -1) @ t["out"]

    params = random_tree(a=(IN, 3), b=(IN, 4), out=(5 * 7, 2))
    joined = Axis.concatenate(Axis.product(("A", 3)), Axis.product(("B", 4)))
    check(
        function,
        params,
        sequence(5),
        a=(None, "A"),
        b=(None, "B"),
        out=(Axis.product(5, joined), None),
    )


def test_a_norm_of_whole_heads_is_sound():
    """A norm over a head of two parts ties nothing, and a scale shared by heads ties their dimensions."""

    def function(t, x):
        q, k, v = by_splitting(x @ t["qkv"])
        q, k = (
            turn(z / jnp.linalg.norm(z, axis=-1, keepdims=True) * t["scale"][None, None], 2) for z in (q, k)
        )
        return attend(q, k, v, t["out"])

    params = random_tree(qkv=(IN, HEADS * 3 * DIMS), scale=(DIMS,), out=(HEADS * DIMS, 2))
    passed = Axis.product(("P", 2))
    parts = Axis.concatenate(Axis.product(2), passed, Axis.product(2), passed, Axis.product(("V", DIMS)))
    check_lengths(
        function,
        params,
        qkv=(None, Axis.product(("H", HEADS), parts)),
        scale=(Axis.concatenate(Axis.product(2), passed),),
        out=(VALUES, None),
        indexed={"V": ["H"]},
    )
