import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from zoo import KEY, ZOO, arrays

import rebasin
from rebasin import PermutationSpec, activation_matching
from rebasin.batches import Batch, Batches
from rebasin.errors import (
    ConfigError,
    DataError,
    InferenceError,
    NonFiniteError,
    SpecMismatchError,
    TreeMismatchError,
)
from rebasin.matching.activations import ActivationMatching
from rebasin.matching.site_products import Measurement, sum_products
from rebasin.models import MLP, VGG16, ResNet20, ViT
from rebasin.permutation import check_permutation
from rebasin.tracing.program import Static

SPEC = PermutationSpec.from_axes({"w": (None, "P0"), "b": ("P0",), "v": ("P0", None)})


def network(tree, x):
    return jnp.tanh(x @ tree["w"] + tree["b"][None]) @ tree["v"]


def layer(seed, width=7, inputs=3):
    rng = np.random.default_rng(seed)
    shapes = {"w": (inputs, width), "b": (width,), "v": (width, 2)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def examples(*shape, seed=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def hidden(tree, x):
    """The site by hand, float64."""
    w, b = (np.asarray(tree[name], np.float64) for name in "wb")
    return np.tanh(np.asarray(x, np.float64) @ w + b)


def similarity(kind, a, b):
    """[n, n] by hand from samples [s, n]."""
    if kind == "inner":
        return a.T @ b / len(a)
    a, b = a - a.mean(0), b - b.mean(0)
    scale = np.outer(a.std(0), b.std(0))
    return np.divide(a.T @ b / len(a), scale, out=np.zeros_like(scale), where=scale > 1e-7)


def value(matrix, rows):
    return matrix[np.arange(len(rows)), rows].sum()


@pytest.mark.parametrize("kind", ["inner", "correlation"])
@given(seed=st.integers(0, 10**6), batch_size=st.sampled_from([4, 30]))
@settings(max_examples=8)
def test_one_layer_is_scipys_optimum(kind, seed, batch_size):
    a, b, x = layer(seed), layer(seed + 1), examples(23, 3, seed=seed)
    match = activation_matching(SPEC, a, b, network, x, batch_size=batch_size, similarity=kind)
    matrix = similarity(kind, hidden(a, x), hidden(b, x))
    best = value(matrix, linear_sum_assignment(matrix, maximize=True)[1])
    expected = [np.trace(matrix), best]
    np.testing.assert_allclose(match.objective, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value(matrix, match.permutation["P0"]), best, rtol=1e-4, atol=1e-5)
    assert match.stats["examples"] == 23
    assert match.stats["passes"] == match.num_iterations == 1
    assert match.converged


def planted(function, tree, *inputs, state_outputs=None):
    spec = rebasin.infer_spec(function, tree, *inputs, state_outputs=state_outputs)
    moved = rebasin.permute(spec, rebasin.random_permutation(spec, tree, key=jax.random.key(1)), tree)
    return spec, moved


MODELS = {
    "mlp": (MLP((16, 12), 3), (40, 2, 2, 1)),
    "vgg16": (VGG16(2, 3), (2, 32, 32, 1)),
    "resnet20": (ResNet20(2, 3), (2, 8, 8, 1)),
    "vit": (ViT(8, 3, depth=1, num_heads=2), (4, 4, 4, 1)),
}


@pytest.mark.parametrize("kind", ["inner", "correlation"])
@pytest.mark.parametrize("seed", range(3))
def test_planted_permutation_is_recovered_exactly(seed, kind):
    def deep(tree, x):
        for w in tree[:-1]:
            x = jnp.tanh(x @ w)
        return x @ tree[-1]

    tree = [
        examples(m, n, seed=seed + i) / np.sqrt(m) for i, (m, n) in enumerate([(5, 32), (32, 24), (24, 3)])
    ]
    x = examples(100, 5)
    spec, moved = planted(deep, tree, x)
    match = activation_matching(spec, tree, moved, deep, x, similarity=kind, batch_size=30)
    chex.assert_trees_all_equal(rebasin.permute(spec, match.permutation, moved), tree)


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "mlp")]
)
def test_planted_network_is_as_similar_as_itself(name):
    """On every model; silent units cannot be told apart, so the permutation may differ."""
    model, shape = MODELS[name]
    x = examples(*shape)
    tree = arrays(jax.eval_shape(model.init, KEY, x))
    spec, moved = planted(model.apply, tree, x)
    match, itself = (activation_matching(spec, tree, other, model.apply, x) for other in (moved, tree))
    np.testing.assert_allclose(match.objective[-1], itself.objective[0], rtol=1e-4)
    assert match.objective[-1] > match.objective[0]


