"""The table from primitives to rules, and what a rule is given."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from rebasin.inference.axes import Node, pin
from rebasin.inference.notes import Note, named_axes

__all__ = ["Dims", "Equation", "Rule", "Value", "find_rule", "is_reader", "reads_notes", "register_rule"]

Dims: TypeAlias = tuple[Node, ...]  # one node per axis of a value


class Value(tuple[Node, ...]):
    """The axes of a value, with what is known of it beside them.

    Attributes:
      context: axes of stacked inputs that a loop strips before it hands on a slice for each step. What is
        computed from such a slice may be permuted differently at each step, as if it still carried the axis.
        `None` in what a rule returns stands for the contexts of all operands together.
      constant: those axes along which the value does not vary, so that it says nothing about their
        permutation.
      note: what is known of the entries.
      distinct: axes along which no two positions hold equal numbers, but for weights that happen to be equal:
        the values of a leaf, and what is computed from them without rounding, clipping or comparing.
    """

    context: frozenset[Node] | None
    constant: frozenset[Node]
    note: Note
    distinct: frozenset[Node]

    def __new__(
        cls,
        dims: Iterable[Node],
        context: frozenset[Node] | None = None,
        constant: Iterable[Node] = (),
        *,
        note: Note = None,
        distinct: Iterable[Node] = (),
    ) -> "Value":
        """A value with the axes `dims`; of `distinct`, those among them count."""
        value = super().__new__(cls, dims)
        value.context, value.constant, value.note = context, frozenset(constant), note
        roots = {node.root for node in distinct}
        value.distinct = frozenset(node for node in value if node.root in roots) if roots else frozenset()
        return value

    def moved(self, dims: Iterable[Node], *, constant: Iterable[Node] = ()) -> "Value":
        """The same entries along other axes: what a rule returns that only moves or repeats them."""
        return Value(dims, constant=constant, note=self.note, distinct=self.distinct)

    def is_distinct(self, axis: int) -> bool:
        """Whether positions along an axis hold different numbers; not told for an axis that occurs twice."""
        roots = [node.root for node in self]
        return roots.count(roots[axis]) == 1 and roots[axis] in {node.root for node in self.distinct}

    def pin_named(self, reason: str) -> None:
        """Pins the axes whose positions the entries name."""
        for axis in named_axes(self.note):
            pin(axis, reason, mixed=False)


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


def find_rule(primitive: str) -> Rule | None:
    """The rule of a primitive, `None` if it has none."""
    return _RULES.get(primitive)


def is_reader(rule: Rule | None) -> bool:
    """Whether a rule looks after positions among the entries of its inputs."""
    return rule in _READERS
