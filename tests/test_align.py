"""One call aligns two networks: it infers, verifies, matches and permutes."""

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import build_case

import rebasin
from rebasin import Batch, StraightThroughMatching, WeightMatching
from rebasin.errors import ConfigError, InferenceError, TreeMismatchError, VerificationError

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def case():
    return build_case("mlp")


def test_a_planted_permutation_is_undone_in_one_call(case):
    aligned = rebasin.align(case.apply_fn, case.params_a, case.planted, case.data.inputs[:1])
    chex.assert_trees_all_equal(aligned.params, jax.tree.map(jnp.asarray, case.params_a))
    assert aligned.spec == case.spec
    assert aligned.permutation is aligned.match.permutation
    chex.assert_trees_all_equal(
        aligned.params, rebasin.permute(aligned.spec, aligned.permutation, case.planted)
    )


def test_it_is_the_four_steps_one_after_the_other(case):
    x = case.data.inputs[:2]
    aligned = rebasin.align(case.apply_fn, case.params_a, case.params_b, x, method=WeightMatching(restarts=3))
    spec = rebasin.infer_spec(case.apply_fn, case.params_a, x)
    assert aligned.spec == spec
    assert aligned.match == rebasin.weight_matching(spec, case.params_a, case.params_b, key=KEY, restarts=3)


def test_a_known_spec_is_used_as_it_is(case):
    networks = case.apply_fn, case.params_a, case.params_b
    aligned = rebasin.align(*networks, spec=case.spec, verify=False, key=jax.random.key(3))
    assert aligned.spec is case.spec
    assert aligned.match == rebasin.weight_matching(case.spec, *networks[1:], key=jax.random.key(3))


@pytest.mark.parametrize("method", ["activations", "covariance"])
def test_a_method_that_needs_data_takes_the_inputs(case, method):
    inputs = case.data.inputs
    aligned = rebasin.align(case.apply_fn, case.params_a, case.params_b, inputs, method=method)
    by_hand = rebasin.match(
        case.spec, case.params_a, case.params_b, method, key=KEY, apply_fn=case.apply_fn, data=inputs
    )
    assert aligned.match == by_hand


def test_a_method_that_minimises_a_loss_takes_labels():
    def apply_fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    rng = np.random.default_rng(0)
    a, b = (
        {
            "w": rng.normal(size=(3, 5)).astype(np.float32),
            "v": rng.normal(size=(5, 4)).astype(np.float32),
        }
        for _ in "ab"
    )
    x = rng.normal(size=(20, 3)).astype(np.float32)
    method = rebasin.StraightThroughMatching(num_steps=2)
    with pytest.raises(ConfigError) as info:
        rebasin.align(apply_fn, a, b, x, method=method)
    assert str(info.value) == (
        "the method 'straight_through' minimises a loss: pass data=Batch(inputs, labels) for the cross "
        "entropy, or metrics_fn"
    )
    data = Batch(x, rng.integers(0, 4, 20))
    aligned = rebasin.align(apply_fn, a, b, x, method=method, data=data)
    metrics_fn = rebasin.classification_metrics(apply_fn)
    by_hand = rebasin.match(aligned.spec, a, b, method, key=KEY, metrics_fn=metrics_fn, data=data)
    assert aligned.match == by_hand


def test_several_inputs_are_passed_one_by_one():
    def apply_fn(params, x, shift):
        return jnp.tanh(x @ params["w"] + shift[:, None]) @ params["v"]

    rng = np.random.default_rng(0)
    a = {"w": rng.normal(size=(3, 6)).astype(np.float32), "v": rng.normal(size=(6, 2)).astype(np.float32)}
    inputs = rng.normal(size=(30, 3)).astype(np.float32), rng.normal(size=30).astype(np.float32)
    spec = rebasin.infer_spec(apply_fn, a, *inputs)
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=KEY), a)
    for method in ("weights", "activations", "covariance"):
        aligned = rebasin.align(apply_fn, a, b, *inputs, method=method)
        chex.assert_trees_all_equal(aligned.params, jax.tree.map(jnp.asarray, a))


def test_what_cannot_work_is_refused_before_anything_is_traced(case):
    def never(params, *inputs):
        raise AssertionError("traced")

    networks = case.params_a, case.params_b
    with pytest.raises(ConfigError, match="no matching method is called 'magic'; there are weights, "):
        rebasin.align(never, *networks, case.data.inputs, method="magic")
    with pytest.raises(ConfigError, match="align needs example inputs to infer the symmetries, got none"):
        rebasin.align(never, *networks)
    with pytest.raises(ConfigError, match=r"to verify the spec \(verify=False leaves that out\), got none"):
        rebasin.align(never, *networks, spec=case.spec)
    with pytest.raises(TreeMismatchError, match="params_a and params_b differ"):
        rebasin.align(never, case.params_a, {"params": {}}, case.data.inputs)


