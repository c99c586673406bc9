"""What a function that is given as ``progress=`` is told, by every method."""

import dataclasses

import jax
import pytest
from helpers import build_case

import rebasin
from rebasin.matching.progress import MatchProgress
from rebasin.matching.registry import METHODS

KEY = jax.random.key(0)

# What each method reports before it ends.
STAGES = {
    "weights": {"ascent", "restart 1", "restart 2"},
    "activations": {"pass"},
    "covariance": {"depth", "ascent"},
    "frank_wolfe": {"ascent"},
    "straight_through": {"step"},
    "sinkhorn": {"step"},
}
FEW = {"num_steps": 3, "batch_size": 16, "restarts": 2}

every_method = pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] * (m in ("sinkhorn", "straight_through"))) for m in METHODS],
)


def run(method, case, progress=None, function=rebasin.match):
    names = {field.name for field in dataclasses.fields(METHODS[method])}
    chosen = METHODS[method](**{name: value for name, value in FEW.items() if name in names})
    given = {"key": KEY, "metrics_fn": case.metrics_fn, "data": case.data, "progress": progress}
    if function is rebasin.align:
        inputs = jax.tree.leaves(case.data.inputs)
        networks = case.apply_fn, case.params_a, case.params_b
        return rebasin.align(*networks, *inputs, method=chosen, spec=case.spec, verify=False, **given).match
    return rebasin.match(case.spec, case.params_a, case.params_b, chosen, apply_fn=case.apply_fn, **given)


@every_method
def test_every_method_reports_in_order_and_finds_the_same(method):
    case, told = build_case("mlp"), []
    match = run(method, case, told.append)
    assert match == run(method, case)
    *before, last = told
    end = match.num_iterations
    assert last == MatchProgress(method, "end", end, end, match.objective[-1], done=True)
    assert before
    assert {state.stage for state in before} <= STAGES[method]
    assert {(state.method, state.done) for state in before} == {(method, False)}
    stages = list(dict.fromkeys(state.stage for state in before))
    assert [state.stage for state in before] == sorted((s.stage for s in before), key=stages.index)
    for stage in stages:
        states = [state for state in before if state.stage == stage]
        made = [state.iteration for state in states]
        assert made == sorted(set(made))
        assert all(state.iteration <= state.limit for state in states if state.limit is not None)
    objectives = [state.objective for state in told if state.objective is not None]
    assert objectives == sorted(objectives)
    assert {type(value) for value in objectives} == {float}


@pytest.mark.parametrize("method", ["frank_wolfe", pytest.param("straight_through", marks=pytest.mark.slow)])
def test_the_values_are_those_of_the_result(method):
    case, told = build_case("mlp"), []
    match = run(method, case, told.append)
    reported = [state.objective for state in told[:-1]]
    # The last iteration of Frank–Wolfe is followed by rounding; straight-through matches before its steps.
    first = len(match.objective) - len(reported)
    assert reported[:-1] == pytest.approx(match.objective[first:-1])
    assert told[-1].objective == match.objective[-1]


@every_method
def test_what_is_raised_ends_the_match(method):
    case, told = build_case("mlp"), []

    def stop(state):
        told.append(state)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(method, case, stop)
    assert len(told) == 1
    assert not told[0].done


@pytest.mark.parametrize("learned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_align_and_the_functions_of_methods_hand_it_on(learned):
    case = build_case("mlp")
    pair = case.spec, case.params_a, case.params_b
    calls = {
        "align": lambda tell: run("weights", case, tell, rebasin.align),
        "weights": lambda tell: rebasin.weight_matching(*pair, key=KEY, progress=tell),
        "joint": lambda tell: rebasin.joint_weight_matching(
            case.spec, [case.params_a] * 2, [case.params_b] * 2, key=KEY, progress=tell
        ),
        "partial": lambda tell: rebasin.partial_weight_matching(*pair, key=KEY, progress=tell),
        "activations": lambda tell: rebasin.activation_matching(
            *pair, case.apply_fn, case.data, progress=tell
        ),
        "covariance": lambda tell: rebasin.covariance_matching(
            *pair, case.apply_fn, case.data, key=KEY, progress=tell
        ),
        "frank_wolfe": lambda tell: rebasin.frank_wolfe_matching(*pair, progress=tell),
    }
    learned_calls = {
        "straight_through": lambda tell: rebasin.straight_through_matching(
            *pair, case.metrics_fn, case.data, key=KEY, num_steps=1, progress=tell
        ),
        "sinkhorn": lambda tell: rebasin.sinkhorn_matching(
            *pair, case.metrics_fn, case.data, key=KEY, num_steps=1, progress=tell
        ),
    }
    for name, call in (learned_calls if learned else calls).items():
        told = []
        call(told.append)
        assert len(told) > 1, name
        assert [state.done for state in told] == [False] * (len(told) - 1) + [True], name


def test_a_rescaled_match_reports_the_objective_of_the_networks():
    """Tiny weights are matched at a larger scale, which nobody sees."""
    case, told = build_case("mlp"), []
    small = [jax.tree.map(lambda x: x * 1e-20, tree) for tree in (case.params_a, case.params_b)]
    match = rebasin.weight_matching(case.spec, *small, key=KEY, progress=told.append)
    for state in told:
        assert 0 < state.objective <= match.objective[-1] * (1 + 1e-6)
    assert told[0].objective == pytest.approx(match.objective[1], rel=1e-6)
