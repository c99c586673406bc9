import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case

import rebasin
from rebasin.errors import ConfigError, NonFiniteError, RebasinError
from rebasin.matching.straight_through import midpoint_gradient, straight_through_matching
from rebasin.trees import leaf_table

KEY = jax.random.key(0)


def midpoint_loss(case, permutation, params_b):
    moved = rebasin.permute(case.spec, permutation, params_b)
    middle = rebasin.interpolate(case.params_a, moved, 0.5)
    return float(case.metrics_fn(middle, case.data)["loss"].mean())


def match_case(case, **options):
    arguments = {"key": KEY, "num_steps": 20, "learning_rate": 0.1, "batch_size": 16} | options
    return straight_through_matching(
        case.spec, case.params_a, case.params_b, case.metrics_fn, case.data, **arguments
    )


def test_the_objective_is_the_midpoint_loss_and_the_best_is_returned():
    case = build_case("mlp")
    match = match_case(case, num_steps=6)
    reached = midpoint_loss(case, match.permutation, case.params_b)
    assert -match.objective[-1] == pytest.approx(reached, rel=1e-5)
    assert -match.objective[-1] == pytest.approx(match.stats["losses"].min(), rel=1e-12)
    np.testing.assert_array_equal(match.objective, np.maximum.accumulate(-match.stats["losses"]))
    # The last permutation of this run is not its best, so returning the last would be seen.
    assert match.stats["losses"][-1] > match.stats["losses"].min()


def test_it_learns_what_weight_matching_does_not_find():
    case = build_case("mlp")
    weights = rebasin.weight_matching(case.spec, case.params_a, case.params_b, key=KEY)
    match = match_case(case)
    assert -match.objective[0] == pytest.approx(
        midpoint_loss(case, weights.permutation, case.params_b), rel=1e-5
    )
    assert match.objective[-1] > match.objective[0]
    assert 1 < match.stats["evaluations"] <= match.num_iterations + 1


def test_the_first_gradient_is_half_of_the_midpoints():
    """The closed form of the estimator: ∂ℓ(½A + ½P[B])/∂P[B] = ½∇ℓ at the midpoint."""
    case = build_case("mlp")
    moved = leaf_table(case.params_b)
    loss, gradient = midpoint_gradient(moved, case.params_a, case.data, metrics_fn=case.metrics_fn)
    middle = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, case.params_a, case.params_b)
    value, full = jax.value_and_grad(lambda p: case.metrics_fn(p, case.data)["loss"].mean())(middle)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    for path, leaf in leaf_table(full).items():
        np.testing.assert_allclose(gradient[path], 0.5 * leaf, rtol=1e-4, atol=1e-5)


def test_a_good_start_is_never_given_up():
    """From a planted answer given as the start, nothing can be better."""
    case = build_case("mlp")
    answer = rebasin.weight_matching(case.spec, case.params_a, case.planted, key=KEY).permutation
    start = {group: jnp.asarray(row) for group, row in answer.items()}
    match = straight_through_matching(
        case.spec, case.params_a, case.planted, case.metrics_fn, case.data, key=KEY, num_steps=5, start=start
    )
    assert rebasin.fixed_points(match.permutation, answer).total == 1.0
    assert match.objective[0] == pytest.approx(0.0, abs=1e-9)


def test_what_cannot_work_is_refused(monkeypatch):
    case = build_case("mlp")

    def root_of_zero(params, batch):
        """√0: a finite loss whose gradient is not."""
        loss = case.metrics_fn(params, batch)["loss"]
        return {"loss": loss + jnp.sqrt(0 * loss)}

    with pytest.raises(ConfigError, match="num_steps must be at least 1, got 0"):
        match_case(case, num_steps=0)
    with pytest.raises(NonFiniteError, match="the loss between the networks is nan"):
        straight_through_matching(
            case.spec,
            case.params_a,
            case.params_b,
            lambda p, batch: {"loss": case.metrics_fn(p, batch)["loss"] * jnp.nan},
            case.data,
            key=KEY,
        )
    with pytest.raises(NonFiniteError, match="step 0: the gradient is not finite in "):
        straight_through_matching(
            case.spec,
            case.params_a,
            case.params_b,
            root_of_zero,
            case.data,
            key=KEY,
        )
    real_import = builtins.__import__

    def without_optax(name, *args, **kwargs):
        if name == "optax":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_optax)
    with pytest.raises(RebasinError, match="straight_through_matching needs Optax, which is not installed"):
        match_case(case)
