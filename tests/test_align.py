"""One call aligns two networks: it infers, verifies, matches and permutes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case

import rebasin
from rebasin import Batch, WeightMatching
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
