"""Small functions whose symmetry is known on paper; every spec is also verified numerically in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import X, check, random_tree
from jax import lax
from jax.extend.core import Primitive

import rebasin
from rebasin import Axis, infer_spec
from rebasin.errors import InferenceError
from rebasin.inference.rule import temporary_rules

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


def dense(t, i, x):
    return x @ t[f"w{i}"] + t[f"b{i}"][None]


def test_two_hidden_layers_and_names_in_order_of_use():
    def function(t, x):
        return dense(t, 2, jnp.tanh(dense(t, 0, jax.nn.relu(dense(t, 1, x)))))

    params = random_tree(w1=(3, 6), b1=(6,), w0=(6, 7), b0=(7,), w2=(7, 2), b2=(2,))
    spec = check(
        function, params, X, w1=(None, "A"), b1=("A",), w0=("A", "B"), b0=("B",), w2=("B", None), b2=(None,)
    )
    assert spec.groups == ("w1", "w0")
    assert [path for path, _ in spec.leaves] == ["w1", "b1", "w0", "b0", "w2", "b2"]


def test_residual_stream_is_one_group():
    def function(t, x):
        h = x @ t["w_in"]
        for i in range(2):
            h = h + jax.nn.gelu(h @ t[f"up{i}"]) @ t[f"down{i}"]
        return h @ t["w_out"]

    shapes = {"up0": (6, 9), "down0": (9, 6), "up1": (6, 9), "down1": (9, 6)}
    check(
        function,
        random_tree(w_in=(3, 6), w_out=(6, 2), **shapes),
        X,
        w_in=(None, "R"),
        w_out=("R", None),
        up0=("R", "A"),
        down0=("A", "R"),
        up1=("R", "B"),
        down1=("B", "R"),
    )


@pytest.mark.parametrize("extent", [1, 4])
def test_flatten_after_convolution(extent):
    def function(t, x):
        h = jax.nn.relu(
            lax.conv_general_dilated(x, t["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
        h = lax.reduce_window(
            h, -jnp.inf, lax.max, (1, 8 // extent, 8 // extent, 1), (1, 8 // extent, 8 // extent, 1), "VALID"
        )
        return h.reshape(h.shape[0], -1) @ t["w"]

    axis = "C" if extent == 1 else Axis.product(extent**2, ("C", 6))
    params = random_tree(k=(3, 3, 3, 6), w=(6 * extent**2, 2))
    check(function, params, IMAGES, k=(None, None, None, "C"), w=(axis, None))


def test_flatten_with_channels_first():
    def function(t, x):
        h = lax.conv_general_dilated(jnp.moveaxis(x, 3, 1), t["k"], (1, 1), "VALID")
        return jnp.tanh(h).reshape(h.shape[0], -1) @ t["w"]

    axis = Axis.product(("C", 5), 36)
    check(
        function, random_tree(k=(5, 3, 3, 3), w=(180, 2)), IMAGES, k=("C", None, None, None), w=(axis, None)
    )


def test_layer_norm_with_scale_and_bias():
    def function(t, x):
        h = x @ t["w"]
        mean = h.mean(-1, keepdims=True)
        h = (h - mean) * lax.rsqrt(((h - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
        return (h * t["scale"][None] + t["bias"][None]) @ t["v"]

    params = random_tree(w=(3, 6), scale=(6,), bias=(6,), v=(6, 2))
    check(function, params, X, w=(None, "P"), scale=("P",), bias=("P",), v=("P", None))


def test_concatenation_gives_segments():
    def function(t, x):
        return jnp.concatenate([jnp.tanh(x @ t["a"]), x, jnp.sin(x @ t["b"])], axis=1) @ t["v"]

    axis = Axis.concatenate(Axis.product(("A", 4)), Axis.product(3), Axis.product(("B", 5)))
    check(
        function, random_tree(a=(3, 4), b=(3, 5), v=(12, 2)), X, a=(None, "A"), b=(None, "B"), v=(axis, None)
    )


def test_slices_of_a_fused_kernel():
    def function(t, x):
        gate, value = jnp.split(x @ t["w"], 2, axis=1)
        return (jax.nn.sigmoid(gate) * value) @ t["v"]

    axis = Axis.concatenate(Axis.product(("P", 6)), Axis.product(("P", 6)))
    check(function, random_tree(w=(3, 12), v=(6, 2)), X, w=(None, axis), v=("P", None))


def test_grouped_and_depthwise_convolution():
    def conv(x, k, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def depthwise(t, x):
        return conv(jax.nn.relu(conv(conv(x, t["a"]), t["d"], 6)), t["b"]).mean((1, 2))

    params = random_tree(a=(1, 1, 3, 6), d=(3, 3, 1, 6), b=(1, 1, 6, 2))
    free = (None, None)
    check(depthwise, params, IMAGES, a=(*free, None, "C"), d=(*free, None, "C"), b=(*free, "C", None))

    def grouped(t, x):
        return conv(jax.nn.relu(conv(conv(x, t["a"]), t["g"], 2)), t["b"]).mean((1, 2))

    params = random_tree(a=(1, 1, 3, 6), g=(3, 3, 3, 8), b=(1, 1, 8, 2))
    check(
        grouped,
        params,
        IMAGES,
        a=(*free, None, Axis.product(("G", 2), ("I", 3))),
        g=(*free, "I", Axis.product(("G", 2), ("O", 4))),
        b=(*free, Axis.product(("G", 2), ("O", 4)), None),
        indexed={"I": ["G"], "O": ["G"]},
    )


def test_nested_programs_are_seen_through():
    @jax.custom_vjp
    def act(x):
        return jnp.maximum(x, 0)

    act.defvjp(lambda x: (act(x), x), lambda x, g: (g * (x > 0),))

    @jax.jit
    def layer(w, x):
        return act(jax.checkpoint(jnp.dot)(x, w))

    def function(t, x):
        h = layer(t["w"], x)
        h = lax.platform_dependent(h, cpu=lambda h: h * 2, default=lambda h: h + h)
        h = lax.cond(x.sum() > 0, lambda h: h + t["b"][None], lambda h: h, h)
        h = lax.fori_loop(0, 3, lambda i, h: h + jnp.tanh(h), h)
        h, _ = lax.scan(lambda h, u: (jnp.tanh(h @ u), None), h, t["stack"])
        return h @ t["v"]

    params = random_tree(w=(3, 6), b=(6,), stack=(4, 6, 6), v=(6, 2))
    check(function, params, X, w=(None, "P"), b=("P",), stack=(None, "P", "P"), v=("P", None))


def test_vmap_and_einsum():
    def function(t, x):
        h = jax.vmap(lambda row: jnp.tanh(t["w"].T @ row))(x)
        return jnp.einsum("bh,hko->bo", h, t["v"])

    # The sum over k may be taken in any order, and in another one for each h and o.
    table = {"w": (None, "P"), "v": ("P", "K", "out")}
    check(
        function, random_tree(w=(3, 6), v=(6, 4, 2)), X, **table, indexed={"K": ["out", "P"]}, fixed=["out"]
    )


def test_what_does_not_cover_is_pinned_and_says_why():
    def function(t, x):
        h = jnp.cumsum(x @ t["a"], axis=1) @ t["b"]
        h = jnp.tanh(h)[:, ::-1] @ t["c"]
        return lax.top_k(jnp.maximum(h, 0), 5)[0] @ t["d"]

    params = random_tree(a=(3, 6), b=(6, 7), c=(7, 5), d=(5, 2))
    spec = check(function, params, X, a=(None, None), b=(None, None), c=(None, None), d=(None, None))
    reasons = {(pin.path, pin.axis): pin.reason for pin in spec.pins}
    line = function.__code__.co_firstlineno
    here = "test_infer_spec.py"
    assert reasons["a", 1] == f"cumsum ({here}:{line + 1}): positions depend on those before them"
    assert reasons["c", 0] == f"rev ({here}:{line + 2}): the axis is reversed"
    assert reasons["c", 1] == f"top_k ({here}:{line + 3}): of equal values the first along it is chosen"
    assert reasons["a", 0] == "meets an axis of input 0"
    assert reasons["d", 1] == "reaches an axis of output 0"
    lines = spec.explain().splitlines()
    assert "  a axis 1" in lines[lines.index(f"stays put: {reasons['a', 1]}") :]


def test_a_constant_pins_only_where_it_varies():
    mask = np.tile(np.array([[1.0], [0.0], [1.0], [1.0], [0.0]], np.float32), (1, 6))
    positions = np.arange(6, dtype=np.float32)

    def function(t, x, factor):
        return (jnp.tanh(x @ t["w"]) * factor) @ t["v"]

    params = random_tree(w=(3, 6), v=(6, 2))
    check(functools.partial(function, factor=mask), params, X, w=(None, "P"), v=("P", None))
    spec = infer_spec(functools.partial(function, factor=positions[None]), params, X)
    assert spec.groups == ()
    assert {(p.path, p.axis): p.reason for p in spec.pins}["w", 1] == "a constant array varies along it"


def test_leaves_that_are_unused_scalar_integer_or_outputs():
    def function(t, x):
        return (x @ t["w"]) @ t["v"] * t["scale"] + t["count"], t["returned"]

    params = random_tree(w=(3, 6), v=(6, 2), scale=(), unused=(4,), returned=(3,)) | {"count": jnp.asarray(2)}
    spec = check(
        function,
        params,
        X,
        w=(None, "P"),
        v=("P", None),
        scale=(),
        unused=(None,),
        returned=(None,),
        count=(),
    )
    assert {p.path: p.reason for p in spec.pins}["unused"] == "the function does not use this leaf"


def test_gram_matrix_of_a_weight_used_twice():
    def function(t, x):
        return jnp.tanh(x @ t["w"]) @ t["w"].T

    check(function, random_tree(w=(3, 6)), X, w=(None, "P"))


def test_argmax_pins_and_sort_does_not():
    def function(t, x):
        return jnp.argmax(x @ t["w"], axis=1), jnp.sort(x @ t["v"], axis=1).sum(1)

    check(function, random_tree(w=(3, 6), v=(3, 6)), X, w=(None, None), v=(None, "P"))


def test_shapes_are_enough():
    params = random_tree(w=(3, 6), v=(6, 2))
    shapes = jax.eval_shape(lambda: (params, X))
    assert infer_spec(lambda t, x: jnp.tanh(x @ t["w"]) @ t["v"], *shapes).groups == ("w",)


def test_a_rule_of_ones_own():
    """A new primitive without a rule pins; with one it does not."""
    swirl = Primitive("swirl")
    swirl.def_abstract_eval(lambda x: x)

    def function(t, x):
        return swirl.bind(x @ t["w"]) @ t["v"]

    params = random_tree(w=(3, 6), v=(6, 2))
    spec = infer_spec(function, params, X)
    assert spec.groups == ()
    line = function.__code__.co_firstlineno + 1
    assert spec.explain().splitlines() == [
        "stays put: meets an axis of input 0",
        "  w axis 0",
        f"stays put: swirl (test_infer_spec.py:{line}): this primitive has no rule",
        "  w axis 1",
        "  v axis 0",
        "stays put: reaches an axis of output 0",
        "  v axis 1",
        "the primitive swirl has no rule, which pins 2 axes of 2 leaves; register_rule adds one",
    ]
    with temporary_rules():
        rebasin.register_rule("swirl")(lambda equation, x: [x])
        assert infer_spec(function, params, X).groups == ("w",)
    assert infer_spec(function, params, X).groups == ()


def test_a_function_that_cannot_be_traced():
    with pytest.raises(InferenceError, match=r"the function cannot be traced: .*dot_general"):
        infer_spec(lambda t, x: x @ t["w"], random_tree(w=(4, 6)), X)


def test_a_second_group_is_not_named_like_another_leaf():
    def function(t, x):
        h = jnp.tanh(jnp.einsum("bi,ijk->bjk", x, t["w"]))
        return jnp.einsum("bjk,jl,km->blm", h, t["w#2"], t["v"])

    spec = infer_spec(function, random_tree(w=(3, 6, 5), v=(5, 2), **{"w#2": (6, 2)}), X)
    assert spec.groups == ("w", "w#3")
