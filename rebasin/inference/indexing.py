"""Finds the inner groups, which may be permuted differently at each position of another axis.

The head dimensions of attention may be permuted in each head by itself, hidden units in each expert, channels
in each norm group, inner widths in each of a stack of scanned layers. The axis of heads, experts, norm groups
or layers is then the *outer group*; it may also be an axis that stays.

Axis o may be an outer group of group d if the program keeps the positions of o apart wherever d occurs. That
holds under three conditions:

1. Every value that carries d carries o too, once each, in every block. (A value inside a loop over layers
   carries the layer axis implicitly, unless it comes from the carry. A value whose entries name positions of
   d counts as carrying d; one whose entries name positions of o does not carry o.)
2. No equation with d among its operands or results has a value in which o occurs twice. Otherwise position o
   of one value would face position o' of another, as in the product of two heads,
   ``out[o, o'] = Σ_d x[o, d] y[o', d]``.
3. No equation makes the positions of o meet (`Node.is_position_dependent`), as a running sum over o would.

Under these conditions every equation that d takes part in is, at each position of o, an equation of its own,
and the argument for one permutation of d holds position by position.
"""

import collections
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rebasin.inference.axes import Node, atoms, pieces
from rebasin.inference.values import Value, named_axes

__all__ = ["Equations", "find_outer_groups"]

# The values that take part in each equation, operands and results.
Equations = Iterable[Sequence[Value]]

# Values of more blocks than this are not analysed, and so rule out all outer groups of what they carry.
_MAX_BLOCKS = 256

_Counter = collections.Counter[Node]


def find_outer_groups(equations: Equations, groups: Sequence[Node]) -> dict[Node, tuple[Node, ...]]:
    """Find the outer groups of every group.

    Args:
      equations: all values of each equation. A leaf counts as an equation of its own, since one that only a
        loop takes apart is an operand of none as a whole.
      groups: roots of the groups, in the order of the leaves and their axes.

    Returns:
      The outer groups of each inner group. Axes that stay come first, then groups in the order of `groups`;
      an outer group that has outer groups itself comes after those. Of two groups that could each be the
      outer group of the other, the earlier one is.
    """
    candidates = _candidates(equations, set(groups))
    position = {group: i for i, group in enumerate(groups)}
    outer: dict[Node, list[Node]] = {}
    settling = set()

    def settle(group: Node) -> None:
        """Settle every outer group of a group, then the group itself."""
        settling.add(group)
        chosen = []
        for other in candidates.get(group, ()):
            mutual = group in candidates.get(other, ())
            if other.is_pinned:
                chosen.append(other)
            elif (position[other] < position[group] or not mutual) and other not in settling:
                chosen.append(other)
                if other not in outer:
                    settle(other)
        settling.remove(group)
        chosen.sort(key=lambda node: (len(outer.get(node, ())), position.get(node, -1)))
        # The outer groups of an outer group must be outer groups here too: the permutation of heads may
        # differ by layer only where the head dimensions are told apart by layer as well.
        outer[group] = [o for o in chosen if set(outer.get(o, ())) <= set(chosen)]

    for group in groups:
        if group not in outer:
            settle(group)
    return {group: tuple(outer[group]) for group in groups if outer[group]}


def _candidates(equations: Equations, groups: set[Node]) -> dict[Node, dict[Node, None]]:
    """Find for each group the axes that satisfy all three conditions; dicts serve as ordered sets."""
    candidates: dict[Node, dict[Node, None]] = {}
    may_be_outer = functools.cache(_may_be_outer)  # here all nodes are final
    known_blocks: dict[Any, tuple[list[_Counter] | None, frozenset[Node]]] = {}
    seen = set()
    for values in equations:
        signatures = [_signature(value) for value in values]
        for value, signature in zip(values, signatures, strict=True):
            if signature not in known_blocks:
                blocks = _blocks(value)
                counts = (count for block in blocks or () for count in block.items())
                known_blocks[signature] = blocks, frozenset(node for node, n in counts if n > 1)
        twice = frozenset().union(*[known_blocks[signature][1] for signature in signatures])
        for value, signature in zip(values, signatures, strict=True):
            if (signature, twice) in seen:
                continue  # the same value, which rules out nothing more
            seen.add((signature, twice))
            blocks, _ = known_blocks[signature]
            if blocks is None:
                candidates |= {group: {} for group in _all_nodes(value) & groups}
            silent = {node.root for node in value.constant}
            if silent:
                silent -= {atom for node in value if node not in value.constant for atom in atoms(node)}
            # A value whose entries name positions of an axis does not carry that axis: ``argmax`` over heads
            # compares the same dimension of every head.
            named = collections.Counter(_named_atoms(value))
            for block in blocks or ():
                allowed = [o for o, n in block.items() if may_be_outer(o) and n > named[o] and o not in twice]
                for group in (block.keys() & groups) - silent:
                    fresh = {o: None for o in allowed if o is not group and group not in twice}
                    known = candidates.get(group, fresh)
                    candidates[group] = {o: None for o in known if o in fresh}
    return candidates


def _signature(value: Value) -> tuple[Any, ...]:
    """Return all that `_candidates` reads of a value."""
    if value.constant or value.abstract is not None:
        return tuple(value), value.context, value.constant, named_axes(value.abstract)
    return tuple([node.root for node in value]), value.context


def _may_be_outer(node: Node) -> bool:
    """Tell whether the positions of an axis are kept apart wherever it occurs.

    Single positions are not united with each other, as they cannot move. So an axis with a segment of one
    position may have met itself in another order, unnoticed.
    """
    parts = _all_nodes([node])
    has_single = any(part.form == "sum" and any(p.size == 1 for p in part.parts) for part in parts)
    return node.size > 1 and not has_single and not any(part.is_position_dependent for part in parts)


def _blocks(value: Value) -> list[_Counter] | None:
    """Count how often each factor occurs in each block of a value; `None` if there are too many blocks."""
    # An axis of the context, or one whose positions the entries name, is one that every block carries.
    axes = [pieces(node.root) for node in (*value, *(value.context or ()), *_named(value))]
    if math.prod(map(len, axes)) > _MAX_BLOCKS:
        return None
    return [collections.Counter(itertools.chain.from_iterable(c)) for c in itertools.product(*axes)]


def _named(value: Value) -> list[Node]:
    """Return the axes that the entries name, without those of a plain count, which follow any permutation."""
    return [node for node in named_axes(value.abstract) if node not in value.constant]


def _named_atoms(value: Value) -> list[Node]:
    return [atom for node in _named(value) for atom in atoms(node)]


def _all_nodes(nodes: Iterable[Node]) -> set[Node]:
    """Return the roots of some nodes and of their parts at every depth."""
    found = set()
    for node in nodes:
        found |= {node.root} | _all_nodes(node.parts)
    return found
