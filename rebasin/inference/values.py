"""What inference keeps of a value: its axes, and beside them an abstract value of its entries.

A router computes *which* expert an example goes to: the entries of that value are positions along the axis of
the experts. If the experts are permuted, those entries are renamed, and whatever is looked up with them is
the same as before. So inference follows such positions through the program until they meet an axis: in a
gather, in a scatter, or in a comparison with a count along it (one-hot). The axis that they name is pinned as
soon as anything else is computed with them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from rebasin.inference.axes import Node, factor, pin, split, unite

__all__ = [
    "NEVER",
    "AbstractValue",
    "Components",
    "DeferredReshape",
    "Dims",
    "Never",
    "Number",
    "Positions",
    "Value",
    "named_axes",
]


class Positions(NamedTuple):
    """Entries that are positions along an axis, from 0 to its size − 1.

    Attributes:
      axis: the axis that the entries name; they are renamed when it is permuted.
      beyond: whether the positions were moved past the end, as ``x[i]`` does for negative i. Such a value is
        discarded by a later `select_n`; used in any other way, it pins the axis.
    """

    axis: Node
    beyond: bool = False


class Components(NamedTuple):
    """Entries along the last axis are the components of an index, each with an abstract value of its own."""

    parts: tuple["AbstractValue", ...]


class Number(NamedTuple):
    """All entries are this number."""

    value: float


class Never(NamedTuple):
    """All entries are false."""


NEVER = Never()

AbstractValue: TypeAlias = Positions | Components | Number | Never | None  # `None`: nothing is known


def named_axes(abstract: AbstractValue) -> tuple[Node, ...]:
    """Return the axes whose positions the entries name."""
    if isinstance(abstract, Positions):
        return (abstract.axis,)
    if isinstance(abstract, Components):
        return tuple(axis for part in abstract.parts for axis in named_axes(part))
    return ()


Dims: TypeAlias = tuple[Node, ...]  # one node for each axis of a value


class DeferredReshape:
    """A reshape of one axis into several that are not tied to it yet.

    ``x.reshape(…, 3, heads, dims)`` seems to say that the axis is a product, so that its three parts are
    permuted alike. But if each of the three is then taken out by itself, as from a fused projection, the
    parts are segments of the axis and may be permuted differently. So the reshape is deferred until a rule
    does anything else than slice along one of the new axes. If it slices along a later one, as along the
    second of ``[heads, 3, dims]``, then the axes before that one are tied and the rest stays deferred.

    Attributes:
      source: the axis that was reshaped.
      parts: the axes that it became.
      reason: the reason to give if the axis cannot be read as a product and is pinned.
      is_resolved: whether the parts have been tied to the factors of the source.
    """

    def __init__(self, source: Node, sizes: Sequence[int], reason: str) -> None:
        self.source, self.parts, self.reason = source, tuple(map(Node, sizes)), reason
        self.is_resolved = False

    def resolve(self) -> None:
        """Tie the parts to the factors of the source."""
        if not self.is_resolved:
            self.is_resolved = True
            sizes = [part.size for part in self.parts]
            for part, node in zip(self.parts, factor(self.source, sizes, self.reason), strict=True):
                unite(part, node, self.reason)

    def cut(self, place: int, sizes: Sequence[int]) -> list["DeferredReshape"]:
        """Cut a part into segments, and tie the parts before it.

        Args:
          place: number of the part.
          sizes: sizes of the segments.

        Returns:
          For each segment, the deferred reshape into the segment and the parts behind it.
        """
        all_sizes = [part.size for part in self.parts]
        outer, inner = all_sizes[:place], all_sizes[place + 1 :]
        *tied, source = factor(self.source, [*outer, math.prod(all_sizes[place:])], self.reason)
        for part, node in zip(self.parts, tied, strict=False):
            unite(part, node, self.reason)
        ends = split(source, [size * math.prod(inner) for size in sizes], self.reason)
        return [
            DeferredReshape(node, [size, *inner], self.reason) for size, node in zip(sizes, ends, strict=True)
        ]


class Value(tuple[Node, ...]):
    """The axes of a value, and what else is known of the value.

    Attributes:
      context: axes of stacked inputs that a loop strips before it hands each step its slice. What is computed
        from such a slice may be permuted differently at each step, as if it still carried the axis. `None` in
        what a rule returns stands for the contexts of all operands together.
      constant: the axes along which the value does not vary, so that it says nothing about their
        permutation.
      abstract: what is known of the entries.
      tie_free: axes along which no two positions hold equal numbers, unless weights happen to be equal. Such
        are the axes of a leaf, and of what is computed from leaves without rounding, clipping or comparing.
      deferred: the deferred reshapes whose parts are among the axes.
      static: the entries themselves, if they are integers or booleans that the program computes from
        constants alone. `rebasin.inference.static` finds them, whatever a rule returns.
    """

    context: frozenset[Node] | None
    constant: frozenset[Node]
    abstract: AbstractValue
    tie_free: frozenset[Node]
    deferred: tuple[DeferredReshape, ...]
    static: np.ndarray | None

    def __new__(
        cls,
        dims: Iterable[Node],
        context: frozenset[Node] | None = None,
        constant: Iterable[Node] = (),
        *,
        abstract: AbstractValue = None,
        tie_free: Iterable[Node] = (),
        deferred: Iterable[DeferredReshape] = (),
        static: np.ndarray | None = None,
    ) -> "Value":
        """Make a value with the axes `dims`; nodes in `tie_free` that are not among them are ignored."""
        value = super().__new__(cls, dims)
        value.context, value.constant, value.abstract = context, frozenset(constant), abstract
        roots = {node.root for node in tie_free}
        value.tie_free = frozenset(node for node in value if node.root in roots) if roots else frozenset()
        value.deferred = tuple(reshape for reshape in deferred if not reshape.is_resolved)
        value.static = static
        return value

    @classmethod
    def of_leaf(cls, dims: Sequence[Node], dtype: Any) -> "Value":
        """Make the value of a leaf, of which only this is known: floating numbers in it differ."""
        return cls(dims, frozenset(), tie_free=dims if jnp.issubdtype(dtype, jnp.floating) else ())

    def moved(self, dims: Iterable[Node], *, constant: Iterable[Node] = ()) -> "Value":
        """Return the same entries along other axes, for a rule that only moves or repeats them."""
        return Value(
            dims,
            constant=constant,
            abstract=self.abstract,
            tie_free=self.tie_free,
            deferred=self.deferred,
        )

    def with_static(self, entries: np.ndarray | None) -> "Value":
        """Return the same value with other static entries."""
        return Value(
            self,
            self.context,
            self.constant,
            abstract=self.abstract,
            tie_free=self.tie_free,
            deferred=self.deferred,
            static=entries,
        )

    @property
    def before_reshapes(self) -> "Value":
        """The value as it was before the reshapes that are still deferred, whose parts are in no group."""
        pending = [reshape for reshape in self.deferred if not reshape.is_resolved]
        if not pending:
            return self
        hidden = {part for reshape in pending for part in reshape.parts}
        dims = [*(node for node in self if node not in hidden), *(reshape.source for reshape in pending)]
        return Value(dims, self.context, self.constant, abstract=self.abstract)

    def is_tie_free(self, axis: int) -> bool:
        """Tell whether positions along an axis are known to differ; false for an axis that occurs twice."""
        roots = [node.root for node in self]
        return roots.count(roots[axis]) == 1 and roots[axis] in {node.root for node in self.tie_free}

    def pin_named(self, reason: str) -> None:
        """Pin the axes whose positions the entries name."""
        for axis in named_axes(self.abstract):
            pin(axis, reason, position_dependent=False)

    def resolve_reshapes(self) -> None:
        """Resolve every reshape that is still deferred."""
        for reshape in self.deferred:
            reshape.resolve()
