"""The table of primitives: the rule of each and its effect on the values of a group; what a rule is given."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from rebasin.errors import ConfigError
from rebasin.inference.values import Dims, Value

__all__ = [
    "Effect",
    "Equation",
    "Rule",
    "find_effect",
    "find_rule",
    "keeps_deferred_reshapes",
    "prepare",
    "reads_abstract_values",
    "register_rule",
    "registered_primitives",
    "temporary_rules",
]


class Equation(NamedTuple):
    """What a rule may look at.

    Attributes:
      primitive: name of the primitive.
      params: parameters of the primitive, as in the jaxpr.
      shapes: shapes of the outputs.
      where: the primitive and the user's source line, to begin a reason with.
      run: interprets an inner jaxpr on the values of its inputs and returns those of its outputs.
    """

    primitive: str
    params: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    where: str
    run: Callable[[Any, Sequence[Value]], list[Value]]

    def because(self, explanation: str) -> str:
        """Return the reason of a pin: which equation caused it, and why."""
        return f"{self.where}: {explanation}"


# A rule ``(equation, *inputs) -> outputs`` says how a primitive ties axes together. Given the axes of the
# inputs it unites, refines and pins them, and returns the axes of the outputs, such that: *if every input is
# permuted along its axes as their nodes say, then every output is permuted as its own nodes say.* That
# sentence is all there is to check in a rule. It has a consequence for new nodes: permuting a node that no
# operand has changes no operand, and so no result. Therefore a rule returns a new node only for an axis along
# which its result is constant, and pins whatever else it does not follow. The interpreter relies on this.
Rule: TypeAlias = Callable[..., Sequence[Dims]]

# What a primitive does to a value that carries a group; `rebasin.tracing.sites` builds on it.
#   computes:  makes new numbers of what stands at each position;
#   moves:     moves, repeats, selects, joins or converts entries;
#   reduces:   summarises whole axes, and so pools the groups that are left at fewer positions than before;
#   pools:     summarises or chooses among positions, and so pools all groups that it carries;
#   contracts: is a sum of products with a weight or with other data, as a layer is.
Effect: TypeAlias = Literal["computes", "moves", "reduces", "pools", "contracts"]


class _Entry(NamedTuple):
    rule: Rule
    effect: Effect


_TABLE: dict[str, _Entry] = {}  # by name of the primitive
_ABSTRACT_VALUE_READERS: set[Rule] = set()
_DEFERRED_RESHAPE_KEEPERS: set[Rule] = set()


def register_rule(*primitives: str, effect: Effect | None = None) -> Callable[[Rule], Rule]:
    """Return a decorator that makes a function the rule of some primitives, in place of any earlier rule.

    Args:
      *primitives: names of the primitives as printed in a jaxpr.
      effect: what the primitives do to a value that carries a group: ``"computes"``, ``"moves"``,
        ``"reduces"``, ``"pools"`` or ``"contracts"``. Activation matching finds its sites by it. `None` keeps
        the effect that a primitive has already; a new primitive computes.

    Returns:
      The decorator.

    Raises:
      ConfigError: the effect is unknown.

    Examples:
      >>> with temporary_rules():
      ...     @register_rule("my_elementwise_primitive")
      ...     def rule(equation, x):
      ...         return [x]
    """
    if effect is not None and effect not in get_args(Effect):
        raise ConfigError(f"unknown effect {effect!r} of {list(primitives)}; known: {list(get_args(Effect))}")

    def register(rule: Rule) -> Rule:
        for primitive in primitives:
            _TABLE[primitive] = _Entry(rule, effect or find_effect(primitive))
        return rule

    return register


@contextlib.contextmanager
def temporary_rules() -> Iterator[None]:
    """Restore on exit every rule and effect that was registered on entry, for trying out a rule."""
    before = dict(_TABLE)
    try:
        yield
    finally:
        _TABLE.clear()
        _TABLE.update(before)


def reads_abstract_values(rule: Rule) -> Rule:
    """Mark a rule as handling entries that name positions (`rebasin.inference.values.Positions`) itself.

    Its sentence is: *if every input is permuted as its nodes say, and entries that name positions are renamed
    as their axis is permuted, then so are the outputs.* Before any other rule the named axes are pinned.
    """
    _ABSTRACT_VALUE_READERS.add(rule)
    return rule


def keeps_deferred_reshapes(rule: Rule) -> Rule:
    """Mark a rule as handing on `Value.deferred`. Before any other rule the reshapes are resolved."""
    _DEFERRED_RESHAPE_KEEPERS.add(rule)
    return rule


def find_rule(primitive: str) -> Rule | None:
    """Return the rule of a primitive, `None` if it has none."""
    entry = _TABLE.get(primitive)
    return None if entry is None else entry.rule


def registered_primitives() -> list[str]:
    """Return the names of all primitives that have a rule, those that rules pin on purpose included."""
    return sorted(_TABLE)


def find_effect(primitive: str) -> Effect:
    """Return what a primitive does to the values of a group; one that is not registered computes."""
    entry = _TABLE.get(primitive)
    return "computes" if entry is None else entry.effect


def prepare(rule: Rule | None, operands: Sequence[Value], reason: str) -> None:
    """Pin named axes and resolve deferred reshapes of the operands, unless the rule handles them itself.

    Args:
      rule: the rule that is about to get the operands; `None` for a primitive without one.
      operands: the operands of the equation.
      reason: the reason of the pins.
    """
    for operand in operands:
        if operand.abstract is not None and rule not in _ABSTRACT_VALUE_READERS:
            operand.pin_named(reason)
        if operand.deferred and rule not in _DEFERRED_RESHAPE_KEEPERS:
            operand.resolve_reshapes()
