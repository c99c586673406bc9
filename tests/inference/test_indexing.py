"""Groups that may be permuted differently at each position of another axis, and those that may not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import X, check, random_tree
from jax import lax

from rebasin import Axis, PermutationSpec, infer_spec, verify_spec
from rebasin.errors import VerificationError

SEQUENCES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)


def heads(t, x, name):
    return jnp.einsum("ntc,chd->nthd", x, t[name])


def attention(t, x):
    scores = jnp.einsum("nthd,nshd->nhts", heads(t, x, "q"), heads(t, x, "k"))
    return jnp.einsum("nhts,nshe,heo->nto", jax.nn.softmax(scores), heads(t, x, "v"), t["out"])


ATTENTION = random_tree(q=(3, 2, 4), k=(3, 2, 4), v=(3, 2, 5), out=(2, 5, 6))


def test_attention_has_a_permutation_of_dimensions_for_each_head():
    check(
        attention,
        ATTENTION,
        SEQUENCES,
        q=(None, "H", "D"),
        k=(None, "H", "D"),
        v=(None, "H", "E"),
        out=("H", "E", None),
        indexed={"D": ["H"], "E": ["H"]},
    )


def test_a_scale_shared_by_all_heads_ties_them():
    """The scale of a norm over head dimensions carries these without the head, and so ties all heads."""

    def function(t, x):
        shared = {name: t[name] * t["scale"][None, None] for name in ("q", "k")}
        return attention(t | shared, x)

    check(
        function,
        ATTENTION | random_tree(scale=(4,)),
        SEQUENCES,
        q=(None, "H", "D"),
        k=(None, "H", "D"),
        v=(None, "H", "E"),
        out=("H", "E", None),
        scale=("D",),
        indexed={"E": ["H"]},
    )


def test_multi_query_attention_ties_the_dimensions_of_all_heads():
    def function(t, x):
        q, k, v = heads(t, x, "q"), x @ t["k"], x @ t["v"]
        scores = jax.nn.softmax(jnp.einsum("nthd,nsd->nhts", q, k))
        return jnp.einsum("nhts,nse,heo->nto", scores, v, t["out"])

    params = random_tree(q=(3, 2, 4), k=(3, 4), v=(3, 5), out=(2, 5, 6))
    table = {"q": (None, "H", "D"), "k": (None, "D"), "v": (None, "E"), "out": ("H", "E", None)}
    check(function, params, SEQUENCES, **table)


def test_positions_that_face_each_other_tie():
    """In ``Σ_d x[o, d] x[o', d]`` every value carries o beside d, but o faces o'."""

    def function(t, x):
        h = jnp.tanh(jnp.einsum("nc,cod->nod", x, t["w"]))
        return jnp.einsum("nod,npd->nop", h, h).reshape(5, -1) @ t["v"]

    spec = infer_spec(function, random_tree(w=(3, 2, 4), v=(4, 2)), X)
    verify_spec(spec, function, random_tree(w=(3, 2, 4), v=(4, 2)), X)
    assert spec.indexed == ()


def test_positions_that_add_up_tie():
    """A running sum over o adds up what stands at different o, though every value carries o beside d."""

    def function(t, x):
        h = jnp.cumsum(jnp.tanh(jnp.einsum("nc,cod->nod", x, t["w"])), axis=1)
        return jnp.einsum("nod,odk->nk", jnp.tanh(h), t["v"])

    params = random_tree(w=(3, 4, 5), v=(4, 5, 2))
    check(function, params, X, w=(None, None, "D"), v=(None, "D", None))
    told_apart = PermutationSpec.from_axes(
        {"w": (None, "o", "D"), "v": ("o", "D", None)}, indexed={"D": ["o"]}, fixed=["o"]
    )
    with pytest.raises(VerificationError, match=r"\n  D: outputs change by"):
        verify_spec(told_apart, function, params, X)


def test_scanned_layers_have_inner_widths_of_their_own_and_one_stream():
    def function(t, x):
        def layer(h, w):
            return h + jnp.tanh(h @ w["up"] + w["bias"][None]) @ w["down"], None

        h, _ = lax.scan(layer, x @ t["embed"], t["layers"])
        return h @ t["out"]

    layers = random_tree(up=(7, 4, 6), bias=(7, 6), down=(7, 6, 4))
    params = random_tree(embed=(3, 4), out=(4, 2)) | {"layers": layers}
    table = {
        "embed": (None, "R"),
        "layers/up": ("L", "R", "F"),
        "layers/bias": ("L", "F"),
        "layers/down": ("L", "F", "R"),
        "out": ("R", None),
    }
    spec = infer_spec(function, params, X)
    verify_spec(spec, function, params, X)
    assert spec.equivalent(PermutationSpec.from_axes(table, indexed={"F": ["L"]}, fixed=["L"]))
    (why,) = (pin.reason for pin in spec.pins if (pin.path, pin.axis) == ("layers/up", 0))
    assert why.endswith("the axis is scanned over in order")


def test_an_ensemble_under_vmap_permutes_each_member_by_itself():
    def function(t, x):
        return jax.vmap(lambda w, v: jnp.tanh(x @ w) @ v)(t["w"], t["v"])

    params = random_tree(w=(4, 3, 6), v=(4, 6, 2))
    table = {"w": ("E", None, "F"), "v": ("E", "F", None)}
    check(function, params, X, **table, indexed={"F": ["E"]}, fixed=["E"])


def test_soft_mixture_of_experts_permutes_experts_and_hidden_units_in_each():
    def function(t, x):
        gates = jax.nn.softmax(x @ t["router"])
        hidden = jax.nn.relu(jnp.einsum("nc,ecf->nef", x, t["up"]))
        return jnp.einsum("ne,nef,efo->no", gates, hidden, t["down"])

    params = random_tree(router=(3, 4), up=(4, 3, 6), down=(4, 6, 2))
    table = {"router": (None, "E"), "up": ("E", None, "F"), "down": ("E", "F", None)}
    check(function, params, X, **table, indexed={"F": ["E"]})


def test_channels_of_norm_groups():
    """Channels move within their group; whole groups move as one, for the next layer is free to follow."""

    def function(t, x):
        h = (x @ t["w"]).reshape(5, 2, 4)
        h = (h - h.mean(2, keepdims=True)) / jnp.sqrt(h.var(2, keepdims=True) + 1e-3)
        return jnp.tanh(h.reshape(5, 8) * t["scale"][None]) @ t["v"]

    axis = Axis.product(("G", 2), ("C", 4))
    params = random_tree(w=(3, 8), scale=(8,), v=(8, 2))
    check(function, params, X, w=(None, axis), scale=(axis,), v=(axis, None), indexed={"C": ["G"]})


def test_a_constant_between_says_nothing():
    """Zeros made on the spot carry head dimensions without a layer, and tie nothing."""

    def function(t, x):
        def layer(h, w):
            inner = h @ w["up"]
            return h + jnp.where(inner > 0, inner, jnp.zeros_like(inner)) @ w["down"], None

        return lax.scan(layer, x, t)[0]

    params = random_tree(up=(7, 3, 6), down=(7, 6, 3))
    table = {"up": ("L", None, "F"), "down": ("L", "F", None)}
    check(function, params, X, **table, indexed={"F": ["L"]}, fixed=["L"])