SPECIMENS = [
    *("maxout", "mlp_mixer", "lstm", "grouped_query_attention", "scan_over_residual_layers"),
    *("channel_shuffle", "soft_mixture_of_experts", "u_net"),
]


@pytest.mark.parametrize("sites", ["last", "all"])
@pytest.mark.parametrize(
    "name", [*SPECIMENS, *(pytest.param(n, marks=pytest.mark.slow) for n in ZOO if n not in SPECIMENS)]
)
def test_zoo(name, sites):
    """Planted with the same data: what is reached is the similarity of a network with itself."""
    if name.endswith(("equinox", "haiku")):
        pytest.importorskip(name.rsplit("_", 1)[1])
    specimen = ZOO[name].build()

    function = specimen.function
    tree, inputs = arrays(specimen.tree), arrays(specimen.inputs, seed=1)
    spec, moved = planted(function, tree, *inputs, state_outputs=specimen.state_outputs)
    match = activation_matching(spec, tree, moved, function, inputs, sites=sites)
    check_permutation(spec, tree, match.permutation)
    itself = activation_matching(spec, tree, tree, function, inputs, sites=sites)
    np.testing.assert_allclose(match.objective[-1], itself.objective[0], rtol=1e-4)
    assert match.objective[1] >= match.objective[0]


def test_heads_are_paired_by_their_inner_units():
    """By hand: the best of all pairings of two heads, each with the best match of its dimensions."""

    def attention(tree, x):
        mixed = jnp.einsum("bi,ihd->bhd", x, tree["v"])
        return jnp.einsum("bhd,hdo->bo", jnp.tanh(mixed), tree["out"])

    rng = np.random.default_rng(0)
    a, b = ({"v": examples(3, 2, 4, seed=s), "out": examples(2, 4, 2, seed=s)} for s in (1, 2))
    x = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
    spec = rebasin.infer_spec(attention, a, x)
    outer, inner = spec.groups
    match = activation_matching(spec, a, b, attention, x)
    act = [np.tanh(np.einsum("bi,ihd->bhd", x, tree["v"])) for tree in (a, b)]

    def best(i, j):
        matrix = similarity("inner", act[0][:, i], act[1][:, j])
        return value(matrix, linear_sum_assignment(matrix, maximize=True)[1])

    values = {(p, 1 - p): best(0, p) + best(1, 1 - p) for p in (0, 1)}
    assert tuple(match.permutation[outer]) == max(values, key=values.get)
    # Both groups are carried by this value, so the objective counts it twice.
    np.testing.assert_allclose(match.objective[-1], 2 * max(values.values()), rtol=1e-4)
    assert match.stats["similarity"].keys() == {outer, inner}


def test_correlation_ignores_scale_and_shift_and_the_inner_product_does_not():
    def linear(tree, x):
        return (x @ tree["w"] + tree["b"][None]) @ tree["v"]

    a = layer(0)
    b = rebasin.permute(SPEC, {"P0": np.array([2, 0, 1, 6, 5, 3, 4])}, a)
    b |= {"w": b["w"] * jnp.array([[1e-2, 5, 1, 100, 1e-3, 1, 3]]), "b": b["b"] + 50}
    x = examples(64, 3)
    match = activation_matching(SPEC, a, b, linear, x, similarity="correlation", batch_size=10)
    assert match.permutation["P0"].tolist() == [1, 2, 0, 5, 6, 4, 3]
    np.testing.assert_allclose(match.objective[-1], 7, atol=1e-3)
    assert activation_matching(SPEC, a, b, linear, x).permutation["P0"].tolist() != [1, 2, 0, 5, 6, 4, 3]


