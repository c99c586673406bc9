"""What holds for every matching method; a new one in `METHODS` is tested here without a change."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case

import rebasin
from rebasin.batches import Batch
from rebasin.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    PermutationError,
    SpecMismatchError,
    TreeMismatchError,
)
from rebasin.matching.registry import METHODS
from rebasin.permutation import check_permutation

KEY = jax.random.key(0)

every_method = pytest.mark.parametrize("method", METHODS)


def has(method, option):
    return option in (field.name for field in dataclasses.fields(METHODS[method]))


def run(method, case, params_a, params_b, **changes):
    """Match with all that a case has to give, and with few steps where the method has that choice."""
    options = {"num_steps": 3, "batch_size": 16}
    arguments = {
        "key": KEY,
        "apply_fn": case.apply_fn,
        "metrics_fn": case.metrics_fn,
        "data": case.data,
        **{name: value for name, value in options.items() if has(method, name)},
    }
    return rebasin.match(case.spec, params_a, params_b, method, **arguments | changes)


@every_method
@pytest.mark.parametrize(
    "name",
    ["mlp", "complex", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet", "vit", "fused"))],
)
def test_a_planted_permutation_is_recovered(method, name):
    """Exactly, unless the method compares activations, which are all zero for some units."""
    case = build_case(name)
    match = run(method, case, case.params_a, case.planted)
    if "apply_fn" in METHODS[method]().needs:
        alike = run(method, case, case.params_a, case.params_a)
        assert match.objective[-1] == pytest.approx(alike.objective[-1], rel=1e-5)
    else:
        restored = rebasin.permute(case.spec, match.permutation, case.planted)
        chex.assert_trees_all_equal(restored, jax.tree.map(jnp.asarray, case.params_a))


@every_method
@pytest.mark.parametrize("name", ["mlp", "width_one", "complex", pytest.param("vit", marks=pytest.mark.slow)])
def test_the_result_keeps_its_contract(method, name):
    case = build_case(name)
    match = run(method, case, case.params_a, case.params_b)
    check_permutation(case.spec, case.params_a, match.permutation)
    assert tuple(match.permutation) == case.spec.groups
    assert {row.dtype for row in match.permutation.values()} == {np.dtype(np.int32)}
    assert match.objective.dtype == np.float64
    assert match.objective.shape == (match.num_iterations + 1,)
    assert np.isfinite(match.objective).all()
    assert (np.diff(match.objective) >= 0).all()
    assert isinstance(match.converged, bool)
    assert match.stats["seconds"] > 0
    assert jax.tree.structure(match) == jax.tree.structure(jax.tree.map(lambda leaf: leaf, match))


@every_method
def test_never_worse_than_the_start(method):
    """The objective of a given start stands first, and starting from a result begins at its objective."""
    if not has(method, "start"):
        pytest.skip(f"{method} takes no start")
    case = build_case("mlp")
    start = rebasin.random_permutation(case.spec, case.params_a, key=jax.random.key(3))
    first = run(method, case, case.params_a, case.params_b, start=start)
    assert first.objective[-1] >= first.objective[0]
    second = run(method, case, case.params_a, case.params_b, start=first.permutation)
    assert second.objective[0] == pytest.approx(first.objective[-1], rel=1e-6)
    # The network brought to its start beforehand has the same objective under the identity.
    moved = rebasin.permute(case.spec, start, case.params_b)
    identity = rebasin.identity_permutation(case.spec, moved)
    third = run(method, case, case.params_a, moved, start=identity)
    assert third.objective[0] == pytest.approx(first.objective[0], rel=1e-5)
    with pytest.raises(PermutationError, match="missing"):
        run(method, case, case.params_a, case.params_b, start={})
    with pytest.raises(ConfigError, match="unknown start 'nowhere'; known: "):
        run(method, case, case.params_a, case.params_b, start="nowhere")


@every_method
@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
def test_deterministic_for_a_key(method, name):
    case = build_case(name)
    first, second = (run(method, case, case.params_a, case.params_b) for _ in range(2))
    assert first == second


@every_method
def test_equal_networks_stay(method):
    case = build_case("mlp")
    match = run(method, case, case.params_a, case.params_a)
    assert rebasin.fixed_points(match.permutation).total == 1.0


@every_method
def test_state_moves_but_does_not_count(method):
    """Counters, running statistics and their NaN: neither refused nor compared."""
    case = build_case("mlp")
    state = {"batch_stats": {"mean": np.arange(9.0, dtype=np.float32)}, "step": np.int32(3)}
    axes = {"batch_stats/mean": (case.spec.groups[0],), "step": ()}
    spec = rebasin.PermutationSpec.from_axes({**case.spec.table, **axes})
    a, b = ({**tree, **state} for tree in (case.params_a, case.planted))
    b["batch_stats"] = {"mean": np.full(9, np.nan, np.float32)}
    without = case._replace(spec=spec, apply_fn=lambda tree, x: case.apply_fn({"params": tree["params"]}, x))
    match = run(method, without, a, b)
    restored = rebasin.permute(spec, match.permutation, b)
    chex.assert_trees_all_equal(restored["params"], jax.tree.map(jnp.asarray, case.params_a["params"]))


@every_method
def test_networks_that_are_not_finite_are_refused(method):
    case = build_case("mlp")
    broken = jax.tree.map(np.copy, case.params_b)
    broken["params"]["Dense_0"]["kernel"][0, 0] = np.nan
    with pytest.raises(NonFiniteError) as info:
        run(method, case, case.params_a, broken)
    assert str(info.value) == (
        "params_b is not finite:\n  params/Dense_0/kernel: 1 NaN and 0 infinite of 54 values"
    )


@every_method
def test_networks_of_different_shapes_are_refused(method):
    case = build_case("mlp")
    with pytest.raises(TreeMismatchError, match=r"Dense_0/kernel: shape \(6, 9\) in params_a, \(6, 1\)"):
        run(method, case, case.params_a, build_case("width_one").params_a)


@every_method
def test_data_that_cannot_be_used_are_refused(method):
    if "data" not in METHODS[method]().needs:
        pytest.skip(f"{method} takes no data")
    case = build_case("mlp")
    empty = jax.tree.map(lambda x: x[:0], case.data)
    with pytest.raises(DataError, match="data hold no examples"):
        run(method, case, case.params_a, case.params_b, data=empty)
    inputs, labels = case.data
    if "metrics_fn" in METHODS[method]().needs:
        uneven, names = Batch(inputs, labels[:7]), ("inputs", "labels")
    else:
        uneven, names = (inputs, inputs[:7]), ("0", "1")
    with pytest.raises(DataError) as info:
        run(method, case, case.params_a, case.params_b, data=uneven)
    assert str(info.value) == (
        f"data must be arrays [n, …] with one common n:\n  {names[0]}: 40 examples\n  {names[1]}: 7 examples"
    )
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        run(method, case, case.params_a, case.params_b, batch_size=0)


@every_method
def test_a_loss_of_the_wrong_shape_is_named(method):
    if "metrics_fn" not in METHODS[method]().needs:
        pytest.skip(f"{method} takes no loss")
    case = build_case("mlp")

    def refusal(metrics_fn):
        with pytest.raises(DataError) as info:
            run(method, case, case.params_a, case.params_b, metrics_fn=metrics_fn)
        return str(info.value)

    assert refusal(lambda p, b: {"loss": jnp.mean(case.metrics_fn(p, b)["loss"])}) == (
        'metrics_fn must return one "loss" for each example, a floating array of shape (16,) for a batch of '
        "16; got float32 array of shape ()"
    )
    assert refusal(lambda p, b: {"loss": case.metrics_fn(p, b)}).endswith("got a dict")
    assert refusal(lambda p, b: case.metrics_fn(p, b)["loss"]) == (
        'metrics_fn must return a dictionary with the key "loss"; got float32 array of shape (16,)'
    )
    assert refusal(lambda p, b: {"error": case.metrics_fn(p, b)["loss"]}).endswith("got the keys ['error']")


@every_method
def test_b_is_paired_with_a_by_path_name(method):
    """Eleven layers of one shape in a list, and the same as a checkpoint gives them back: "10" before "2"."""
    rng = np.random.default_rng(0)
    axes = {
        f"layers/{i}/{name}": (None, f"P{i}")[:: 1 if name == "u" else -1] for i in range(11) for name in "uv"
    }
    spec = rebasin.PermutationSpec.from_axes(axes)
    a = {
        "layers": [{name: rng.normal(size=(5, 5)).astype(np.float32) / 2 for name in "uv"} for _ in range(11)]
    }
    b = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), a)
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=KEY), b)
    restored = {"layers": {str(i): layer for i, layer in enumerate(b["layers"])}}

    def apply(tree, x):
        layers = tree["layers"]
        for i in range(11):
            layer = layers[str(i)] if isinstance(layers, dict) else layers[i]
            x = x + jnp.tanh(x @ layer["u"]) @ layer["v"]
        return x

    x = rng.normal(size=(32, 5)).astype(np.float32)
    case = build_case("mlp")._replace(spec=spec, apply_fn=apply, data=Batch(x, np.asarray(apply(a, x))))
    options = {"num_steps": 1} if has(method, "num_steps") else {}
    assert run(method, case, a, restored, **options) == run(method, case, a, b, **options)


@every_method
@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_networks_of_half_precision_are_matched(method, dtype):
    case = build_case("mlp")

    def apply(params, x):
        return case.apply_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), x)

    a, planted = (jax.tree.map(lambda x: jnp.asarray(x, dtype), t) for t in (case.params_a, case.planted))
    match = run(method, case._replace(apply_fn=apply), a, planted)
    if "apply_fn" not in METHODS[method]().needs:
        chex.assert_trees_all_equal(rebasin.permute(case.spec, match.permutation, planted), a)
    assert np.isfinite(match.objective).all()


@every_method
def test_integers_are_no_weights(method):
    """Methods that compare activations evaluate the network, whatever its weights are."""
    case = build_case("mlp")
    a, b = (jax.tree.map(lambda x: (10 * x).astype(np.int8), tree) for tree in (case.params_a, case.params_b))
    if method == "activations":
        pytest.skip("activations are compared, not weights")
    with pytest.raises(TreeMismatchError, match="params_a holds weights that are integers; dequantise them"):
        run(method, case, a, b)


@every_method
def test_a_spec_that_moves_no_weight_is_refused(method):
    """Every permutation would be as good as any other."""
    case = build_case("mlp")
    if method == "activations":
        pytest.skip("activations are compared, not weights")
    with pytest.raises(SpecMismatchError, match="none of the leaves that the spec moves is a weight: "):
        run(method, case, case.params_a, case.params_b, roles={"params": "constant"})


@every_method
def test_a_mask_is_left_out_by_its_role(method):
    case = build_case("mlp")
    spec = rebasin.PermutationSpec.from_axes({**case.spec.table, "mask": (None,)})
    mask = {"mask": np.array([0.0, -np.inf], np.float32)}
    without = case._replace(spec=spec, apply_fn=lambda tree, x: case.apply_fn({"params": tree["params"]}, x))
    a, b = ({**tree, **mask} for tree in (case.params_a, case.params_b))
    with pytest.raises(NonFiniteError, match=r"leave it out by roles=\{'mask': 'constant'\}"):
        run(method, without, a, b)
    found = run(method, without, a, b, roles={"mask": "constant"})
    assert found.permutation.keys() == set(spec.groups)
    assert found == run(method, case, case.params_a, case.params_b)
