"""Complex leaves are weights: everything that compares or averages networks uses Re⟨a, b⟩."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.arithmetic import average, distance, inner_product, interpolate
from rebasin.errors import NonFiniteError
from rebasin.matching.frank_wolfe import joint_objective
from rebasin.matching.metric import apply_metric
from rebasin.matching.partial import partial_weight_matching
from rebasin.matching.soft import soft_permute, soften
from rebasin.matching.straight_through import midpoint_gradient
from rebasin.permutation import random_permutation
from rebasin.roles import weight_leaves

KEY = jax.random.key(0)

CHAIN = PermutationSpec.from_axes(
    {"w0": (None, "P0"), "b0": ("P0",), "w1": ("P0", "P1"), "pole": ("P1",), "w2": ("P1", None), "gain": ()}
)
HEADS = PermutationSpec.from_axes(
    {"q": (None, "heads", "inner"), "o": ("heads", "inner", None)}, indexed={"inner": ["heads"]}
)
SQUARE = PermutationSpec.from_axes({"w": (None, "P"), "u": ("P", "P"), "v": ("P", None)})


def draw(seed, dtype=np.complex64, **shapes):
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=s) + 1j * rng.normal(size=s)).astype(dtype) for name, s in shapes.items()}


def chain_tree(seed, n=7, m=6):
    return draw(seed, w0=(3, n), b0=(n,), w1=(n, m), pole=(m,), w2=(m, 2), gain=())


TREES = {
    "chain": (CHAIN, chain_tree),
    "heads": (HEADS, lambda seed: draw(seed, q=(3, 4, 5), o=(4, 5, 2))),
    "square": (SQUARE, lambda seed: draw(seed, w=(3, 6), u=(6, 6), v=(6, 2))),
}


def real_inner_product(a, b):
    """Σ Re(conj(a)·b), by hand in complex128."""
    return sum(np.vdot(a[k].astype(np.complex128), np.asarray(b[k], np.complex128)).real for k in a)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(10))
def test_a_planted_permutation_of_a_complex_network_is_recovered_exactly(name, seed):
    spec, build = TREES[name]
    a = build(seed)
    b = rebasin.permute(spec, random_permutation(spec, a, key=jax.random.key(seed)), a)
    match = rebasin.weight_matching(spec, a, b, key=jax.random.key(seed))
    assert match.converged
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), jax.tree.map(jnp.asarray, a))


@pytest.mark.parametrize("method", [rebasin.weight_matching, rebasin.frank_wolfe_matching])
@pytest.mark.parametrize("name", TREES)
def test_the_objective_is_the_real_part_of_the_inner_product(method, name):
    spec, build = TREES[name]
    a, b = build(0), build(1)
    options = {"key": KEY} if method is rebasin.weight_matching else {}
    match = method(spec, a, b, **options)
    moved = rebasin.permute(spec, match.permutation, b)
    assert match.objective[-1] == pytest.approx(real_inner_product(a, moved), rel=1e-5)
    assert inner_product(a, moved) == pytest.approx(real_inner_product(a, moved), rel=1e-12)
    assert joint_objective(
        spec, [rebasin.identity_permutation(spec, a), match.permutation], [a, b]
    ) == pytest.approx(real_inner_product(a, moved), rel=1e-12)
    squares = sum(float(np.sum(np.abs(x.astype(np.complex128)) ** 2)) for t in (a, b) for x in t.values())
    assert distance(a, moved) ** 2 == pytest.approx(squares - 2 * real_inner_product(a, moved), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_one_hidden_layer_is_the_brute_force_optimum(seed):
    """With complex64 beside float32, so that both kinds are in one similarity."""
    spec = PermutationSpec.from_axes({"w": (None, "P"), "b": ("P",), "v": ("P", None)})
    trees = [
        {**draw(s, w=(3, 4), v=(4, 2)), "b": np.random.default_rng(s).normal(size=4).astype(np.float32)}
        for s in (seed, seed + 100)
    ]
    a, b = trees
    best = max(
        real_inner_product(a, rebasin.permute(spec, {"P": np.array(rows)}, b))
        for rows in itertools.permutations(range(4))
    )
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    assert match.objective[-1] == pytest.approx(best, rel=1e-6)


def test_units_that_differ_in_their_phase_alone_are_told_apart():
    """Equal moduli, and equal real parts for conjugate pairs: only the imaginary parts say which is which."""
    spec = PermutationSpec.from_axes({"pole": ("P",)})
    a = {"pole": np.exp(1j * np.array([0.3, -0.3, 1.2, -1.2])).astype(np.complex64)}
    b = {"pole": a["pole"][[3, 1, 0, 2]]}
    match = rebasin.weight_matching(spec, a, b, key=KEY)
    np.testing.assert_array_equal(match.permutation["P"], [2, 1, 3, 0])


def test_a_weight_of_a_leaf_counts_for_both_parts():
    spec = PermutationSpec.from_axes({"w": ("P",), "v": ("P",)})
    a = {"w": np.array([1j, 2j], np.complex64), "v": np.array([2j, 1j], np.complex64)}
    match = rebasin.weight_matching(spec, a, a, key=KEY, leaf_weights={"v": 0.5})
    assert match.objective[-1] == pytest.approx(5 + 2.5)


def test_a_network_is_found_inside_a_wider_one():
    wide = chain_tree(0, n=9, m=8)
    narrow = {
        **wide,
        "w0": wide["w0"][:, [5, 2, 7]],
        "b0": wide["b0"][[5, 2, 7]],
        "w1": wide["w1"][[5, 2, 7]][:, [1, 6]],
        "pole": wide["pole"][[1, 6]],
        "w2": wide["w2"][[1, 6]],
    }
    match = partial_weight_matching(CHAIN, narrow, wide, key=KEY)
    assert match.permutation["P0"][:3].tolist() == [5, 2, 7]
    assert match.permutation["P1"][:2].tolist() == [1, 6]


@pytest.mark.parametrize("name", TREES)
def test_a_soft_permutation_moves_complex_leaves(name):
    spec, build = TREES[name]
    tree = build(0)
    permutation = random_permutation(spec, tree, key=KEY)
    soft = jax.tree.map(lambda x: x.astype(np.float32), soften(spec, permutation, tree))
    moved = soft_permute(spec, soft, tree)
    chex.assert_trees_all_equal_dtypes(moved, tree)
    chex.assert_trees_all_close(moved, rebasin.permute(spec, permutation, tree), rtol=1e-6)


def test_averages_and_paths_average_complex_leaves():
    a, b = {"w": np.array([2 + 4j, 0], np.complex64)}, {"w": np.array([0, 4j], np.complex64)}
    assert "w" in weight_leaves(a)
    np.testing.assert_array_equal(interpolate(a, b, 0.25)["w"], np.array([0.5 + 1j, 3j], np.complex64))
    np.testing.assert_array_equal(interpolate(a, b, 1.0)["w"], a["w"])
    np.testing.assert_array_equal(average([a, b], [1, 3])["w"], np.array([0.5 + 1j, 3j], np.complex64))
    assert interpolate(a, b, 0.25)["w"].dtype == average([a, b])["w"].dtype == np.complex64
    assert rebasin.sweep(
        a, b, jnp.zeros(2), lambda t, x: {"loss": x + jnp.abs(t["w"]).sum()}, num_alphas=3
    ).loss.tolist() == pytest.approx([4, abs(1 + 2j) + 2, abs(2 + 4j)])


def test_values_that_are_not_finite_are_found_in_either_part():
    good = {"w": np.ones((2, 2), np.complex64)}
    for bad in (complex(np.nan, 0), complex(0, np.nan), complex(0, np.inf)):
        broken = {"w": np.array([[1, 2], [3, bad]], np.complex64)}
        counts = "1 NaN and 0 infinite" if np.isnan(bad) else "0 NaN and 1 infinite"
        with pytest.raises(NonFiniteError, match=f"w: {counts} of 4 values"):
            rebasin.weight_matching(PermutationSpec.from_axes({"w": (None, "P")}), good, broken, key=KEY)


def test_the_metric_of_the_activations_of_a_complex_layer():
    """½ E|x W|² has the gradient E[x* xᵀ] W, by hand in complex128."""
    rng = np.random.default_rng(0)
    tree = draw(0, w=(3, 4), v=(4, 2))
    x = (rng.normal(size=(20, 3)) + 1j * rng.normal(size=(20, 3))).astype(np.complex64)
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    found = apply_metric(spec, tree, lambda t, x: x @ t["w"] @ t["v"], x, batch_size=7)
    expected = x.conj().T @ x / len(x) @ tree["w"]
    np.testing.assert_allclose(found["w"], expected, rtol=1e-4)
    h = x @ tree["w"]
    np.testing.assert_allclose(found["v"], h.conj().T @ h / len(x) @ tree["v"], rtol=1e-4)


def test_repair_gives_complex_layers_the_deviations_between_the_ends():
    """Deviations are those of |y − mean|; in a single batch the correction is exact."""

    def apply_fn(t, x):
        y = x @ t["w"]
        return (y * jax.nn.sigmoid(jnp.abs(y)) @ t["v"]).real

    a, b = draw(0, w=(3, 4), v=(4, 2)), draw(1, w=(3, 4), v=(4, 2))
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    x = np.random.default_rng(2).normal(size=(30, 3)).astype(np.float32)
    repair = rebasin.build_repair(spec, a, b, apply_fn, x)
    mixed = interpolate(a, b, 0.5)
    ((scale, shift),) = jax.jit(repair.prepare)(mixed, 0.5)
    y_a, y_b, y = (x @ np.asarray(t["w"]) for t in (a, b, mixed))
    y = y * np.asarray(scale) + np.asarray(shift)
    np.testing.assert_allclose(y.mean(0), (y_a.mean(0) + y_b.mean(0)) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y.std(0), (y_a.std(0) + y_b.std(0)) / 2, rtol=1e-4)


def test_the_loss_falls_against_the_gradient_of_the_midpoint():
    a, b = {"w": np.array([1 + 1j], np.complex64)}, {"w": np.array([2 - 3j], np.complex64)}

    def metrics_fn(t, x):
        return {"loss": jnp.abs(t["w"] * x - 1) ** 2}

    value, gradient = midpoint_gradient(b, a, jnp.ones(1), metrics_fn=metrics_fn)
    # The midpoint is m = 1.5 − 1j and |m − 1|² has the gradient 2 (m − 1), half of it for one of the ends.
    assert float(value) == pytest.approx(1.25)
    np.testing.assert_allclose(gradient["w"], [0.5 - 1j])
