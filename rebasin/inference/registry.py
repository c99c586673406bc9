"""The table from primitives to rules, and what a rule is given."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from rebasin.inference.axes import Node

__all__ = ["Dims", "Equation", "Rule", "Value", "find_rule", "register_rule"]

Dims: TypeAlias = tuple[Node, ...]  # one node per axis of a value


class Value(tuple[Node, ...]):
    """The axes of a value, with what `indexing` wants to know of it beside them.

    Attributes:
      context: axes of stacked inputs that a loop strips before it hands on a slice for each step. What is
        computed from such a slice may be permuted differently at each step, as if it still carried the axis.
        `None` in what a rule returns stands for the contexts of all operands together.
      constant: those axes along which the value does not vary, so that it says nothing about their
        permutation.
    """

    context: frozenset[Node] | None
    constant: frozenset[Node]

    def __new__(
        cls, dims: Iterable[Node], context: frozenset[Node] | None = None, constant: Iterable[Node] = ()
    ) -> "Value":
        """A value with the axes `dims`."""
        value = super().__new__(cls, dims)
        value.context, value.constant = context, frozenset(constant)
        return value


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
# inputs it
# unites, refines and pins them, and returns the axes of the outputs, such that: *if every input is permuted
# along its axes as their nodes say, then every output is permuted as its own nodes say.* That sentence is all
# there is to check in a rule.
Rule: TypeAlias = Callable[..., Sequence[Dims]]

_RULES: dict[str, Rule] = {}


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


def find_rule(primitive: str) -> Rule | None:
    """The rule of a primitive, `None` if it has none."""
    return _RULES.get(primitive)
