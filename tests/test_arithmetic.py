import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin.arithmetic import distance, inner_product, interpolate
from rebasin.errors import ConfigError, TreeMismatchError
from rebasin.roles import weight_leaves
from rebasin.trees import leaf_table


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = {"up": (6, 5), "across": (5, 2, 3), "down": (2, 3, 4), "batch_stats/mean": (5,)}
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    mean = flat.pop("batch_stats/mean")
    return {**flat, "batch_stats": {"mean": mean}, "step": jnp.asarray(seed)}


def test_averages():
    trees = [draw(i) for i in range(3)]
    uniform, weighted = rebasin.average(trees), rebasin.average(trees, [1, 2, 1])
    for name in ("up", "across", "down"):
        leaves = [np.asarray(tree[name], np.float64) for tree in trees]
        np.testing.assert_allclose(uniform[name], sum(leaves) / 3, rtol=1e-5, atol=1e-6)
        expected = 0.25 * leaves[0] + 0.5 * leaves[1] + 0.25 * leaves[2]
        np.testing.assert_allclose(weighted[name], expected, rtol=1e-5, atol=1e-6)
    # A leaf that is no weight comes whole from the network of the largest weight, the first of several.
    assert (uniform["step"].tolist(), weighted["step"].tolist()) == (0, 1)
    chex.assert_trees_all_equal(weighted["batch_stats"], trees[1]["batch_stats"])
    assert jax.tree.map(lambda x: x.dtype, weighted) == jax.tree.map(lambda x: x.dtype, trees[0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_the_average_of_two_is_a_point_of_the_path(alpha):
    a, b = draw(0), draw(1)
    chex.assert_trees_all_close(
        rebasin.average([a, b], [alpha, 1 - alpha]), rebasin.interpolate(a, b, alpha), rtol=1e-6
    )


def test_averages_refuse_what_cannot_work():
    trees = [draw(i) for i in range(3)]
    with pytest.raises(ConfigError, match="an average needs at least one network, got none"):
        rebasin.average([])
    for weights in ([1, 1], [1, -1, 1], [0, 0, 0], [1, np.nan, 1]):
        with pytest.raises(ConfigError, match="weights must be 3 numbers, one for each network"):
            rebasin.average(trees, weights)
    narrow = {**trees[1], "up": jnp.ones((6, 4))}
    with pytest.raises(TreeMismatchError, match=r"up: shape \(6, 5\) in network 0, \(6, 4\) in network 1"):
        rebasin.average([trees[0], narrow])


def test_interpolation_is_exact_at_both_ends_for_every_leaf():
    rng = np.random.default_rng(0)
    a, b = (
        {
            "params": {
                "w": jnp.asarray(rng.normal(size=5), jnp.float32),
                "half": jnp.ones(2, jnp.bfloat16) * k,
            },
            "batch_stats": {"mean": jnp.full(5, k)},
            "step": jnp.asarray(k),
        }
        for k in (3, 7)
    )
    for alpha, expected in ((1.0, a), (0.0, b)):
        mixed = jax.jit(interpolate)(a, b, alpha)
        jax.tree.map(np.testing.assert_array_equal, mixed, expected)
        assert jax.tree.map(jnp.result_type, mixed) == jax.tree.map(jnp.result_type, a)
    quarter = interpolate(a, b, 0.25)
    np.testing.assert_allclose(
        quarter["params"]["w"], 0.25 * a["params"]["w"] + 0.75 * b["params"]["w"], rtol=1e-6
    )
    assert quarter["step"] == 7
    assert interpolate(a, b, 0.5)["step"] == 3  # those of A from the middle on
    np.testing.assert_array_equal(quarter["batch_stats"]["mean"], b["batch_stats"]["mean"])


class Normalised(nn.Module):
    """A network whose variables have running statistics beside the weights."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))


def test_distance_and_inner_product_count_the_weights_alone():
    """Running statistics of a BatchNorm network are 1000 apart, and change neither of the two."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Normalised().init, jax.random.key(0), jnp.ones((1, 3)))
    a, b = (jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes) for _ in range(2))
    assert set(a) == {"params", "batch_stats"}
    flat_a, flat_b = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree["params"])], dtype=np.float64)
        for tree in (a, b)
    )
    a["batch_stats"] = jax.tree.map(lambda x: x + 1000, a["batch_stats"])
    np.testing.assert_allclose(distance(a, b), np.linalg.norm(flat_a - flat_b), rtol=1e-14)
    np.testing.assert_allclose(inner_product(a, b), flat_a @ flat_b, rtol=1e-13)
    assert distance(a, b, leaves=leaf_table(a)) > 1000
    assert distance(a, a) == 0.0
    assert inner_product({"step": np.arange(3)}, {"step": np.arange(3)}) == 0.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distance_and_inner_product_are_summed_in_float64(dtype):
    """In float32, a sum of 2⁵² and 2 would be 2⁵²."""
    a = {"large": jnp.array([2.0**26, 1.0], dtype), "small": jnp.full(2**20, 2.0**-10, dtype)}
    zero = jax.tree.map(jnp.zeros_like, a)
    assert inner_product(a, a) == 2.0**52 + 1.0 + 1.0
    assert distance({"w": a["small"]}, {"w": zero["small"]}) == 1.0
    assert distance({"w": jnp.array([2.0**26, 1.0], dtype)}, {"w": jnp.array([2.0**26, 0.0], dtype)}) == 1.0
    assert isinstance(distance(a, zero), float)
    assert isinstance(inner_product(a, zero), float)


