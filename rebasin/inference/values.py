"""What inference keeps of a value: its axes, and beside them an abstract value of its entries.

A router computes *which* expert an example goes to: the entries of that value are positions along the axis of
the experts. If the experts are permuted, those entries are renamed, and whatever is looked up with them is
the same as before. So inference follows such positions through the program until they meet an axis: in a
gather, in a scatter, or in a comparison with a count along it (one-hot). The axis that they name is pinned as
soon as anything else is computed with them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from rebasin.inference.axes import Node, atoms, concatenate, factor, pin, product, split, unite

__all__ = [
    "CONSTANT",
    "NEVER",
    "NO_TRAITS",
    "WEIGHT",
    "AbstractValue",
    "Components",
    "DeferredReshape",
    "Dims",
    "Never",
    "Number",
    "Positions",
    "Traits",
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


# What is known of every entry of a value, whatever the inputs and for almost all weights:
#   bounded:  it is finite and of ordinary size;
#   smooth:   it was computed without rounding, clipping or comparing;
#   nonzero:  it is not zero;
#   weighted: weights took part in it.
# `rebasin.inference.traits` says how they are followed, and what for.
Traits: TypeAlias = frozenset[str]

NO_TRAITS: Traits = frozenset()
CONSTANT: Traits = frozenset({"bounded", "smooth", "nonzero"})
WEIGHT: Traits = CONSTANT | {"weighted"}


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
      constant: nodes among the axes, or among their parts, that the value says nothing about: it is the same
        however each of them is permuted, with all of its occurrences at once. Such are the axes of
        ``jnp.ones``, both axes of ``jnp.eye`` together, and the axis of `iota` together with the positions
        that it names.
      abstract: what is known of the entries.
      tie_free: axes along which no two positions hold equal numbers, unless weights happen to be equal. Such
        are the axes of a leaf, and of what is computed from leaves without rounding, clipping or comparing.
      traits: what is known of the numbers.
      states_traits: whether `traits` were given. Where a rule gives none, a result has those that its
        operands have in common if the primitive only moves entries, else none.
      deferred: the deferred reshapes whose parts are among the axes.
      static: the entries themselves, if they are integers or booleans that the program computes from
        constants alone. `rebasin.inference.static` finds them, whatever a rule returns.
    """

    context: frozenset[Node] | None
    constant: frozenset[Node]
    abstract: AbstractValue
    tie_free: frozenset[Node]
    traits: Traits
    states_traits: bool
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
        traits: Traits | None = None,
        deferred: Iterable[DeferredReshape] = (),
        static: np.ndarray | None = None,
    ) -> "Value":
        """Make a value with the axes `dims`; nodes in `tie_free` that are not among them are ignored."""
        value = super().__new__(cls, dims)
        value.context, value.constant, value.abstract = context, frozenset(constant), abstract
        roots = {node.root for node in tie_free} if tie_free else ()
        value.tie_free = frozenset([node for node in value if node.root in roots]) if roots else frozenset()
        value.traits, value.states_traits = traits or NO_TRAITS, traits is not None
        value.deferred = tuple([reshape for reshape in deferred if not reshape.is_resolved])
        value.static = static
        return value

    @classmethod
    def of_leaf(cls, dims: Sequence[Node], dtype: Any) -> "Value":
        """Make the value of a leaf: its numbers differ, unless they are integers or have few digits."""
        wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
        traits = WEIGHT if jnp.issubdtype(dtype, jnp.inexact) else NO_TRAITS
        return cls(dims, frozenset(), tie_free=dims if wide else (), traits=traits)

    def moved(self, dims: Iterable[Node]) -> "Value":
        """Return the same entries along other axes, for a rule that only moves or repeats them."""
        return Value(dims, abstract=self.abstract, tie_free=self.tie_free, deferred=self.deferred)

    def renewed(self) -> "Value":
        """Return the same value with new nodes in place of the constant ones, for one use of the value.

        Each use may then be permuted by itself, so that a constant ties nothing that it meets.
        """
        if not self.constant:
            return self
        constant = {node.root for node in self.constant if not node.is_pinned}
        fresh: dict[Node, Node] = {}

        def renew(node: Node) -> Node:
            root = node.root
            if root not in fresh:
                if root.is_pinned:
                    fresh[root] = root
                elif root.parts:
                    parts = [renew(part) for part in root.parts]
                    is_same = all(a.root is b.root for a, b in zip(parts, root.parts, strict=True))
                    compose = product if root.form == "product" else concatenate
                    fresh[root] = root if is_same else compose(parts)
                else:
                    fresh[root] = Node(root.size) if root in constant else root
            return fresh[root]

        return Value(
            map(renew, self),
            self.context,
            map(renew, self.constant),
            abstract=_rename(self.abstract, renew),
            tie_free=self.tie_free,
            traits=self.traits,
            deferred=self.deferred,
            static=self.static,
        )

    def with_static(self, entries: np.ndarray | None) -> "Value":
        """Return the same value with other static entries."""
        return Value(
            self,
            self.context,
            self.constant,
            abstract=self.abstract,
            tie_free=self.tie_free,
            traits=self.traits,
            deferred=self.deferred,
            static=entries,
        )

    @property
    def before_reshapes(self) -> "Value":
        """The value as it was before the reshapes that are still deferred, whose parts are in no group."""
        pending = [reshape for reshape in self.deferred if not reshape.is_resolved] if self.deferred else ()
        if not pending:
            return self
        hidden = {part for reshape in pending for part in reshape.parts}
        dims = [*(node for node in self if node not in hidden), *(reshape.source for reshape in pending)]
        return Value(dims, self.context, self.constant, abstract=self.abstract)

    @property
    def varying(self) -> list[Node]:
        """The nodes that the value says something about, be it as axes or as axes that the entries name."""
        nodes = list(self)
        if self.abstract is not None:
            nodes += named_axes(self.abstract)
        if self.deferred:
            nodes += [reshape.source for reshape in self.deferred if not reshape.is_resolved]
        if not self.constant:
            return nodes
        constant = {node.root for node in self.constant}
        return [atom for node in nodes for atom in atoms(node) if atom not in constant]

    def is_constant(self, axis: int) -> bool:
        """Tell whether the value is the same at all positions along an axis."""
        node = self[axis]
        if node not in self.constant or node.form != "whole":
            return False
        return sum(node.root in atoms(other) for other in (*self, *named_axes(self.abstract))) == 1

    def is_tie_free(self, axis: int) -> bool:
        """Tell whether positions along an axis are known to differ; false for an axis that occurs twice."""
        if not self.tie_free:
            return False
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


def _rename(abstract: AbstractValue, renew: Callable[[Node], Node]) -> AbstractValue:
    """Return what is known of the entries with other nodes for the axes that they name."""
    if isinstance(abstract, Positions):
        return Positions(renew(abstract.axis), abstract.beyond)
    if isinstance(abstract, Components):
        return Components(tuple(_rename(part, renew) for part in abstract.parts))
    return abstract
