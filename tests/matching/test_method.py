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
    assert "key" not in (*METHODS["frank_wolfe"].needs, *METHODS["frank_wolfe"].options)
    match = rebasin.match(*networks, "frank_wolfe", key=KEY, start="identity")
    assert match == rebasin.frank_wolfe_matching(*networks, start="identity")


def test_what_a_method_needs_is_read_from_its_signature():
    assert METHODS["weights"].needs == ("key",)
    assert METHODS["frank_wolfe"].needs == ()
    assert METHODS["straight_through"].needs == ("loss_fn", "data", "key")
    assert "loss_fn" in METHODS["sinkhorn"].options


def test_calls_that_cannot_work_are_explained():
    case = build_case("mlp")
    networks = case.spec, case.params_a, case.params_b
    with pytest.raises(ConfigError) as info:
        rebasin.match(*networks, "magic", key=KEY)
    assert str(info.value) == f"no matching method is called 'magic'; there are {', '.join(METHODS)}"
    with pytest.raises(ConfigError) as info:
        rebasin.match(*networks, "straight_through", loss_fn=case.loss_fn, learning_speed=1.0)
    assert str(info.value).splitlines() == [
        "method 'straight_through' cannot be called like this (it needs loss_fn, data, key; it takes start, "
        "num_steps, learning_rate, batch_size, predicate):",
        "  data: missing",
        "  key: missing",
        "  learning_speed: not known",
    ]
    with pytest.raises(ConfigError, match="it needs nothing else; it takes start, max_iterations"):
        rebasin.match(*networks, "frank_wolfe", data=case.data)
