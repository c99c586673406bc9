import builtins
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_case
from scipy.special import logsumexp

import rebasin
from rebasin.arithmetic import inner_product
from rebasin.errors import ConfigError, NonFiniteError, RebasinError
from rebasin.matching.sinkhorn import (
    SinkhornMatching,
    plan_gradient,
    sinkhorn_matching,
    sinkhorn_plan,
    sinkhorn_plans,
)

KEY = jax.random.key(0)


def converged_plan(x):
    """Sinkhorn's algorithm in float64, until nothing changes."""
    f, g = np.zeros(len(x)), np.zeros(len(x))
    for _ in range(3_000):
        f = -logsumexp(x + g, axis=1)
        g = -logsumexp(x + f[:, None], axis=0)
    return np.exp(x + f[:, None] + g)


@pytest.mark.parametrize("scale", [pytest.param(0.5, marks=pytest.mark.slow), 3.0])
def test_plan_and_implicit_gradient_against_differences_in_float64(scale):
    rng = np.random.default_rng(0)
    x, target, direction = rng.normal(size=(3, 5, 5)) * np.array([scale, 1, 1])[:, None, None]

    def value(x):
        return jnp.sum(sinkhorn_plan(x[None])[0] * target)

    plan = sinkhorn_plan(jnp.asarray(x, jnp.float32)[None])[0]
    np.testing.assert_allclose(plan, converged_plan(x), atol=1e-3)  # the solver's threshold
    slope = float(jnp.vdot(jax.grad(value)(jnp.asarray(x, jnp.float32)), direction))
    step = 1e-4
    ahead, behind = (np.sum(converged_plan(x + s * direction) * target) for s in (step, -step))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=2e-2, abs=1e-3)


@pytest.mark.slow
def test_gradients_stay_finite_near_a_permutation():
    """There the linear system is singular, and OTT's own implicit gradients are NaN."""
    x = 30.0 * jnp.eye(6)[jnp.array([2, 0, 1, 5, 3, 4])][None]
    gradient = jax.grad(lambda x: jnp.sum(sinkhorn_plan(x) * jnp.arange(36.0).reshape(1, 6, 6)))(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient, 0.0, atol=1e-3)
    # At a permutation itself the answer is zero. With eight units 1/n is exact, and an elimination without
    # the ridge divides by zero.
    exact = jnp.eye(8)[jnp.array([2, 0, 1, 5, 3, 4, 7, 6])][None]
    gradient = plan_gradient(exact, jax.random.normal(KEY, (1, 8, 8)))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


