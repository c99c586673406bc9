"""Finds the groups that may be permuted differently at each position of another axis.

The head dimensions of attention may be permuted in each head by itself, hidden units in each expert, channels
in each norm group, inner widths in each of a stack of scanned layers. Group d may be indexed by the axis o
(another group, or an axis that stays) if the program treats the positions of o apart wherever d occurs, which
holds if

1. every value that carries d carries o too, once each, in every segment (a value inside a loop over layers
   carries the layer axis implicitly, unless it comes from the carry);
2. no equation with d among its operands or results meets o twice in one value: then position o of the one
   would face position o' of the other, as in the product of two heads, ``out[o, o'] = Σ_d x[o, d] y[o', d]``;
3. no equation mixes positions of o (`Node.is_mixed`), as a running sum over o would.

Under these every equation that d takes part in is, at each position of o, an equation of its own, and the
argument for one permutation of d holds position by position.
"""

import collections
import itertools
from collections.abc import Iterable, Sequence

from rebasin.inference.axes import Node
from rebasin.inference.values import Value, named_axes

__all__ = ["Equations", "find_indices"]

# What takes part in an equation, operands and results.
Equations = Iterable[Sequence[Value]]

# Values of more blocks than this say nothing about indices, and so rule them out.
_MAX_BLOCKS = 256

_Counter = collections.Counter[Node]


def find_indices(equations: Equations, groups: Sequence[Node]) -> dict[Node, tuple[Node, ...]]:
    """The axes that index each group.

    Args:
      equations: all values of each equation; a leaf that only a loop takes apart is an equation of its own.
      groups: roots of the groups, in the order of the leaves and their axes.

    Returns:
      For each indexed group its index, in the order of `groups`, axes that stay first. Of two groups that
      could index each other, the earlier one is the index. An index that is itself indexed comes after its
      own index.
    """
    candidates = _candidates(equations, set(groups))
    position = {group: i for i, group in enumerate(groups)}
    index: dict[Node, list[Node]] = {}
    settling = set()

    def settle(group: Node) -> None:
        """Settles every index of a group before the group itself."""
        settling.add(group)
        chosen = []
        for other in candidates.get(group, ()):
            mutual = group in candidates.get(other, ())
            if other.is_pinned:
                chosen.append(other)
            elif (position[other] < position[group] or not mutual) and other not in settling:
                chosen.append(other)
                if other not in index:
                    settle(other)
        settling.remove(group)
        chosen.sort(key=lambda node: (len(index.get(node, ())), position.get(node, -1)))
        # The index of an index must be one's own too: the permutation of heads may differ by layer only where
        # the head dimensions are told apart by layer as well.
        index[group] = [o for o in chosen if set(index.get(o, ())) <= set(chosen)]

    for group in groups:
        if group not in index:
            settle(group)
    return {group: tuple(index[group]) for group in groups if index[group]}


def _candidates(equations: Equations, groups: set[Node]) -> dict[Node, dict[Node, None]]:
    """For each group the axes that satisfy all three conditions; dicts as sets in a fixed order."""
    candidates: dict[Node, dict[Node, None]] = {}
    cache: dict[tuple[Node, ...], list[_Counter] | None] = {}
    for values in equations:
        blocks_of = [_blocks(value, cache) for value in values]
        twice = {node for blocks in blocks_of for block in blocks or () for node, n in block.items() if n > 1}
        for value, blocks in zip(values, blocks_of, strict=True):
            if blocks is None:
                candidates |= {group: {} for group in _all_nodes(value) & groups}
            silent = {node.root for node in value.constant}
            for block in blocks or ():
                allowed = [o for o in block if _may_index(o) and o not in twice]
                for group in (block.keys() & groups) - silent:
                    fresh = {o: None for o in allowed if o is not group and group not in twice}
                    known = candidates.get(group, fresh)
                    candidates[group] = {o: None for o in known if o in fresh}
    return candidates


def _may_index(node: Node) -> bool:
    return node.size > 1 and not node.is_mixed


def _blocks(value: Value, cache: dict[tuple[Node, ...], list[_Counter] | None]) -> list[_Counter] | None:
    """How often each factor occurs in each choice of segments; `None` where there is no such form."""
    # An axis of the context, or one whose positions the entries name, is one that every block carries.
    named = (node for node in named_axes(value.note) if node not in value.constant)
    key = tuple(node.root for node in (*value, *(value.context or ()), *named))
    if key not in cache:
        axes = [_segments(node) for node in key]
        cache[key] = None
        if all(axis is not None for axis in axes):
            choices = list(
                itertools.islice(itertools.product(*(axis or () for axis in axes)), _MAX_BLOCKS + 1)
            )
            if len(choices) <= _MAX_BLOCKS:
                cache[key] = [
                    collections.Counter(itertools.chain.from_iterable(choice)) for choice in choices
                ]
    return cache[key]


def _segments(node: Node) -> list[list[Node]] | None:
    """As `axes.segments`, but pins nothing: `None` for a sum inside a product."""
    if node.is_pinned or node.form == "whole":
        return [[node.root]]
    parts = [_segments(part) for part in node.parts]
    if any(part is None for part in parts):
        return None
    known = [part or [] for part in parts]
    if node.form == "sum":
        return list(itertools.chain.from_iterable(known))
    if any(len(part) > 1 for part in known[1:]):
        return None
    inner = list(itertools.chain.from_iterable(part[0] for part in known[1:]))
    return [segment + inner for segment in known[0]]


def _all_nodes(nodes: Iterable[Node]) -> set[Node]:
    found = set()
    for node in nodes:
        found |= {node.root} | _all_nodes(node.parts)
    return found
