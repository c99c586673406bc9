"""What holds for every matching method of the registry; a new one is tried here without a change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case

import rebasin
from rebasin.errors import ConfigError, DataError, NonFiniteError, PermutationError, TreeMismatchError
from rebasin.matching.registry import METHODS

KEY = jax.random.key(0)

every_method = pytest.mark.parametrize("method", METHODS)


def options_of(method, case, **changes):
    """What a method takes of all that a case has to give, with few steps where it has that choice."""
    known = (*METHODS[method].needs, *METHODS[method].options)
    offered = {
        "loss_fn": case.loss_fn,
        "apply_fn": case.function,
        "data": case.data,
        "num_steps": 3,
        "batch_size": 16,
    } | changes
    return {name: value for name, value in offered.items() if name in known}


def run(method, case, params_a, params_b, **changes):
    return rebasin.match(
        case.spec, params_a, params_b, method, key=KEY, **options_of(method, case, **changes)
    )


@every_method
@pytest.mark.parametrize(
    "name",
    ["mlp", pytest.param("resnet", marks=pytest.mark.slow), pytest.param("vit", marks=pytest.mark.slow)],
)
def test_a_planted_permutation_is_recovered(method, name):
    """Exactly; a method that goes by responses cannot tell units apart that are silent on all the data."""
    case = build_case(name)
    match = run(method, case, case.params_a, case.planted)
    if "apply_fn" in METHODS[method].needs:
        alike = run(method, case, case.params_a, case.params_a)
        assert match.objective[-1] == pytest.approx(alike.objective[-1], rel=1e-5)
    else:
        restored = rebasin.permute(case.spec, match.permutation, case.planted)
        chex.assert_trees_all_equal(restored, jax.tree.map(jnp.asarray, case.params_a))


@every_method
@pytest.mark.parametrize("name", ["mlp", "width_one", pytest.param("vit", marks=pytest.mark.slow)])
def test_the_result_keeps_its_contract(method, name):
    case = build_case(name)
    match = run(method, case, case.params_a, case.params_b)
    rebasin.check_permutation(case.spec, case.params_a, match.permutation)
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
    if "start" not in METHODS[method].options:
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
    without = case._replace(spec=spec, apply=lambda t, x: case.apply({"params": t["params"]}, x))
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
    if "data" not in (*METHODS[method].needs, *METHODS[method].options):
        pytest.skip(f"{method} takes no data")
    case = build_case("mlp")
    empty = jax.tree.map(lambda x: x[:0], case.data)
    with pytest.raises(DataError, match="data hold no examples"):
        run(method, case, case.params_a, case.params_b, data=empty)
    uneven = {"x": case.data["x"], "y": case.data["y"][:7]}
    with pytest.raises(DataError) as info:
        run(method, case, case.params_a, case.params_b, data=uneven)
    assert str(info.value) == (
        "data must be arrays [n, …] with one common n:\n  x: 40 examples\n  y: 7 examples"
    )
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        run(method, case, case.params_a, case.params_b, batch_size=0)


@every_method
def test_a_loss_of_the_wrong_shape_is_named(method):
    if "loss_fn" not in (*METHODS[method].needs, *METHODS[method].options):
        pytest.skip(f"{method} takes no loss")
    case = build_case("mlp")
    with pytest.raises(DataError) as info:
        run(method, case, case.params_a, case.params_b, loss_fn=lambda p, b: jnp.mean(case.loss_fn(p, b)))
    assert str(info.value) == (
        "loss_fn must return one loss for each example, a floating array of shape (16,) for a batch of 16; "
        "got float32 array of shape ()"
    )
    with pytest.raises(DataError, match="got a dict"):
        run(method, case, case.params_a, case.params_b, loss_fn=lambda p, b: {"loss": case.loss_fn(p, b)})
