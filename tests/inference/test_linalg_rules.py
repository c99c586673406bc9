"""Fourier transforms, linear algebra and reductions by a program: what they mix stays, the rest moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import X, check, random_tree
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from rebasin import Axis, PermutationSpec, infer_spec, verify_spec


def reasons(spec):
    return {(pin.path, pin.axis): pin.reason.partition(": ")[2] for pin in spec.pins}


def of_length(n):
    return jnp.asarray(np.random.default_rng(n).normal(size=(n, 3)), jnp.float32)


def test_a_fourier_transform_over_tokens_leaves_channels_free():
    def function(t, x):
        return jnp.fft.fft(jnp.tanh(x @ t["w"]), axis=0).real @ t["v"]

    tree = random_tree(w=(3, 6), v=(6, 2))
    spec = check(function, tree, X, w=(None, "P"), v=("P", None))
    verify_spec(spec, function, tree, of_length(8))


def test_a_fourier_transform_over_channels_pins_them():
    def function(t, x):
        return jnp.fft.fft(jnp.tanh(x @ t["w"])).real @ t["v"]

    spec = check(function, random_tree(w=(3, 6), v=(6, 2)), X, w=(None, None), v=(None, None))
    assert reasons(spec)["w", 1] == "a Fourier transform mixes its positions"


def test_a_spectral_convolution_moves_both_of_its_channels():
    """A real transform halves the axis; its inverse restores it. Modes stay, channels move."""

    def function(t, x):
        h = t["lift"] @ x.T
        mixed = jnp.einsum("iw,oiw->ow", jnp.fft.rfft(h)[:, :3], t["re"] + 1j * t["im"])
        h = jnp.tanh(jnp.fft.irfft(mixed, x.shape[0]) + t["skip"] @ h)
        return t["out"] @ h

    tree = random_tree(lift=(6, 3), re=(5, 6, 3), im=(5, 6, 3), skip=(5, 6), out=(1, 5))
    modes = ("Q", "P", None)
    table = {"lift": ("P", None), "re": modes, "im": modes, "skip": ("Q", "P"), "out": (None, "Q")}
    spec = check(function, tree, of_length(8), **table)
    verify_spec(spec, function, tree, of_length(12))


NINES = 9 * jnp.eye(4)[None]

# Functions of a matrix [batch, n, n], of which each uses other primitives.
MATRIX_FUNCTIONS = {
    "cholesky": lambda m: jnp.linalg.cholesky(m + m.mT + NINES),
    "lu": lambda m: jax.lax.linalg.lu(m)[0],
    "qr": lambda m: jnp.linalg.qr(m)[1],
    "svd": lambda m: jnp.linalg.svd(m)[0] * jnp.linalg.svd(m, compute_uv=False)[:, None],
    "eigh": lambda m: jnp.linalg.eigh(m + m.mT)[0][:, None] * m,
    "determinant": lambda m: jnp.linalg.det(m)[:, None, None] * m,
    "inverse": lambda m: jnp.linalg.inv(m + NINES),
    "solve": lambda m: jnp.linalg.solve(m + NINES, m),
    "cholesky solve": lambda m: cho_solve(cho_factor(m + m.mT + NINES), m),
    "conjugate gradients": lambda m: jax.vmap(
        lambda a: jax.scipy.sparse.linalg.cg(a + a.T + NINES[0], a[0], maxiter=3)[0]
    )(m)[:, None],
}


@pytest.mark.parametrize("name", MATRIX_FUNCTIONS)
def test_the_batch_of_a_matrix_moves_and_its_rows_and_columns_stay(name):
    """Each hidden unit has a 4 × 4 matrix of its own."""

    def function(t, x):
        h = jnp.tanh(jnp.einsum("bi,ihmn->bhmn", x, t["w"]))
        made = MATRIX_FUNCTIONS[name](h.reshape(-1, 4, 4)).reshape(*h.shape[:2], -1)
        return jnp.einsum("bhm,hmo->bo", made, t["v"])

    rows = jax.eval_shape(MATRIX_FUNCTIONS[name], jnp.zeros((1, 4, 4)))
    tree = random_tree(w=(3, 5, 4, 4), v=(5, rows.size, 2))
    spec = check(function, tree, X, w=(None, "P", None, None), v=("P", None, None))
    verify_spec(spec, function, tree, of_length(7))


def test_right_hand_sides_of_a_triangular_system_move():
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        rows = lax.linalg.triangular_solve(9 * jnp.eye(len(x)) + jnp.tril(x @ x.T), h, left_side=True)
        columns = lax.linalg.triangular_solve(
            9 * jnp.eye(len(x)) + jnp.triu(x @ x.T), jnp.sin(h).T, left_side=False
        )
        return (rows + columns.T) @ t["v"]

    tree = random_tree(w=(3, 6), v=(6, 2))
    spec = check(function, tree, X, w=(None, "P"), v=("P", None))
    verify_spec(spec, function, tree, of_length(7))


def test_units_that_a_triangular_system_solves_for_stay():
    def function(t, x):
        h = jnp.tanh(x @ t["w"]).T
        return lax.linalg.triangular_solve(t["a"], h, left_side=True, lower=True).T @ t["v"]

    tree = random_tree(w=(3, 6), a=(6, 6), v=(6, 2))
    spec = check(function, tree, X, w=(None, None), a=(None, None), v=(None, None))
    assert reasons(spec)["a", 1] == "rows and columns of a matrix depend on each other"


def test_a_system_in_the_weights_pins_what_it_solves_for():
    def function(t, x):
        return jnp.linalg.solve(t["a"], jnp.tanh(x @ t["w"]).T).T @ t["v"]

    tree = random_tree(w=(3, 6), a=(6, 6), v=(6, 2))
    spec = check(function, tree, X, w=(None, None), a=(None, None), v=(None, None))
    assert reasons(spec)["a", 0] == "rows and columns of a matrix depend on each other"


def test_gradients_through_linear_algebra():
    def function(t, x):
        def loss(x):
            h = jnp.tanh(jnp.einsum("bi,ihmn->hmn", x, t["w"]))
            return (jnp.linalg.slogdet(h)[1] * t["v"]).sum()

        return jax.grad(loss)(x)

    check(function, random_tree(w=(3, 5, 4, 4), v=(5,)), X, w=(None, "P", None, None), v=("P",))


def test_a_reducer_of_ones_own():
    """Sums in one program move; a reducer that prefers the first of two values does not."""

    def function(reducer):
        def reduce(t, x):
            h = jnp.tanh(jnp.einsum("bi,ihk->bhk", x, t["w"]))
            first, second = lax.reduce((h, jnp.sin(h)), (0.0, 0.0), reducer, (2,))
            return (first + second) @ t["v"]

        return reduce

    def sums(a, b):
        return a[0] + b[0], b[1] + a[1]

    def softer(a, b):
        return a[0] + b[0], a[1] + jnp.exp(b[1])

    def alternating(a, b):
        return a[0] - b[0], a[1] + b[1]

    tree = random_tree(w=(3, 6, 4), v=(6, 2))
    spec = infer_spec(function(sums), tree, X)
    assert spec.table["w"] == (Axis.whole(None), Axis.whole("w"), Axis.whole("w#2"))
    for reducer in (softer, alternating):
        spec = infer_spec(function(reducer), tree, X)
        assert spec.table["w"] == (Axis.whole(None), Axis.whole("w"), Axis.whole(None))
        assert reasons(spec)["w", 2] == "the reducer may depend on the order of positions"


def test_blocks_of_a_scaled_product():
    """Each run of 32 numbers has a scale of its own: the runs move, and the numbers in them."""

    def function(t, x):
        a, b = (value.astype(jnp.float8_e4m3fn)[None] for value in (jnp.tanh(x @ t["w"]), t["v"]))
        scales = [jnp.exp(scale).astype(jnp.float8_e8m0fnu)[None] for scale in (x @ t["s"], t["u"])]
        numbers = (((2,), (2,)), ((0,), (0,)))
        return lax.scaled_dot(a, b, lhs_scale=scales[0], rhs_scale=scales[1], dimension_numbers=numbers)

    spec = infer_spec(function, random_tree(w=(3, 96), s=(3, 3), v=(2, 96), u=(2, 3)), X)
    runs = Axis.product(("P", 3), ("Q", 32))
    wanted = {"w": (None, runs), "v": (None, runs), "s": (None, "P"), "u": (None, "P")}
    assert spec.equivalent(PermutationSpec.from_axes(wanted, indexed={"Q": ["P"]})), str(spec)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda h: jax.pure_callback(np.sin, h, h),
            "Python code outside of the program may do anything with the positions",
        ),
        (
            lambda h: jax.ffi.ffi_call("no_such_target", h)(h),
            "code in another language may do anything with the positions",
        ),
    ],
    ids=["pure_callback", "ffi_call"],
)
def test_what_cannot_be_read_pins_and_says_so(call, reason):
    def function(t, x):
        return call(jnp.tanh(x @ t["w"])) @ t["v"]

    spec = infer_spec(function, random_tree(w=(3, 6), v=(6, 2)), X)
    assert spec.groups == ()
    assert reasons(spec)["w", 1] == reasons(spec)["v", 0] == reason


def test_functions_with_a_batching_or_a_transpose_of_their_own():
    @jax.custom_batching.custom_vmap
    def activation(x):
        return jnp.tanh(x)

    @activation.def_vmap
    def _(axis_size, is_batched, x):
        return jnp.tanh(x), True

    def function(t, x):
        h = activation(x @ t["w"])
        h = jax.custom_derivatives.linear_call(lambda r, h: r * h, lambda r, h: r * h, t["s"][None], h)
        return h @ t["v"]

    tree = random_tree(w=(3, 6), s=(6,), v=(6, 2))
    check(function, tree, X, w=(None, "P"), s=("P",), v=("P", None))