@pytest.mark.slow
def test_a_stack_is_solved_matrix_by_matrix():
    x = jax.random.normal(KEY, (3, 4, 4))
    together = sinkhorn_plan(x)
    apart = jnp.concatenate([sinkhorn_plan(x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(together, apart, atol=1e-5)
    np.testing.assert_allclose(together.sum(axis=1), 1.0, atol=1e-3)
    np.testing.assert_allclose(together.sum(axis=2), 1.0, atol=1e-3)


def match_case(case, params_b=None, **options):
    return sinkhorn_matching(
        case.spec,
        case.params_a,
        case.params_b if params_b is None else params_b,
        case.metrics_fn,
        case.data,
        **{"key": KEY, "num_steps": 30, "learning_rate": 0.3, "batch_size": 40} | options,
    )


def test_half_of_the_mass_starts_where_the_start_puts_it():
    case = build_case("mlp")
    start = rebasin.random_permutation(case.spec, case.params_a, key=KEY)
    _, x = SinkhornMatching(start=start).starting_point(case.spec, case.params_a, case.params_b, KEY)
    for group, plan in sinkhorn_plans(x).items():
        share = np.take_along_axis(np.asarray(plan), np.asarray(start[group])[:, None], axis=1)
        np.testing.assert_allclose(share, 0.5, atol=1e-3)


@pytest.mark.parametrize("loss", ["l2", "midpoint", "random"])
def test_the_objective_is_the_loss_that_the_docstring_says(loss):
    case = build_case("mlp")
    match = match_case(case, loss=loss, start="identity")
    moved = rebasin.permute(case.spec, match.permutation, case.params_b)
    if loss == "l2":
        difference = jax.tree.map(lambda a, b: a - b, case.params_a, moved)
        expected = inner_product(difference, difference)
    else:
        alphas = {"midpoint": [0.5], "random": [0.1, 0.3, 0.5, 0.7, 0.9]}[loss]
        points = [rebasin.interpolate(case.params_a, moved, alpha) for alpha in alphas]
        expected = np.mean([float(case.metrics_fn(p, case.data)["loss"].mean()) for p in points])
    assert -match.objective[-1] == pytest.approx(expected, rel=1e-5)
    assert match.objective[-1] > match.objective[0]  # it learns
    np.testing.assert_array_equal(match.objective, np.maximum.accumulate(-match.stats["losses"]))


@pytest.mark.slow
def test_a_planted_permutation_is_learned_by_distance_from_the_uniform_start():
    """Heads and their inner groups too."""
    case = build_case("vit")
    match = sinkhorn_matching(
        case.spec,
        case.params_a,
        case.planted,
        key=KEY,
        loss="l2",
        start="uniform",
        num_steps=50,
        learning_rate=0.5,
    )
    restored = rebasin.permute(case.spec, match.permutation, case.planted)
    chex.assert_trees_all_equal(restored, jax.tree.map(jnp.asarray, case.params_a))


def test_one_layer_by_distance_is_the_brute_force_optimum():
    spec = rebasin.PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = (
            {"w": rng.normal(size=(3, 4)).astype(np.float32), "v": rng.normal(size=(4, 2)).astype(np.float32)}
            for _ in "ab"
        )
        match = sinkhorn_matching(spec, a, b, key=KEY, loss="l2", start="uniform", learning_rate=0.3)
        candidates = ({"P": np.array(row)} for row in itertools.permutations(range(4)))
        best = max(inner_product(a, rebasin.permute(spec, p, b)) for p in candidates)
        reached = inner_product(a, rebasin.permute(spec, match.permutation, b))
        assert reached == pytest.approx(best, rel=1e-5)


def test_what_is_needed_follows_from_the_loss():
    """The squared distance is computed from the networks; the other losses are measured on data."""
    case = build_case("mlp")
    assert SinkhornMatching().needs == SinkhornMatching(loss="random").needs == ("metrics_fn", "data", "key")
    assert SinkhornMatching(loss="l2").needs == ("key",)
    with pytest.raises(ConfigError) as info:
        rebasin.match(case.spec, case.params_a, case.params_b, "sinkhorn", key=KEY)
    assert str(info.value).splitlines() == [
        "the method 'sinkhorn' needs metrics_fn, data, key:",
        "  metrics_fn: missing",
        "  data: missing",
    ]
    match = rebasin.match(
        case.spec, case.params_a, case.params_b, "sinkhorn", key=KEY, loss="l2", num_steps=1
    )
    assert match == sinkhorn_matching(
        case.spec, case.params_a, case.params_b, key=KEY, loss="l2", num_steps=1
    )


def test_options_are_a_value():
    assert SinkhornMatching(loss="l2") == SinkhornMatching(loss="l2")
    assert hash(SinkhornMatching(loss="l2")) == hash(SinkhornMatching(loss="l2"))
    assert SinkhornMatching(loss="l2") != SinkhornMatching(loss="l2", num_steps=3)
    assert repr(SinkhornMatching(loss="l2")) == "SinkhornMatching(loss='l2')"


def test_what_cannot_work_is_refused(monkeypatch):
    case = build_case("mlp")
    with pytest.raises(ConfigError, match="unknown loss 'l1'; known: 'l2', 'midpoint', 'random'"):
        match_case(case, loss="l1")
    with pytest.raises(
        ConfigError, match="loss='midpoint' needs metrics_fn and data; only loss='l2' does without"
    ):
        sinkhorn_matching(case.spec, case.params_a, case.params_b, key=KEY)
    with pytest.raises(NonFiniteError, match="the loss between the networks is nan"):
        sinkhorn_matching(
            case.spec,
            case.params_a,
            case.params_b,
            lambda p, batch: {"loss": case.metrics_fn(p, batch)["loss"] * jnp.nan},
            case.data,
            key=KEY,
        )
    real_import = builtins.__import__

    def without_ott(name, *args, **kwargs):
        if name.startswith("ott"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ott)
    with pytest.raises(RebasinError) as info:
        match_case(case)
    assert str(info.value) == (
        "sinkhorn_matching needs ott-jax, which is not installed: pip install 'rebasin-jax[sinkhorn]'"
    )