def test_a_wrong_spec_and_wrong_inputs_are_errors(case):
    table = {path: [None] * np.ndim(leaf) for path, leaf in rebasin.trees.leaf_table(case.params_a).items()}
    wrong = rebasin.PermutationSpec.from_axes(table | {"params/Dense_0/bias": ("P",)})
    networks = case.apply_fn, case.params_a, case.params_b
    with pytest.raises(VerificationError, match="the spec changes the function"):
        rebasin.align(*networks, case.data.inputs[:1], spec=wrong)
    with pytest.raises(InferenceError, match="cannot be traced"):
        rebasin.align(*networks, np.ones((1, 2), np.float32))


class Headed(nn.Module):
    """A trunk with a head for some number of classes."""

    num_classes: int
    deep: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(7, name="l1")(nn.relu(nn.Dense(8, name="l0")(x))))
        if self.deep:
            x = nn.relu(nn.Dense(6, name="extra")(x))
        return nn.Dense(self.num_classes, name="head")(x)


X = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)


def headed(num_classes, seed, **options):
    shapes = jax.eval_shape(Headed(num_classes, **options).init, jax.random.key(0), X)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("method", ["weights", "activations", "covariance", "frank_wolfe"])
def test_trunks_with_heads_of_their_own(method):
    """A planted order of the trunk is found, and B computes what it did, with its own number of classes."""
    a, head = headed(10, 1), headed(4, 2)["params"]["head"]
    spec = rebasin.infer_spec(Headed(10).apply, a, X)
    planted = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=KEY), a)
    b = {"params": {**planted["params"], "head": head}}
    aligned = rebasin.align(
        Headed(10).apply, a, b, X, method=method, shared=["params/l0", "params/l1"], data=X
    )
    for name in ("l0", "l1"):
        chex.assert_trees_all_equal(
            aligned.params["params"][name], jax.tree.map(jnp.asarray, a["params"][name])
        )
    assert aligned.params["params"]["head"]["kernel"].shape == (7, 4)
    np.testing.assert_allclose(
        Headed(4).apply(aligned.params, X), Headed(4).apply(b, X), rtol=1e-4, atol=1e-4
    )
    assert jax.tree.structure(aligned.params) == jax.tree.structure(b)


def test_heads_that_cannot_be_understood_are_refused():
    a, deep = headed(10, 1), headed(4, 2, deep=True)
    trunk = ["params/l0", "params/l1"]
    with pytest.raises(TreeMismatchError) as info:
        rebasin.align(Headed(10).apply, a, deep, X, shared=trunk)
    assert str(info.value).splitlines() == [
        "heads that are not shared must have the same leaves and numbers of axes in both networks:",
        "  params/extra/bias: only in params_b",
        "  params/extra/kernel: only in params_b",
    ]
    with pytest.raises(ConfigError, match="'params/l9' names no leaf"):
        rebasin.align(Headed(10).apply, a, headed(4, 2), X, shared=["params/l0", "params/l9"])
    with pytest.raises(TreeMismatchError, match=r"params/head/bias: shape \(10,\) in params_a, \(4,\)"):
        rebasin.align(Headed(10).apply, a, headed(4, 2), X, shared=["params"])


@pytest.mark.parametrize(("low", "high"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.bfloat16)])
def test_networks_of_two_floating_types(case, low, high):
    """They are matched in the wider type, and B keeps its own."""
    a, b = (
        jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), tree)
        for tree, dtype in ((case.params_a, high), (case.planted, low))
    )
    for one, other in ((a, b), (b, a)):
        aligned = rebasin.align(case.apply_fn, one, other, spec=case.spec, verify=False)
        assert {x.dtype for x in jax.tree.leaves(aligned.params)} == {x.dtype for x in jax.tree.leaves(other)}
        chex.assert_trees_all_close(
            jax.tree.map(jnp.float32, aligned.params), jax.tree.map(jnp.float32, one), rtol=1e-2
        )
    with pytest.raises(TreeMismatchError, match="dtype float32 in params_a, int32 in params_b"):
        rebasin.align(case.apply_fn, case.params_a, jax.tree.map(np.int32, case.params_b), case.data.inputs)


def test_digits_that_only_one_network_has_decide():
    """The units of B differ beyond float32, in which A is."""
    spec = rebasin.PermutationSpec.from_axes({"w": (None, "P")})
    with jax.enable_x64(True):
        a, b = {"w": np.array([[1.0, 2.0]], np.float32)}, {"w": np.array([[1.0 + 1e-10, 1.0]])}
        aligned = rebasin.align(lambda params: 0, a, b, spec=spec, verify=False)
        assert aligned.permutation["P"].tolist() == [1, 0]
        assert aligned.params["w"].dtype == np.float64


