"""What is known of the entries of a value, beside how its axes are permuted.

A router computes *which* expert an example goes to: the entries of that value are positions along the axis
of the experts. If the experts are permuted, those entries are renamed, and what is looked up with them is the
same as before. So positions are followed through the program until they meet an axis, by a gather, a scatter
or a comparison with a count along it (one-hot). Whatever else is computed with them pins the axis that they
name.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from rebasin.inference.axes import Node, factor, pin, split, unite

__all__ = [
    "Components",
    "Dims",
    "Fold",
    "NEVER",
    "Never",
    "Note",
    "Number",
    "Positions",
    "Value",
    "named_axes",
]


class Positions(NamedTuple):
    """Entries are positions along `axis`, from 0 to its size − 1.

    Attributes:
      axis: the axis that they name; renamed as it is permuted.
      beyond: they were moved past the end, as `x[i]` does for negative i, to be discarded: no use is allowed.
    """

    axis: Node
    beyond: bool = False


class Components(NamedTuple):
    """Entries along the last axis are the components of an index, each with a note of its own."""

    parts: tuple["Note", ...]


class Number(NamedTuple):
    """All entries are this number."""

    value: float


class Never(NamedTuple):
    """All entries are false."""


NEVER = Never()

Note: TypeAlias = Positions | Components | Number | Never | None


def named_axes(note: Note) -> tuple[Node, ...]:
    """The axes whose positions the entries name."""
    if isinstance(note, Positions):
        return (note.axis,)
    if isinstance(note, Components):
        return tuple(axis for part in note.parts for axis in named_axes(part))
    return ()


Dims: TypeAlias = tuple[Node, ...]  # one node per axis of a value


class Fold:
    """An axis reshaped into several, which are not tied to it yet.

    ``x.reshape(…, 3, heads, dims)`` says that the axis is a product, and so that all three parts of it are
    permuted alike. Not so if each of the three is taken out by itself, as from a fused projection: then they
    are segments. So a reshape is put off until something else is done than to slice along the first of its
    axes.

    Attributes:
      source: the axis that was reshaped.
      parts: the axes that it became.
    """

    def __init__(self, source: Node, sizes: Sequence[int], reason: str) -> None:
        self.source, self.parts, self.reason = source, tuple(map(Node, sizes)), reason
        self.is_open = False

    def open(self) -> None:
        """Ties the parts to the factors of the source."""
        if not self.is_open:
            self.is_open = True
            sizes = [part.size for part in self.parts]
            for part, node in zip(self.parts, factor(self.source, sizes, self.reason), strict=True):
                unite(part, node, self.reason)

    def cut(self, sizes: Sequence[int]) -> list["Fold"]:
        """The fold of each segment along the first of the parts."""
        inner = [part.size for part in self.parts[1:]]
        ends = split(self.source, [size * math.prod(inner) for size in sizes], self.reason)
        return [Fold(node, [size, *inner], self.reason) for size, node in zip(sizes, ends, strict=True)]


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
      folds: reshapes that were put off.
    """

    context: frozenset[Node] | None
    constant: frozenset[Node]
    note: Note
    distinct: frozenset[Node]
    folds: tuple[Fold, ...]

    def __new__(
        cls,
        dims: Iterable[Node],
        context: frozenset[Node] | None = None,
        constant: Iterable[Node] = (),
        *,
        note: Note = None,
        distinct: Iterable[Node] = (),
        folds: Iterable[Fold] = (),
    ) -> "Value":
        """A value with the axes `dims`; of `distinct`, those among them count."""
        value = super().__new__(cls, dims)
        value.context, value.constant, value.note = context, frozenset(constant), note
        roots = {node.root for node in distinct}
        value.distinct = frozenset(node for node in value if node.root in roots) if roots else frozenset()
        value.folds = tuple(fold for fold in folds if not fold.is_open)
        return value

    @classmethod
    def of_leaf(cls, dims: Sequence[Node], dtype: Any) -> "Value":
        """A leaf, of which nothing is known but that its numbers differ."""
        return cls(dims, frozenset(), distinct=dims if jnp.issubdtype(dtype, jnp.floating) else ())

    def moved(self, dims: Iterable[Node], *, constant: Iterable[Node] = ()) -> "Value":
        """The same entries along other axes: what a rule returns that only moves or repeats them."""
        return Value(dims, constant=constant, note=self.note, distinct=self.distinct, folds=self.folds)

    @property
    def unfolded(self) -> "Value":
        """The value with every axis that is still folded, and so in no group yet, as it was before."""
        closed = [fold for fold in self.folds if not fold.is_open]
        if not closed:
            return self
        hidden = {part for fold in closed for part in fold.parts}
        dims = [*(node for node in self if node not in hidden), *(fold.source for fold in closed)]
        return Value(dims, self.context, self.constant, note=self.note)

    def is_distinct(self, axis: int) -> bool:
        """Whether positions along an axis hold different numbers; not told for an axis that occurs twice."""
        roots = [node.root for node in self]
        return roots.count(roots[axis]) == 1 and roots[axis] in {node.root for node in self.distinct}

    def pin_named(self, reason: str) -> None:
        """Pins the axes whose positions the entries name."""
        for axis in named_axes(self.note):
            pin(axis, reason, mixed=False)
