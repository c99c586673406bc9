"""Numeric verification: a sound spec passes, every broken one is caught and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.errors import InferenceError, SpecMismatchError, VerificationError

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
TREE = {
    "Dense_0": {"kernel": jnp.ones((3, 8)), "bias": jnp.zeros(8)},
    "Norm_0": {"scale": jnp.ones(8)},
    "Dense_1": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)},
    "Dense_2": {"kernel": jnp.ones((6, 2))},
}
TABLE = {
    "Dense_0/kernel": (None, "P0"),
    "Dense_0/bias": ("P0",),
    "Norm_0/scale": ("P0",),
    "Dense_1/kernel": ("P0", "P1"),
    "Dense_1/bias": ("P1",),
    "Dense_2/kernel": ("P1", None),
}


def apply(tree, x):
    h = (
        jnp.tanh(x @ tree["Dense_0"]["kernel"] + tree["Dense_0"]["bias"][None])
        * tree["Norm_0"]["scale"][None]
    )
    return jnp.tanh(h @ tree["Dense_1"]["kernel"] + tree["Dense_1"]["bias"][None]) @ tree["Dense_2"]["kernel"]


def test_a_sound_spec_passes_and_needs_no_randomness_in_the_leaves():
    rebasin.verify_spec(PermutationSpec.from_axes(TABLE), apply, TREE, X)


@pytest.mark.parametrize("path", list(TABLE))
def test_every_axis_left_out_is_caught_and_names_its_group(path):
    """Each axis in turn; the leaves are constant or zero, which would hide all of them without the redraw."""
    for i, group in enumerate(TABLE[path]):
        if group is None:
            continue
        broken = [None if j == i else g for j, g in enumerate(TABLE[path])]
        with pytest.raises(VerificationError) as info:
            rebasin.verify_spec(PermutationSpec.from_axes(TABLE | {path: broken}), apply, TREE, X)
        named = [line.split(":")[0].strip() for line in str(info.value).splitlines()[1:]]
        assert named == [group]


def test_the_message_tells_group_size_and_leaves():
    spec = PermutationSpec.from_axes(TABLE | {"Dense_0/bias": (None,)})
    message = r"P0: outputs change by \d\.\de-0\d relative to .* \(tolerance 2e-11\); it moves Dense_0/kernel"
    with pytest.raises(VerificationError, match=message):
        rebasin.verify_spec(spec, apply, TREE, X)


def test_inputs_that_must_not_move():
    with pytest.raises(VerificationError, match="P_in"):
        rebasin.verify_spec(
            PermutationSpec.from_axes(TABLE | {"Dense_0/kernel": ("P_in", "P0")}), apply, TREE, X
        )


def test_leaves_that_cannot_be_negative_stay_positive():
    spec = PermutationSpec.from_axes({"w": (None, "P"), "variance": ("P",), "v": ("P", None)})
    tree = {"w": jnp.ones((3, 8)), "variance": jnp.ones(8), "v": jnp.ones((8, 2))}
    rebasin.verify_spec(spec, lambda t, x: x @ t["w"] / jnp.sqrt(t["variance"])[None] @ t["v"], tree, X)


def test_a_mask_with_infinite_entries_is_kept():
    """Drawn anew, its entries would mask nothing. Attention under it is finite: a wrong spec is caught."""
    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in "qkvo"}
    tree["mask"] = np.triu(np.full((3, 3), -np.inf, np.float32), 1)

    def attend(t, x):
        scores = (x @ t["q"]) @ (x @ t["k"]).T + t["mask"]
        return jax.nn.softmax(scores) @ (x @ t["v"]) @ t["o"]

    x = rng.normal(size=(3, 4)).astype(np.float32)
    spec = rebasin.infer_spec(attend, tree, x)
    assert len(spec.groups) == 2
    rebasin.verify_spec(spec, attend, tree, x)
    wrong = PermutationSpec.from_axes({**spec.table, "v": (None, None)})
    with pytest.raises(VerificationError, match="outputs change"):
        rebasin.verify_spec(wrong, attend, tree, x)


def test_outputs_that_are_not_finite_prove_nothing():
    spec = PermutationSpec.from_axes({"w": (None, "P")})
    with pytest.raises(VerificationError, match="the outputs are not finite for random weights"):
        rebasin.verify_spec(
            spec, lambda t, x: jnp.log(-jnp.abs(x @ t["w"])).sum(1), {"w": jnp.ones((3, 4))}, X
        )


CHAIN = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
BROKEN_CHAIN = PermutationSpec.from_axes({"w": (None, "P"), "v": (None, None)})


def chain_tree(dtype=jnp.float32):
    return {"w": jnp.ones((3, 64), dtype), "v": jnp.ones((64, 2), dtype)}


def check_exactly(apply_fn, tree, x):
    """The sound spec passes, and the wrong one fails at the tolerance of float64."""
    rebasin.verify_spec(CHAIN, apply_fn, tree, x)
    message = r"P: outputs change by .* \(tolerance 2e-11\); it moves w axis 1"
    with pytest.raises(VerificationError, match=message):
        rebasin.verify_spec(BROKEN_CHAIN, apply_fn, tree, x)


def scatter(w, v, x, d):
    return jnp.zeros((5, 64), d).at[jnp.array([0, 1, 1, 2, 4])].add(x @ w) @ v


def reduce(w, v, x, d):
    return jax.lax.reduce((x @ w)[:, :, None] * v[None], d(0), lambda a, b: a + b, (1,))


def branch(w, v, x, d):
    return jax.lax.cond(x[0, 0] > 0, lambda h: h * 2, lambda h: h - jnp.ones((), d), x @ w) @ v


def scan(w, v, x, d):
    return jax.lax.scan(lambda h, row: (h + jnp.tanh(row @ w), None), jnp.zeros(64, d), x)[0][None] @ v


def while_loop(w, v, x, d):
    def body(carry):
        return carry[0] + 1, jnp.tanh(carry[1]) * x[:, :1]

    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x @ w))[1] @ v


# Networks that compute in the type d, to which their weights and inputs are cast.
NARROW = {
    "products": lambda w, v, x, d: jnp.tanh(x @ w) @ v,
    "preferred type": lambda w, v, x, d: jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(d) @ v,
    "named algorithm": lambda w, v, x, d: jnp.matmul(x, w, precision="BF16_BF16_F32") @ v,
    "counts": lambda w, v, x, d: (x @ w + jnp.arange(5, dtype=d)[:, None]) @ v,
    "constants": lambda w, v, x, d: (x @ w + jnp.asarray([[1], [2], [3], [4], [5]], d)) @ v,
    "jit": lambda w, v, x, d: jax.jit(lambda w: jax.nn.relu(x @ w))(w) @ v,
    "remat": lambda w, v, x, d: jax.checkpoint(lambda w: jnp.sin(x @ w))(w) @ v,
    "branch": branch,
    "scan": scan,
    "while": while_loop,
    "scatter": scatter,
    "reduce": reduce,
    "cumulative sum": lambda w, v, x, d: jnp.cumsum(x @ w, axis=0) @ v,
    "pooling": lambda w, v, x, d: (
        jax.lax.reduce_window(x @ w, d(0), jax.lax.add, (2, 1), (1, 1), "VALID") @ v
    ),
    "rounding": lambda w, v, x, d: jax.lax.reduce_precision(x @ w, 5, 3) @ v,
    "random": lambda w, v, x, d: (x @ w + jax.random.normal(jax.random.key(3), (5, 1), d)) @ v,
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", list(NARROW))
def test_a_model_that_computes_in_a_narrow_type_is_checked_in_float64(name, dtype):
    def network(t, x):
        w, v, x = (y.astype(dtype) for y in (t["w"], t["v"], x))
        return NARROW[name](w, v, x, dtype).astype(jnp.float32)

    check_exactly(network, chain_tree(), X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_inputs_and_outputs_of_a_narrow_type_are_checked_in_float64(dtype):
    check_exactly(lambda t, x: jnp.tanh(x @ t["w"]) @ t["v"], chain_tree(dtype), X.astype(dtype))


def test_a_model_in_eight_bits_is_checked_in_float64():
    def eight_bits(x):
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)

    check_exactly(lambda t, x: eight_bits(x @ eight_bits(t["w"])) @ t["v"], chain_tree(), X)


def callback(dtype):
    """A network whose hidden values pass through the host in a type of their own."""

    def apply_fn(t, x):
        h = (x @ t["w"]).astype(dtype)
        h = jax.pure_callback(lambda h: np.tanh(h), jax.ShapeDtypeStruct(h.shape, dtype), h)
        return h.astype(jnp.float32) @ t["v"]

    return apply_fn


def test_an_operation_that_insists_on_float32_makes_the_check_less_exact():
    rebasin.verify_spec(CHAIN, callback(jnp.float32), chain_tree(), X)
    with pytest.raises(VerificationError, match=r"P: outputs change by .* \(tolerance 1e-02\)"):
        rebasin.verify_spec(BROKEN_CHAIN, callback(jnp.float32), chain_tree(), X)


@pytest.mark.parametrize("spec", [CHAIN, BROKEN_CHAIN])
def test_an_operation_that_insists_on_less_than_float32_leaves_nothing_to_verify(spec):
    with pytest.raises(VerificationError) as info:
        rebasin.verify_spec(spec, callback(jnp.bfloat16), chain_tree(), X)
    assert str(info.value).splitlines() == [
        "nothing was verified, since rounding would hide a wrong spec:",
        "  pure_callback cannot run in more than bfloat16",
    ]


def complex_chain(t, x):
    return jnp.real(jnp.sin((x @ t["w"]) * t["pole"][None] + t["bias"][None]) @ t["v"])


COMPLEX = {"w": (None, "P"), "pole": ("P",), "bias": ("P",), "v": ("P", None)}


@pytest.mark.parametrize("path", list(COMPLEX))
def test_complex_leaves_are_drawn_anew_too(path):
    """Equal poles and zero biases would hide that they must move."""
    tree = {
        "w": jnp.ones((3, 8), jnp.complex64),
        "pole": jnp.full(8, 0.5 - 0.1j, jnp.complex64),
        "bias": jnp.zeros(8, jnp.complex64),
        "v": jnp.ones((8, 2), jnp.complex64),
    }
    rebasin.verify_spec(PermutationSpec.from_axes(COMPLEX), complex_chain, tree, X)
    broken = COMPLEX | {path: tuple(None for _ in COMPLEX[path])}
    with pytest.raises(VerificationError, match="P: outputs change by"):
        rebasin.verify_spec(PermutationSpec.from_axes(broken), complex_chain, tree, X)


def test_imaginary_parts_of_outputs_count():
    tree = {"w": jnp.ones((3, 8)), "v": jnp.ones((8, 2)), "u": jnp.ones((8, 2))}

    def apply_fn(t, x):
        h = jnp.tanh(x @ t["w"])
        return jax.lax.complex(h @ t["v"], h @ t["u"])

    with pytest.raises(VerificationError, match="P: outputs change by"):
        rebasin.verify_spec(
            PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None), "u": (None, None)}),
            apply_fn,
            tree,
            X,
        )


def test_leaves_that_are_negative_throughout_stay_negative():
    spec = PermutationSpec.from_axes({"w": (None, "P"), "decay": ("P",), "v": ("P", None)})
    tree = {"w": jnp.ones((3, 8)), "decay": -jnp.ones(8), "v": jnp.ones((8, 2))}
    rebasin.verify_spec(
        spec, lambda t, x: x @ t["w"] * jnp.sqrt(-t["decay"])[None] @ t["v"], tree, X
    )  # NaN otherwise


def test_a_prng_key_among_the_inputs_and_outputs():
    def apply_fn(t, x, key):
        first, last = jax.random.split(key)
        return jnp.tanh(x @ t["w"] + jax.random.normal(first, (5, 1))) @ t["v"], last

    rebasin.verify_spec(CHAIN, apply_fn, chain_tree(), X, jax.random.key(0))


def test_a_function_that_cannot_be_traced():
    with pytest.raises(InferenceError, match="the function cannot be traced"):
        rebasin.verify_spec(CHAIN, lambda t, x: x @ t["v"], chain_tree(), X)


def test_another_tree_is_refused():
    with pytest.raises(SpecMismatchError, match="the spec does not fit params"):
        rebasin.verify_spec(PermutationSpec.from_axes(TABLE), apply, TREE | {"extra": jnp.ones(1)}, X)
    assert not jax.config.jax_enable_x64


def test_a_loop_with_a_float32_carry_is_checked_in_float64():
    """A loop whose carry starts as float32 cannot be traced with wider weights."""
    spec = PermutationSpec.from_axes({"w": (None, "P"), "u": ("P", "P"), "v": ("P", None)})
    rng = np.random.default_rng(1)
    tree = {
        name: jnp.asarray(rng.normal(size=s) / 3, jnp.float32)
        for name, s in zip("wuv", [(3, 8), (8, 8), (8, 2)], strict=True)
    }

    def recur(t, x):
        start = jnp.zeros((5, 8), jnp.float32)
        return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(x @ t["w"] + h @ t["u"]), start) @ t["v"]

    rebasin.verify_spec(spec, recur, tree, X)
    broken = PermutationSpec.from_axes({"w": (None, "P"), "u": ("P", None), "v": ("P", None)})
    with pytest.raises(VerificationError, match=r"P: outputs change by .* \(tolerance 2e-11\)"):
        rebasin.verify_spec(broken, recur, tree, X)
