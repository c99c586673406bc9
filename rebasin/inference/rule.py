"""The table from primitives to rules, and what a rule is given."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from rebasin.inference.values import Dims, Value

__all__ = ["Equation", "Rule", "find_rule", "keeps_folds", "prepare", "reads_notes", "register_rule"]


class Equation(NamedTuple):
    """What a rule may look at.

    Attributes:
      primitive: name of the primitive.
      params: its parameters, as in the jaxpr.
      shapes: shapes of the outputs.
      where: primitive and source line, for reasons.
      run: interprets an inner jaxpr on its inputs and returns its outputs.
    """

    primitive: str
    params: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    where: str
    run: Callable[[Any, Sequence[Value]], list[Value]]

    def because(self, explanation: str) -> str:
        """The reason of a pin: where it came from, and why."""
        return f"{self.where}: {explanation}"


# A rule ``(equation, *inputs) -> outputs`` says how a primitive ties axes together. Given the axes of the
# inputs it unites, refines and pins them, and returns the axes of the outputs, such that: *if every input is
# permuted along its axes as their nodes say, then every output is permuted as its own nodes say.* That
# sentence is all there is to check in a rule.
Rule: TypeAlias = Callable[..., Sequence[Dims]]

_RULES: dict[str, Rule] = {}
_READERS: set[Rule] = set()
_KEEPERS: set[Rule] = set()


def register_rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Decorator that makes a function the rule of one or more primitives, replacing any earlier one.

    Args:
      *primitives: names as printed in a jaxpr.

    Returns:
      The decorator.

    Examples:
      >>> @register_rule("my_elementwise_primitive")
      ... def rule(equation, x):
      ...     return [x]
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


def reads_notes(rule: Rule) -> Rule:
    """Decorator of a rule that looks after positions among the entries of its inputs (`notes.Positions`).

    Its sentence is: *if every input is permuted as its nodes say, and entries that name positions are renamed
    as their axis is permuted, then so are the outputs.* For any other rule the named axes are pinned before.
    """
    _READERS.add(rule)
    return rule


def keeps_folds(rule: Rule) -> Rule:
    """Decorator of a rule that hands on `Value.folds`. For any other rule they are opened before."""
    _KEEPERS.add(rule)
    return rule


def find_rule(primitive: str) -> Rule | None:
    """The rule of a primitive, `None` if it has none."""
    return _RULES.get(primitive)


def prepare(rule: Rule | None, operands: Sequence[Value], reason: str) -> None:
    """Pins and opens what a rule does not look after itself."""
    for operand in operands:
        if rule not in _READERS:
            operand.pin_named(reason)
        if rule not in _KEEPERS:
            for fold in operand.folds:
                fold.open()