def test_dead_and_constant_units_correlate_with_nothing():
    a = layer(0)
    a["w"] = a["w"].at[:, 3].set(0.0)
    a["b"] = a["b"].at[3].set(1.0)  # constant
    a["w"], a["b"] = a["w"].at[:, 5].set(0.0), a["b"].at[5].set(0.0)  # silent
    b = rebasin.permute(SPEC, {"P0": np.array([6, 5, 4, 3, 2, 1, 0])}, a)
    match = activation_matching(SPEC, a, b, network, examples(40, 3), similarity="correlation", batch_size=9)
    assert match.stats["constant_units"] == {"P0": (2, 2)}
    np.testing.assert_allclose(match.objective[-1], 5, rtol=1e-5)
    alive = [0, 1, 2, 4, 6]
    assert match.permutation["P0"][alive].tolist() == [6 - i for i in alive]


def test_all_sites_add_up():
    def residual(tree, x):
        first = jnp.tanh(x @ tree["w"])
        second = first + jnp.tanh(first @ tree["u"])
        return second @ tree["v"]

    a, b = (
        {"w": examples(3, 6, seed=s), "u": examples(6, 6, seed=s + 2), "v": examples(6, 2)} for s in (0, 1)
    )
    x = examples(20, 3)
    spec = rebasin.infer_spec(residual, a, x)
    first = [np.tanh(np.asarray(x @ t["w"], np.float64)) for t in (a, b)]
    second = [f + np.tanh(f @ np.asarray(t["u"], np.float64)) for f, t in zip(first, (a, b), strict=True)]
    matrices = {"last": similarity("inner", *second)}
    matrices["all"] = matrices["last"] + similarity("inner", *first)
    for sites, matrix in matrices.items():
        match = activation_matching(spec, a, b, residual, x, sites=sites, batch_size=8)
        best = value(matrix, linear_sum_assignment(matrix, maximize=True)[1])
        np.testing.assert_allclose(match.objective, [np.trace(matrix), best], rtol=1e-4)


def test_deterministic_and_traced_once():
    count = []

    def counted(tree, x):
        count.append(x.shape)
        return network(tree, x)

    a, b, x = layer(0), layer(1), examples(23, 3)
    first = activation_matching(SPEC, a, b, counted, x, batch_size=10)
    traces = len(count)
    assert set(count) == {(10, 3), (3, 3)}  # one trace for whole batches, one for the rest
    assert activation_matching(SPEC, a, b, counted, x, batch_size=10) == first
    activation_matching(SPEC, b, a, counted, x + 1, batch_size=10)
    assert len(count) == traces


def test_memory_does_not_depend_on_the_size_of_the_split():
    a, b = layer(0, width=64, inputs=32), layer(1, width=64, inputs=32)

    def temporary(n, kind):
        inputs = (jnp.zeros((n, 32)),)
        measurement = Measurement(SPEC, Static(network), Batches.of(inputs, 50), "last", kind)
        lowered = sum_products.lower(measurement, (0,), a, b, inputs)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    for kind in ("inner", "correlation"):
        assert temporary(500, kind) == temporary(20_000, kind)


def two_inputs(tree, x, y):
    hidden = jnp.tanh(x @ tree["w"] + y @ tree["u"] + tree["b"][None])
    return hidden @ tree["v"]