@pytest.mark.parametrize("function", [distance, inner_product])
def test_distance_and_inner_product_refuse_trees_that_differ(function):
    with pytest.raises(TreeMismatchError, match=r"w: shape \(3,\) in params_a, \(1,\) in params_b"):
        function({"w": np.ones(3)}, {"w": np.ones(1)})
    with pytest.raises(TreeMismatchError, match="v: only in params_b"):
        function({"w": np.ones(3)}, {"w": np.ones(3), "v": np.ones(3)})
    half, full = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": np.ones(3)}
    assert function(half, full) == function(full, full)


DTYPES = [jnp.float8_e4m3fn, jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(alpha=st.floats(0, 1, width=32), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=20)
def test_a_network_mixed_with_itself_is_itself_bit_for_bit(dtype, alpha, seed):
    values = np.random.default_rng(seed).normal(size=(5, 7)) * 10.0 ** np.arange(-5, 2)
    tree = {"w": jnp.asarray(values, jnp.float32).astype(dtype)}
    for mixed in (interpolate(tree, tree, alpha), rebasin.average([tree] * 3, [alpha + 0.1, 1, 0.3])):
        assert mixed["w"].dtype == dtype
        np.testing.assert_array_equal(np.asarray(mixed["w"]), np.asarray(tree["w"]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_types_are_rounded_once(dtype):
    """The oracle is float64; sums in the narrow type would be off by several units in the last place."""
    rng = np.random.default_rng(0)
    trees = [{"w": jnp.asarray(rng.normal(size=500), dtype)} for _ in range(5)]
    wide = [np.asarray(tree["w"], np.float64) for tree in trees]
    for mixed, exact in (
        (rebasin.average(trees), np.mean(wide, axis=0)),
        (interpolate(trees[0], trees[1], 0.3), 0.3 * wide[0] + 0.7 * wide[1]),
    ):
        error = np.abs(np.asarray(mixed["w"], np.float64) - exact)
        assert (error <= 0.501 * float(jnp.finfo(dtype).eps) * np.abs(exact) + 1e-7).all()


def test_equal_infinite_entries_stay():
    """A mask of −inf would become NaN at the ends of the path, where it is multiplied by zero."""
    mask = np.array([0.0, -np.inf], np.float32)
    a, b = {"mask": mask, "w": np.ones(1)}, {"mask": mask, "w": np.zeros(1)}
    for alpha in (0.0, 0.3, 1.0):
        np.testing.assert_array_equal(jax.jit(interpolate)(a, b, alpha)["mask"], mask)
    np.testing.assert_array_equal(rebasin.average([a, b], [1, 0])["mask"], mask)


def test_gradients_go_through_equal_leaves():
    """Methods that learn start where networks are alike."""
    same = {"w": jnp.arange(3.0)}

    def loss(a, b, alpha):
        return (interpolate(a, b, alpha)["w"] ** 2).sum()

    grad_a, grad_b, grad_alpha = jax.grad(loss, argnums=(0, 1, 2))(same, same, 0.25)
    np.testing.assert_allclose(grad_a["w"], 0.25 * 2 * same["w"], rtol=1e-6)
    np.testing.assert_allclose(grad_b["w"], 0.75 * 2 * same["w"], rtol=1e-6)
    assert grad_alpha == 0
    other = {"w": jnp.array([1.0, -1.0, 5.0])}
    chex.assert_numerical_grads(lambda a, b: loss({"w": a}, {"w": b}, 0.25), (same["w"], other["w"]), order=1)
    slope = jax.grad(loss, argnums=2)(same, other, 0.25)
    middle = interpolate(same, other, 0.25)["w"]
    np.testing.assert_allclose(slope, (2 * middle * (same["w"] - other["w"])).sum(), rtol=1e-5)


def test_common_infinite_entries_have_no_gradient():
    """Neither forwards nor backwards, where zero times infinity would be NaN."""
    same = {"mask": jnp.array([0.0, -jnp.inf])}

    def loss(alpha):
        return jnp.exp(interpolate(same, same, alpha)["mask"]).sum()

    assert jax.grad(loss)(0.25) == 0
    assert jax.jvp(loss, (0.25,), (1.0,)) == (1, 0)


@pytest.mark.parametrize("other", range(3))
def test_one_of_three_networks_counts_where_the_others_agree(other):
    trees = [{"w": jnp.full(2, 4.0 if i == other else 0.0)} for i in range(3)]
    np.testing.assert_allclose(rebasin.average(trees, [2, 1, 1])["w"], 2.0 if other == 0 else 1.0)


def test_under_jit_counters_come_from_the_largest_share():
    trees = [draw(i) for i in range(3)]
    weights = weight_leaves(trees[0])
    mixed = jax.jit(lambda shares: rebasin.arithmetic.mix(trees, shares, weights))(jnp.array([0.3, 0.5, 0.2]))
    chex.assert_trees_all_equal(mixed["batch_stats"], trees[1]["batch_stats"])
    assert mixed["step"] == 1
    np.testing.assert_allclose(mixed["up"], rebasin.average(trees, [3, 5, 2])["up"], rtol=1e-5, atol=1e-6)


BLOCKS = [
    {"layers": [{"w": jnp.full(2, v), "b": jnp.full(1, v)} for _ in range(3)], "head": jnp.full(n, v)}
    for v, n in ((1.0, 2), (0.0, 2), (5.0, 2))
]


def test_a_ratio_for_each_layer():
    a, b, _ = BLOCKS
    mixed = interpolate(a, b, {"": 0.5, "layers/1": 0.25, "layers/*/b": 0.75, "head": 0})
    assert [layer["w"][0] for layer in mixed["layers"]] == [0.5, 0.25, 0.5]
    assert [layer["b"][0] for layer in mixed["layers"]] == [0.75, 0.75, 0.75]
    chex.assert_trees_all_equal(mixed["head"], b["head"])
    mean = rebasin.average(BLOCKS, {"": [1, 1, 2], "layers/2": [0, 1, 0]})
    assert [float(layer["w"][0]) for layer in mean["layers"]] == [2.75, 2.75, 0.0]
    traced = jax.jit(lambda x: interpolate(a, b, {"": x, "head": 1}))(0.25)
    assert traced["layers"][0]["w"][0] == 0.25
    chex.assert_trees_all_equal(traced["head"], a["head"])


def test_leaves_are_taken_from_one_network_whatever_the_others_have_there():
    a, b, c = BLOCKS
    other = {**b, "head": {"up": jnp.ones((2, 9)), "down": jnp.ones(9)}}
    mixed = interpolate(a, other, {"": 0.5, "head": 1})
    chex.assert_trees_all_equal(mixed["head"], a["head"])
    assert mixed["layers"][0]["w"][0] == 0.5
    mean = rebasin.average([a, other, c], {"": [1, 1, 1], "head": [3, 0, 0]})
    chex.assert_trees_all_equal(mean["head"], a["head"])
    assert mean["layers"][0]["w"][0] == 2
    mixed = interpolate(a, b, {"": 1, "layers/1": 0.5})
    assert [layer["w"][0] for layer in mixed["layers"]] == [1, 0.5, 1]
    with pytest.raises(TreeMismatchError, match="head: only in params_a"):
        interpolate(a, other, {"": 0.5, "head": 0.9})
    with pytest.raises(TreeMismatchError, match="head: only in params_a"):
        interpolate(a, other, 1)


def test_ratios_that_do_not_fit_are_refused():
    a, b, _ = BLOCKS
    with pytest.raises(ConfigError) as info:
        interpolate(a, b, {"layers": 0.5, "heads": 1})
    assert str(info.value).splitlines() == [
        'alpha does not fit the tree (the name "" is the whole tree):',
        "  head: no name fits this leaf",
        "  'heads' names no leaf",
    ]


def test_integers_are_no_weights_that_could_be_averaged():
    a = {"q": np.ones((2, 2), np.int8), "scale": np.ones(2)}
    b = {"q": np.zeros((2, 2), np.int8), "scale": np.zeros(2)}
    for mix in (lambda **k: interpolate(a, b, 0.5, **k), lambda **k: rebasin.average([a, b], **k)):
        with pytest.raises(TreeMismatchError, match=r"integers; dequantise them first(.|\n)*q: int8"):
            mix()
        assert mix(roles={"q": "constant"})["scale"].tolist() == [0.5, 0.5]


def test_networks_of_other_containers_and_optimisers_are_mixed_by_name():
    a = {"layers": [jnp.full(1, float(i)) for i in range(12)]}
    b = {"layers": {str(i): jnp.full(1, float(i)) for i in range(12)}}
    for mixed in (interpolate(a, b, 0.25), rebasin.average([a, b])):
        chex.assert_trees_all_equal(mixed, a)
    assert inner_product(a, b) == inner_product(a, a)
    assert distance(a, b) == 0


def test_statistics_of_any_library_come_from_the_nearer_network():
    a, b = ({"bn.running_mean": np.full(2, v), "bn.weight": np.full(2, v)} for v in (0.0, 100.0))
    mixed = interpolate(a, b, 0.25)
    assert (mixed["bn.running_mean"][0], mixed["bn.weight"][0]) == (100, 75)
    mixed = interpolate(a, b, 0.25, roles={"bn.running_mean": "weight"})
    assert mixed["bn.running_mean"][0] == 75