def test_roles_reach_the_method(case):
    inputs = case.data.inputs[:2]
    only_first = {"params": "constant", "params/Dense_0": "weight"}
    aligned = rebasin.align(case.apply_fn, case.params_a, case.params_b, inputs, roles=only_first)
    assert aligned.match == rebasin.weight_matching(
        case.spec, case.params_a, case.params_b, key=KEY, roles=only_first
    )
    with pytest.raises(ConfigError, match="holds its options; got roles beside it"):
        rebasin.align(
            case.apply_fn, case.params_a, case.params_b, inputs, method=WeightMatching(), roles=only_first
        )


def test_b_from_a_checkpoint_takes_the_containers_of_a():
    def apply_fn(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"])
        return x

    rng = np.random.default_rng(0)
    a, b = ([{"w": rng.normal(size=(4, 4)).astype(np.float32)} for _ in range(3)] for _ in range(2))
    restored = {str(i): layer for i, layer in enumerate(b)}
    aligned = rebasin.align(apply_fn, a, restored, np.ones((2, 4), np.float32))
    chex.assert_trees_all_equal(
        aligned.params, rebasin.align(apply_fn, a, b, np.ones((2, 4), np.float32)).params
    )


class TestEveryLibrary:
    """One line for each library returns its own kind of network, in the order of the units of A."""

    x = jax.random.normal(jax.random.key(5), (6, 3))

    def planted(self, spec, tree, apply_fn):
        """The tree with its units in another order, after making sure that this changes the tree."""
        moved = rebasin.permute(spec, rebasin.random_permutation(spec, tree, key=jax.random.key(9)), tree)
        assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, moved, tree)))
        np.testing.assert_allclose(apply_fn(moved), apply_fn(tree), atol=1e-5)
        return moved

    def test_linen(self):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.relu(nn.Dense(8)(x))
                return nn.Dense(2)(x)

        model = Model()
        a = model.init(jax.random.key(0), self.x)
        spec = rebasin.infer_spec(model.apply, a, self.x)
        aligned = rebasin.align(model, a, self.planted(spec, a, lambda t: model.apply(t, self.x)), self.x)
        chex.assert_trees_all_equal(aligned.params, a)

    def test_haiku(self):
        transformed = hk.transform(lambda x: hk.nets.MLP([8, 2])(x))
        a = transformed.init(jax.random.key(0), self.x)
        apply_fn = lambda params, x: transformed.apply(params, None, x)  # noqa: E731
        spec = rebasin.infer_spec(apply_fn, a, self.x)
        b = self.planted(spec, a, lambda t: apply_fn(t, self.x))
        chex.assert_trees_all_equal(rebasin.align(transformed, a, b, self.x).params, a)

    def test_nnx(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.first, self.second = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

            def __call__(self, x):
                return self.second(jax.nn.relu(self.first(x)))

        a, b = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
        order = np.random.default_rng(0).permutation(8)
        b.first.kernel[...] = a.first.kernel[:, order]
        b.second.kernel[...] = a.second.kernel[order]
        aligned = rebasin.align(lambda model, x: model(x), a, b, self.x)
        assert isinstance(aligned.params, Model)
        chex.assert_trees_all_equal(nnx.state(aligned.params), nnx.state(a))

    def test_equinox(self):
        a = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
        order = np.random.default_rng(0).permutation(8)
        where = lambda m: (m.layers[0].weight, m.layers[0].bias, m.layers[1].weight)  # noqa: E731
        first, bias, second = where(a)
        b = eqx.tree_at(where, a, (first[order], bias[order], second[:, order]))
        apply_fn = lambda model, x: jax.vmap(model)(x)  # noqa: E731
        aligned = rebasin.align(apply_fn, a, b, self.x)
        assert isinstance(aligned.params, eqx.nn.MLP)
        chex.assert_trees_all_equal(eqx.filter(aligned.params, eqx.is_array), eqx.filter(a, eqx.is_array))
        np.testing.assert_allclose(apply_fn(aligned.params, self.x), apply_fn(b, self.x), atol=1e-5)
        # A method with data and a loss sees whole modules too.
        data = Batch(self.x, jnp.zeros(6, jnp.int32))
        by_loss = rebasin.align(
            apply_fn, a, b, self.x, method=StraightThroughMatching(num_steps=2), data=data
        )
        assert isinstance(by_loss.params, eqx.nn.MLP)

    def test_modules_with_other_functions_are_refused(self):
        a, b = (
            eqx.nn.MLP(3, 2, 8, 1, activation=activation, key=jax.random.key(0))
            for activation in (jnp.tanh, jnp.sin)
        )
        with pytest.raises(TreeMismatchError, match=r"no arrays differ:\n  activation: .*tanh.* in params_a"):
            rebasin.align(lambda model, x: jax.vmap(model)(x), a, b, self.x)
