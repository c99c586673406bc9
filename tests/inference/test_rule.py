"""The table of primitives: replacing a rule, its effect, and trying a rule out."""

import pytest

from rebasin.errors import ConfigError
from rebasin.inference.rule import find_effect, find_rule, register_rule, temporary_rules


def rule(equation, *inputs):
    return inputs


@pytest.mark.parametrize(
    ("primitive", "effect"),
    [
        ("dot_general", "contracts"),
        ("reshape", "moves"),
        ("stop_gradient", "moves"),
        ("scatter", "moves"),
        ("scatter-add", "pools"),
        ("reduce_max", "reduces"),
        ("reduce_window_max", "pools"),
        ("tanh", "computes"),
        ("jit", "computes"),
        ("no such primitive", "computes"),
    ],
)
def test_effects(primitive, effect):
    assert find_effect(primitive) == effect


def test_replaced_rule_keeps_its_effect_unless_another_is_given():
    with temporary_rules():
        register_rule("reshape")(rule)
        register_rule("transpose", effect="computes")(rule)
        assert find_rule("reshape") is find_rule("transpose") is rule
        assert find_effect("reshape") == "moves"
        assert find_effect("transpose") == "computes"


def test_unknown_effect_is_refused():
    message = (
        "unknown effect 'move' of ['swirl']; known: ['computes', 'moves', 'reduces', 'pools', 'contracts']"
    )
    with pytest.raises(ConfigError) as info:
        register_rule("swirl", effect="move")
    assert str(info.value) == message


def test_temporary_rules_are_gone_afterwards_also_after_an_error():
    before = find_rule("reshape"), find_effect("reshape")

    def replace():
        with temporary_rules():
            register_rule("reshape", "swirl", effect="pools")(rule)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        replace()
    assert (find_rule("reshape"), find_effect("reshape")) == before
    assert find_rule("swirl") is None
