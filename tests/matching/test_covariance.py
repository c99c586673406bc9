import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.optimize import linear_sum_assignment
from zoo import KEY, arrays

import rebasin
from rebasin import PermutationSpec, covariance_matching
from rebasin.batches import Batch
from rebasin.errors import ConfigError, DataError, InferenceError, NonFiniteError, TreeMismatchError
from rebasin.matching.covariance import CovarianceMatching
from rebasin.matching.metric import apply_metric, find_metric, sum_weighted
from rebasin.models import ResNet20, ViT
from rebasin.models.convolution import conv_general_dilated
from rebasin.permutation import check_permutation

RNG = np.random.default_rng(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def chain(tree, x, activation=lambda h: h):
    *hidden, (w, b) = tree
    for weight, bias in hidden:
        x = activation(x @ weight + bias[None])
    return x @ w + b[None]


def relu_chain(tree, x):
    return chain(tree, x, jax.nn.relu)


def chain_tree(seed, widths=(4, 6, 5, 3)):
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    return [(normal(m, n, seed=seed + i), normal(n, seed=seed + 50 + i)) for i, (m, n) in enumerate(pairs)]


def second_moments(tree, x):
    """Σ of what enters each layer of a linear chain, float64."""
    x = np.asarray(x, np.float64)
    moments = []
    for w, b in tree:
        moments.append(x.T @ x / len(x))
        x = x @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
    return moments


def test_metric_of_a_linear_chain_by_hand():
    tree, x = chain_tree(0), normal(37, 4, seed=3)
    spec = rebasin.infer_spec(chain, tree, x)
    weighted = apply_metric(spec, tree, chain, x, batch_size=10)
    for (w, b), (new_w, new_b), moment in zip(tree, weighted, second_moments(tree, x), strict=True):
        np.testing.assert_allclose(new_w, moment @ np.asarray(w, np.float64), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(new_b, b)


@pytest.mark.parametrize("order", ["depth", "ascent"])
def test_linear_chain_by_hand(order):
    """Layer by layer: each group is SciPy's optimum of W_A Σ W_Bᵀ and the biases, given the earlier one."""
    a, b, x = chain_tree(0), chain_tree(10), normal(37, 4, seed=3)
    spec = rebasin.infer_spec(chain, a, x)
    match = covariance_matching(spec, a, b, chain, x, key=KEY_, order=order)
    moments = second_moments(a, x)
    wide = [[np.asarray(leaf, np.float64) for leaf in pair] for pair in a + b]
    a64, b64 = wide[:3], wide[3:]

    def total(rows):
        """Σ-inner product of all weights."""
        sides = [np.arange(4), *rows, np.arange(3)]
        value = 0.0
        for i, ((w, c), (v, d)) in enumerate(zip(a64, b64, strict=True)):
            value += (moments[i] @ w * v[np.ix_(sides[i], sides[i + 1])]).sum() + c @ d[sides[i + 1]]
        return value

    rows = sorted(match.permutation.values(), key=len, reverse=True)
    if order == "depth":
        known = np.arange(4)
        for i in range(2):
            (w, c), (v, d) = a64[i], b64[i]
            matrix = w.T @ moments[i] @ v[known] + np.outer(c, d)
            best = linear_sum_assignment(matrix, maximize=True)[1]
            np.testing.assert_array_equal(rows[i], best)
            known = best
    else:
        products = match.stats["inner_products"]
        assert (np.diff(products) >= 0).all()
        assert products[-1] >= total([np.arange(6), np.arange(5)])
        assert match.stats["kept"] == "ascent"
        np.testing.assert_allclose(products[-1], total(rows), rtol=1e-4)
    assert match.converged
    ends = [distance(a64, b64, moments, r) for r in ([np.arange(6), np.arange(5)], rows)]
    np.testing.assert_allclose(match.stats["distance"], ends, rtol=1e-4)
    np.testing.assert_allclose(-match.objective[[0, -1]], ends, rtol=1e-4)


KEY_ = jax.random.key(0)


def distance(a, b, moments, rows):
    """‖A − P[B]‖_Σ."""
    sides = [np.arange(4), *rows, np.arange(3)]
    square = 0.0
    for i, ((w, c), (v, d)) in enumerate(zip(a, b, strict=True)):
        gap = w - v[np.ix_(sides[i], sides[i + 1])]
        square += np.trace(gap.T @ moments[i] @ gap) + ((c - d[sides[i + 1]]) ** 2).sum()
    return np.sqrt(square)


def test_identity_moment_is_weight_matching():
    """A whitened input: x xᵀ sums to the identity exactly, so the in-weights keep their plain metric."""

    def apply(tree, x):
        return jnp.tanh(x @ tree["w"]) @ tree["v"]

    x = 2.0 * jnp.concatenate([jnp.eye(4), -jnp.eye(4), jnp.zeros((8, 4))])[:, [2, 0, 3, 1]] / np.sqrt(2)
    np.testing.assert_allclose(x.T @ x / 16, np.eye(4) / 4, atol=1e-6)
    x = 2 * x
    a, b = ({"w": normal(4, 9, seed=s), "v": normal(9, 2, seed=s + 1)} for s in (0, 5))
    spec = rebasin.infer_spec(apply, a, x)
    weighted = apply_metric(spec, a, apply, x)
    np.testing.assert_allclose(weighted["w"], a["w"], rtol=1e-5, atol=1e-6)
    match = covariance_matching(spec, a, b, apply, x, key=KEY_, order="depth")
    plain = rebasin.weight_matching(spec, a, b, key=KEY_, roles={"": "constant", "w": "weight"})
    assert match.permutation["w"].tolist() == plain.permutation["w"].tolist()


@pytest.mark.parametrize(
    "convolution", [lax.conv_general_dilated, conv_general_dilated], ids=["jax", "models"]
)
@pytest.mark.parametrize("size", [6, 2])
def test_metric_of_a_convolution_is_that_of_its_patches(convolution, size):
    """Also where the kernel is larger than the image, which `models.convolution` writes as products."""

    def apply(tree, x):
        h = convolution(x, tree["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(h).mean((1, 2)) @ tree["v"]

    tree, x = {"k": normal(3, 3, 2, 5), "v": normal(5, 2, seed=1)}, normal(7, size, size, 2, seed=2)
    spec = rebasin.infer_spec(apply, tree, x)
    weighted = apply_metric(spec, tree, apply, x, batch_size=3)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 18)
    moment = patches.T @ patches / len(patches)
    expected = moment @ np.asarray(tree["k"], np.float64).reshape(18, 5)
    np.testing.assert_allclose(weighted["k"].reshape(18, 5), expected, rtol=1e-4, atol=1e-5)


def test_scan_shares_or_stacks_the_metric():
    """Layers of a stack have a Σ each; a recurrent kernel has the mean over its steps."""

    def stacked(tree, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ tree["i"], tree["w"])[0] @ tree["v"]

    def recurrent(tree, x):
        step = lambda h, _: (jnp.tanh(h @ tree["w"]), None)  # noqa: E731
        return lax.scan(step, x @ tree["i"], None, length=3)[0] @ tree["v"]

    x, shared = normal(9, 4, seed=1), normal(6, 6, seed=2) / 2
    tree = {"i": normal(4, 6, seed=3), "v": normal(6, 2, seed=4), "w": jnp.stack([shared] * 3)}
    by_layer = apply_metric(rebasin.infer_spec(stacked, tree, x), tree, stacked, x)["w"]
    tree |= {"w": shared}
    mean = apply_metric(rebasin.infer_spec(recurrent, tree, x), tree, recurrent, x)["w"]
    np.testing.assert_allclose(by_layer.mean(0), mean, rtol=1e-4, atol=1e-6)
    h = np.asarray(x @ tree["i"], np.float64)
    np.testing.assert_allclose(
        by_layer[0], h.T @ h / 9 @ np.asarray(shared, np.float64), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("order", ["depth", "ascent"])
@pytest.mark.parametrize("seed", range(3))
def test_planted_permutation_is_recovered(seed, order):
    def apply(tree, x):
        return chain(tree, x, jnp.tanh)

    a, x = chain_tree(seed, (8, 24, 24, 24, 4)), normal(60, 8, seed=seed)
    spec = rebasin.infer_spec(apply, a, x)
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
    match = covariance_matching(spec, a, b, apply, x, key=KEY_, order=order, batch_size=20)
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, b), a)
    assert match.stats["distance"][0] > 1
    assert match.stats["distance"][1] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_shuffled_copy_of_a_relu_network_is_put_back(seed):
    """The ascent leaves the order that the pass in order of depth finds, for higher inner products."""

    a, x = chain_tree(seed, (6, 32, 32, 3)), normal(400, 6, seed=seed)
    spec = rebasin.infer_spec(relu_chain, a, x)
    shuffle = rebasin.random_permutation(spec, a, key=jax.random.key(seed))
    b = rebasin.permute(spec, shuffle, a)
    match = covariance_matching(spec, a, b, relu_chain, x, key=KEY_)
    assert rebasin.fixed_points(match.permutation, rebasin.invert(spec, shuffle)).total == 1
    products = match.stats["inner_products"]
    assert products[-1] > products[0]
    assert match.stats["kept"] == "depth"


@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_the_candidate_of_least_distance(seed):
    a, b = (chain_tree(10 * seed + s, (4, 9, 7, 3)) for s in (0, 5))
    x = normal(50, 4, seed=seed)
    spec = rebasin.infer_spec(relu_chain, a, x)
    ascent, depth = (
        covariance_matching(spec, a, b, relu_chain, x, key=KEY_, order=order) for order in ("ascent", "depth")
    )
    distances = ascent.stats["distances"]
    assert list(distances) == ["identity", "depth", "ascent"]
    assert depth.stats["distances"] == pytest.approx({n: distances[n] for n in ("identity", "depth")})
    for match in (ascent, depth):
        found = match.stats["distances"]
        assert match.stats["distance"] == (found["identity"], min(found.values()))
        assert found[match.stats["kept"]] == min(found.values())
        np.testing.assert_array_equal(-match.objective, np.minimum.accumulate(list(found.values())))
        # The network that is returned has that distance, as the identity of another match.
        moved = rebasin.permute(spec, match.permutation, b)
        again = covariance_matching(spec, a, moved, relu_chain, x, key=KEY_, order="depth")
        assert again.stats["distance"][0] == pytest.approx(min(found.values()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape"),
    [(ResNet20(2, 3), (2, 8, 8, 1)), (ViT(8, 3, depth=1, num_heads=2), (4, 4, 4, 1))],
    ids=["resnet20", "vit"],
)
def test_models(model, shape):
    x = normal(*shape)
    a, b = (arrays(jax.eval_shape(model.init, KEY, x), seed) for seed in (0, 1))
    spec = rebasin.infer_spec(model.apply, a, x)
    match = covariance_matching(spec, a, b, model.apply, x, key=KEY_)
    check_permutation(spec, a, match.permutation)
    assert (np.diff(match.objective) >= 0).all()
    kernels = {p for p, leaf in rebasin.trees.leaf_table(a).items() if p.endswith("kernel")}
    assert set(match.stats["weighted"]) == kernels
    again = covariance_matching(spec, a, b, model.apply, x, key=KEY_)
    assert again == match


def test_tied_and_computed_weights_keep_what_they_have():
    """A weight computed from leaves has no metric; a leaf used twice has that of both uses."""

    def apply(tree, x):
        h = x @ (tree["g"][None] * tree["w"])
        h = jnp.tanh(jnp.tanh(h @ tree["u"]) @ tree["u"])
        return h @ tree["v"]

    tree = {"g": normal(6, seed=1), "w": normal(3, 6, seed=2), "u": normal(6, 6, seed=3), "v": normal(6, 2)}
    x = normal(11, 3, seed=5)
    spec = rebasin.infer_spec(apply, tree, x)
    weighted = apply_metric(spec, tree, apply, x)
    np.testing.assert_array_equal(weighted["w"], tree["w"])
    h = np.asarray(x @ (tree["g"][None] * tree["w"]), np.float64)
    u = np.asarray(tree["u"], np.float64)
    next_h = np.tanh(h @ u)
    np.testing.assert_allclose(weighted["u"], (h.T @ h + next_h.T @ next_h) / 11 @ u, rtol=1e-4, atol=1e-5)


def test_width_one():
    tree = chain_tree(0, (4, 1, 3))
    spec = PermutationSpec.from_axes({"0/0": (None, "P"), "0/1": ("P",), "1/0": ("P", None), "1/1": (None,)})
    match = covariance_matching(spec, tree, tree, chain, normal(5, 4), key=KEY_)
    assert match.permutation["P"].tolist() == [0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order": "breadth"}, ConfigError, "unknown order 'breadth'"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"max_iterations": 0}, ConfigError, "max_iterations must be at least 1"),
        ({"data": jnp.ones((0, 4))}, DataError, "no examples"),
        ({"data": jnp.full((2, 4), jnp.inf)}, NonFiniteError, "data is not finite"),
        ({"data": jnp.ones((5, 3))}, InferenceError, r"cannot be traced with batch float32\[5, 3\]"),
        ({"params_a": chain_tree(0, (4, 7, 5, 3))}, TreeMismatchError, "0/0: shape"),
        ({"data": jnp.full((2, 4), 1e30)}, NonFiniteError, "A in the metric of Σ is not finite"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "params_a": chain_tree(0),
        "params_b": chain_tree(1),
        "apply_fn": chain,
        "data": normal(5, 4),
    } | change
    spec = rebasin.infer_spec(chain, chain_tree(0), normal(5, 4))
    with pytest.raises(error, match=message):
        covariance_matching(spec, key=KEY_, **arguments)


def test_bias_and_norm_have_the_plain_metric():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.LayerNorm()(nn.Dense(6)(x))))

    x = normal(8, 3)
    tree = arrays(jax.eval_shape(Model().init, KEY, x))
    spec = rebasin.infer_spec(Model().apply, tree, x)
    weighted = apply_metric(spec, tree, Model().apply, x)
    for path, leaf in rebasin.trees.leaf_table(weighted).items():
        same = np.array_equal(leaf, rebasin.trees.leaf_table(tree)[path])
        assert same == (not path.endswith("kernel"))


def test_memory_does_not_depend_on_the_size_of_the_split():
    a = chain_tree(0, (8, 32, 32, 4))
    spec = rebasin.infer_spec(chain, a, normal(5, 8))

    def temporary(n):
        inputs = (jnp.zeros((n, 8)),)
        metric = find_metric(spec, a, chain, inputs, 20, ["in", "out"])
        return sum_weighted.lower(metric, a, inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporary(200) == temporary(20_000)


def test_a_batch_and_its_inputs_alone_are_the_same():
    """Labels are ignored; several inputs are handed over one by one, and have a Σ each."""

    def apply(tree, x, y):
        return jnp.tanh(x @ tree["w"] + y @ tree["u"]) @ tree["v"]

    x, y = normal(37, 4, seed=3), normal(37, 2, seed=4)
    a, b = ({"w": normal(4, 9, seed=s), "u": normal(2, 9, seed=s + 1), "v": normal(9, 2)} for s in (0, 5))
    spec = rebasin.infer_spec(apply, a, x, y)
    weighted = apply_metric(spec, a, apply, Batch((x, y), np.full(37, np.nan)), batch_size=10)
    for name, inputs in (("w", x), ("u", y)):
        moment = np.asarray(inputs, np.float64).T @ np.asarray(inputs, np.float64) / 37
        np.testing.assert_allclose(weighted[name], moment @ np.asarray(a[name], np.float64), rtol=1e-4)
    match = covariance_matching(spec, a, b, apply, Batch((x, y), np.arange(37)), key=KEY_, batch_size=10)
    assert match == covariance_matching(spec, a, b, apply, (x, y), key=KEY_, batch_size=10)
    tree, z = chain_tree(0), normal(37, 4, seed=3)
    spec = rebasin.infer_spec(chain, tree, z)
    alone = covariance_matching(spec, tree, chain_tree(10), chain, z, key=KEY_)
    assert covariance_matching(spec, tree, chain_tree(10), chain, Batch(z, np.arange(37)), key=KEY_) == alone


def test_a_method_is_a_value_that_holds_its_options():
    a, b, x = chain_tree(0), chain_tree(10), normal(37, 4, seed=3)
    spec = rebasin.infer_spec(chain, a, x)
    method = CovarianceMatching(order="depth", batch_size=20)
    assert len({method, CovarianceMatching(order="depth", batch_size=20), CovarianceMatching()}) == 2
    assert method.match(spec, a, b, apply_fn=chain, data=x, key=KEY_) == covariance_matching(
        spec, a, b, chain, x, key=KEY_, order="depth", batch_size=20
    )
    with pytest.raises(ConfigError, match="needs apply_fn, data, key"):
        method.match(spec, a, b, apply_fn=chain, data=x)


def test_float64():
    with jax.enable_x64(True):
        a, b = (jax.tree.map(lambda leaf: leaf.astype(jnp.float64), chain_tree(s)) for s in (0, 10))
        x = normal(37, 4, seed=3).astype(jnp.float64)
        spec = rebasin.infer_spec(chain, a, x)
        weighted = apply_metric(spec, a, chain, x, batch_size=10)
        for (w, _), (new, _), moment in zip(a, weighted, second_moments(a, x), strict=True):
            np.testing.assert_allclose(new, moment @ np.asarray(w), rtol=1e-12)
        by_values = rebasin.activation_matching(spec, a, b, chain, x)
        assert by_values.objective[1] > by_values.objective[0]