def test_a_batch_and_its_inputs_alone_are_the_same():
    """Labels are ignored, whatever their dtype; several inputs are handed over one by one."""
    a, b, x = layer(0), layer(1), examples(23, 3)
    alone = activation_matching(SPEC, a, b, network, x, batch_size=10)
    for data in (Batch(x), Batch(x, np.full(23, np.nan)), Batch((x,), np.arange(23)), (x,)):
        assert activation_matching(SPEC, a, b, network, data, batch_size=10) == alone
    with pytest.raises(DataError, match="labels: 22 examples"):
        activation_matching(SPEC, a, b, network, Batch(x, np.arange(22)))

    y = examples(23, 2, seed=8)
    a, b = ({**layer(seed), "u": examples(2, 7, seed=seed + 20)} for seed in (0, 1))
    spec = rebasin.infer_spec(two_inputs, a, x, y)
    match = activation_matching(spec, a, b, two_inputs, Batch((x, y), np.arange(23)), batch_size=10)
    joined = [{"w": jnp.concatenate([t["w"], t["u"]]), "b": t["b"], "v": t["v"]} for t in (a, b)]
    expected = activation_matching(SPEC, *joined, network, jnp.concatenate([x, y], axis=1), batch_size=10)
    np.testing.assert_allclose(match.objective, expected.objective, rtol=1e-5)
    (group,) = match.permutation
    np.testing.assert_array_equal(match.permutation[group], expected.permutation["P0"])


def test_a_method_is_a_value_that_holds_its_options():
    a, b, x = layer(0), layer(1), examples(23, 3)
    method = ActivationMatching(similarity="correlation", batch_size=10)
    assert method == ActivationMatching(similarity="correlation", batch_size=10)
    assert len({method, ActivationMatching()}) == 2
    assert method.match(SPEC, a, b, apply_fn=network, data=x) == activation_matching(
        SPEC, a, b, network, x, similarity="correlation", batch_size=10
    )
    with pytest.raises(ConfigError, match="needs apply_fn, data"):
        method.match(SPEC, a, b)


def test_width_one_and_no_groups():
    tree, x = layer(0, width=1), examples(4, 3)
    match = activation_matching(SPEC, tree, tree, network, x)
    assert match.permutation["P0"].tolist() == [0]
    assert match.objective.tolist() == [0, 0]
    still = PermutationSpec.from_axes({"w": (None, None), "b": (None,), "v": (None, None)})
    assert activation_matching(still, layer(0), layer(1), network, x).permutation == {}


def test_two_nets_of_the_same_values_stay():
    tree, x = layer(0), examples(30, 3)
    match = activation_matching(SPEC, tree, tree, network, x)
    assert match.permutation["P0"].tolist() == list(range(7))
    assert match.objective[0] == match.objective[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"similarity": "cosine"}, ConfigError, "unknown similarity 'cosine'"),
        ({"sites": "first"}, ConfigError, "unknown sites 'first'"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"data": jnp.ones((0, 3))}, DataError, "no examples"),
        ({"data": jnp.full((2, 3), jnp.nan)}, NonFiniteError, "data is not finite"),
        ({"data": jnp.ones((5, 4))}, InferenceError, r"cannot be traced with batch float32\[5, 4\]: .*"),
        ({"params_b": layer(0) | {"b": jnp.full(7, jnp.inf)}}, NonFiniteError, "params_b is not finite"),
        ({"params_b": layer(0, width=6)}, TreeMismatchError, "w: shape"),
        ({"params_a": layer(0) | {"x": 1}, "params_b": layer(0) | {"x": 1}}, SpecMismatchError, "x: shape"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "params_a": layer(0), "params_b": layer(1), "apply_fn": network, "data": examples(5, 3)
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        activation_matching(SPEC, **arguments)


def test_values_that_overflow_are_named():
    def apply(tree, x):
        return jnp.exp(100 * (x @ tree["w"] + tree["b"][None])) @ tree["v"]

    with pytest.raises(NonFiniteError, match="carry group 'P0' are not finite"):
        activation_matching(SPEC, layer(0), layer(1), apply, 10 * examples(5, 3))


def test_group_without_a_site_is_named():
    def apply(tree, x):
        return x @ (tree["w"] @ tree["v"]) + tree["b"].sum()

    with pytest.raises(InferenceError, match=r"no value that depends on the data carries .*\n  'P0'"):
        activation_matching(SPEC, layer(0), layer(1), apply, examples(5, 3))
