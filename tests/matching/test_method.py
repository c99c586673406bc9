import jax
import pytest
from helpers import build_case

import rebasin
from rebasin.errors import ConfigError
from rebasin.matching.registry import METHODS

KEY = jax.random.key(0)


def test_a_name_stands_for_its_function():
    case = build_case("mlp")
    networks = case.spec, case.params_a, case.params_b
    assert rebasin.match(*networks, key=KEY) == rebasin.weight_matching(*networks, key=KEY)
    by_name = rebasin.match(*networks, "weights", key=KEY, start="identity", max_iterations=2)
    assert by_name == rebasin.weight_matching(*networks, key=KEY, start="identity", max_iterations=2)


def test_a_key_is_ignored_by_a_method_without_chance():
    case = build_case("mlp")
    networks = case.spec, case.params_a, case.params_b
    assert METHODS["frank_wolfe"]().needs == ()
    match = rebasin.match(*networks, "frank_wolfe", key=KEY, start="identity")
    assert match == rebasin.frank_wolfe_matching(*networks, start="identity")


def test_a_method_says_what_it_needs():
    assert METHODS["weights"]().needs == ("key",)
    assert METHODS["frank_wolfe"]().needs == ()
    assert METHODS["straight_through"]().needs == ("metrics_fn", "data", "key")
    assert METHODS["sinkhorn"]().needs == ("metrics_fn", "data", "key")


def test_calls_that_cannot_work_are_explained():
    case = build_case("mlp")
    networks = case.spec, case.params_a, case.params_b
    with pytest.raises(ConfigError) as info:
        rebasin.match(*networks, "magic", key=KEY)
    assert str(info.value) == f"no matching method is called 'magic'; there are {', '.join(METHODS)}"
    with pytest.raises(ConfigError) as info:
        rebasin.match(*networks, "straight_through", metrics_fn=case.metrics_fn)
    assert str(info.value).splitlines() == [
        "the method 'straight_through' needs metrics_fn, data, key:",
        "  data: missing",
        "  key: missing",
    ]
    with pytest.raises(ConfigError) as info:
        rebasin.match(*networks, "straight_through", learning_speed=1.0)
    assert str(info.value).splitlines() == [
        "the method 'straight_through' takes roles, start, num_steps, learning_rate, batch_size:",
        "  learning_speed: not known",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_function_of_a_method_refuses_unknown_options_as_the_method_does(method):
    case = build_case("mlp")
    function = getattr(rebasin, f"{method.removesuffix('s')}_matching")
    given = {"key": KEY} if "key" in METHODS[method]().needs else {}
    needs = METHODS[method]().needs
    positional = [getattr(case, name) for name in needs if name in ("apply_fn", "metrics_fn", "data")]
    with pytest.raises(ConfigError, match=rf"the method '{method}' takes .*:\n  speed: not known"):
        function(case.spec, case.params_a, case.params_b, *positional, **given, speed=1)
