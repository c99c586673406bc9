"""The algebra of axes: union-find over axes that can be refined into factors and segments.

A `Node` stands for one permutation, yet unknown, of ``size`` positions. An axis of a value in the program is
a node, and two axes that must be permuted alike are united into one. A node may be

- *whole*: any permutation of its positions;
- a *product* of nodes: its positions are read in mixed radix, the first part varying slowest (a reshape);
- a *sum* of nodes: its positions are consecutive segments (a concatenation);
- *pinned*: the identity, with the reason; and *mixed* if the program tells its positions apart (neighbours in
  a convolution, steps of a running sum), so that nothing can be permuted differently at each of them.

Refining (whole → product or sum, any → pinned) only ever shrinks the set of permutations that a node allows,
and a node never becomes less refined. So the constraints may come in any order, an early answer stays valid
when a later equation refines its nodes, and whatever cannot be expressed is pinned, which is always sound.

Invariants, after every public call: sizes of parts multiply or add up to the size of their node; no part has
size 1 in a product; the parts of a pinned node are pinned; a node is never among its own parts.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Literal

__all__ = ["Node", "concatenate", "factor", "pin", "pinned", "product", "segments", "split", "unite"]

# An axis of more segments than this is pinned instead: the spec could no longer be read, and costs more than
# it gains.
_MAX_SEGMENTS = 1024

# Shifted sums (h + roll(h, 1)) refine each other once a position, and leave the identity in the end: so an
# axis refined this often is pinned, rather than taken to pieces down to the recursion limit.
_MAX_DEPTH = 64


class Node:
    """One permutation of `size` positions, unknown so far."""

    __slots__ = ("_form", "_mixed", "_parent", "_parts", "_reason", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._parent: Node | None = None
        self._form: Literal["whole", "product", "sum"] = "whole"
        self._parts: tuple[Node, ...] = ()
        self._reason: str | None = None
        self._mixed = False

    @property
    def root(self) -> "Node":
        """The representative of all nodes united with this one."""
        node = self
        while node._parent is not None:
            if node._parent._parent is not None:
                node._parent = node._parent._parent  # halves the path for the next search
            node = node._parent
        return node

    @property
    def form(self) -> Literal["whole", "product", "sum"]:
        """How the node is refined."""
        return self.root._form

    @property
    def parts(self) -> tuple["Node", ...]:
        """The factors of a product or the segments of a sum, first to last."""
        return self.root._parts

    @property
    def reason(self) -> str | None:
        """Why the node is pinned as a whole; `None` if it is not."""
        return self.root._reason

    @property
    def is_pinned(self) -> bool:
        """Whether only the identity is left; a single position cannot move."""
        return self.root._reason is not None or self.size <= 1

    @property
    def is_mixed(self) -> bool:
        """Whether positions meet each other, so that the axis cannot index a permutation of another."""
        return self.root._mixed

    def __repr__(self) -> str:
        root = self.root
        if root._reason is not None:
            return f"pinned {root.size}"
        if root._form == "whole":
            return f"{root.size}"
        return "(" + {"product": "*", "sum": "+"}[root._form].join(map(repr, root._parts)) + ")"


def pinned(size: int, reason: str, *, mixed: bool = True) -> Node:
    """A node that allows the identity alone; see `pin`."""
    node = Node(size)
    pin(node, reason, mixed=mixed)
    return node


def pin(node: Node, reason: str, *, mixed: bool = True) -> None:
    """Leaves a node, and all that is united with it, the identity alone. The first reason is kept.

    Args:
      node: the node.
      reason: why.
      mixed: whether positions meet each other; not so where they are only told apart, as the axes of an
        input.
    """
    root = node.root
    if root._reason is None or mixed > root._mixed:
        root._reason = root._reason or reason
        root._mixed = root._mixed or mixed
        for part in root._parts:
            pin(part, reason, mixed=mixed)


def product(parts: Sequence[Node]) -> Node:
    """The node whose positions are read in mixed radix over `parts`."""
    return _compound(
        "product", [part for part in parts if part.size != 1], math.prod(part.size for part in parts)
    )


def concatenate(parts: Sequence[Node]) -> Node:
    """The node whose positions are those of `parts`, one after the other."""
    return _compound("sum", [part for part in parts if part.size], sum(part.size for part in parts))


def _compound(form: Literal["product", "sum"], parts: list[Node], size: int) -> Node:
    if len(parts) == 1:
        return parts[0]
    node = Node(size)
    if parts and size:
        node._form, node._parts = form, tuple(parts)
        reasons = [part.reason for part in parts if part.size > 1]
        if reasons and None not in reasons:
            node._reason = reasons[0]
            node._mixed = any(part.is_mixed for part in parts)
    return node


def unite(x: Node, y: Node, reason: str, *, depth: int = 0) -> None:
    """Makes two nodes of one size the same permutation.

    Args:
      x: a node.
      y: another.
      reason: what to say where their refinements have nothing in common and both are pinned.
      depth: how many refinements led here.
    """
    x, y = x.root, y.root
    if x is y:
        return
    if depth > _MAX_DEPTH:
        pin(x, reason)
    assert x.size == y.size, f"axes of sizes {x.size} and {y.size} cannot be one"
    if x._reason is not None or y._reason is not None:
        known, mixed = x._reason or y._reason or reason, x._mixed or y._mixed
        pin(x, known, mixed=mixed)
        pin(y, known, mixed=mixed)
    elif x._form != "whole" and y._form != "whole":
        _unite_refined(x, y, reason, depth)
        # Parts may have been pinned or joined meanwhile; both now describe the same permutations.
        x, y = x.root, y.root
    if x is not y:
        keep, drop = (x, y) if x._form != "whole" else (y, x)
        drop._parent = keep


def _unite_refined(x: Node, y: Node, reason: str, depth: int) -> None:
    """Brings two refined nodes to one common refinement and unites it part by part."""
    if x._form == "sum" and y._form == "product":
        x, y = y, x
    # A sum is read as the other node's product: then all its segments hold the same inner factors.
    refine = split if x._form == "sum" else factor
    wanted = x._parts
    for a, b in zip(wanted, refine(y, [part.size for part in wanted], reason), strict=True):
        unite(a, b, reason, depth=depth + 1)
    if y._reason is not None:
        pin(x, y._reason, mixed=y._mixed)


def factor(node: Node, sizes: Sequence[int], reason: str) -> list[Node]:
    """Reads a node as a product of the given sizes.

    Args:
      node: the node, refined in place.
      sizes: sizes of the factors, first slowest; their product is the node's size.
      reason: what to say if the node's refinement does not allow it and it is pinned.

    Returns:
      One node for each size.
    """
    root = node.root
    assert math.prod(sizes) == root.size, f"{root.size} positions do not factor into {list(sizes)}"
    proper = [size for size in sizes if size != 1]
    if len(proper) <= 1 or not root.size:
        parts = [root] if len(proper) == 1 else [Node(size) for size in proper]
    elif root._reason is not None:
        parts = [pinned(size, root._reason, mixed=root._mixed) for size in proper]
    elif root._form == "whole":
        parts = [Node(size) for size in proper]
        root._form, root._parts = "product", tuple(parts)
    elif root._form == "product":
        parts = _refine(root._parts, proper, _quotient, factor, product, reason)
    else:
        parts = _factor_sum(root, proper, reason)
    if parts is None:
        pin(root, reason)
        parts = [pinned(size, reason) for size in proper]
    queue = iter(parts)
    return [Node(1) if size == 1 else next(queue) for size in sizes]


def split(node: Node, sizes: Sequence[int], reason: str) -> list[Node]:
    """Cuts a node into consecutive segments of the given sizes.

    Args:
      node: the node, refined in place.
      sizes: sizes of the segments, first to last; their sum is the node's size.
      reason: what to say if the node's refinement does not allow it and it is pinned.

    Returns:
      One node for each size.
    """
    root = node.root
    assert sum(sizes) == root.size, f"{root.size} positions do not split into {list(sizes)}"
    proper = [size for size in sizes if size]
    if len(proper) <= 1:
        parts = [root] if proper else []
    elif root._reason is not None:
        parts = [pinned(size, root._reason, mixed=root._mixed) for size in proper]
    elif root._form == "whole":
        parts = [Node(size) for size in proper]
        root._form, root._parts = "sum", tuple(parts)
    elif root._form == "sum":
        parts = _refine(root._parts, proper, _difference, split, concatenate, reason)
    else:
        parts = _split_product(root, proper, reason)
    if parts is None:
        pin(root, reason)
        parts = [pinned(size, reason) for size in proper]
    queue = iter(parts)
    return [next(queue) if size else Node(0) for size in sizes]


def _refine(
    parts: Sequence[Node],
    sizes: Sequence[int],
    rest: Callable[[int, int], int],
    cut: Callable[[Node, Sequence[int], str], list[Node]],
    compose: Callable[[Sequence[Node]], Node],
    reason: str,
) -> list[Node] | None:
    """Regroups consecutive parts into nodes of the given sizes, cutting parts where a boundary falls inside.

    The same walk serves products and sums, which differ in `rest`, what remains of a whole without a part (0
    if that cannot be), in how a part is cut and in how parts are put together. `None` where boundaries clash.
    """
    queue = collections.deque(parts)
    regrouped = []
    for missing in sizes:
        collected = []
        while missing:
            part = queue.popleft()
            if part.size > missing:
                remainder = rest(part.size, missing)
                if not remainder:
                    return None
                part, tail = cut(part, [missing, remainder], reason)
                queue.appendleft(tail)
            collected.append(part)
            if part.size == missing:
                break
            missing = rest(missing, part.size)
        else:
            return None
        regrouped.append(compose(collected))
    return regrouped


def _quotient(whole: int, part: int) -> int:
    return whole // part if whole % part == 0 else 0


def _difference(whole: int, part: int) -> int:
    return whole - part


def _factor_sum(root: Node, sizes: Sequence[int], reason: str) -> list[Node] | None:
    """A sum read as a product: every segment holds whole inner products, which all move alike."""
    inner = math.prod(sizes[1:])
    if any(part.size % inner for part in root._parts):
        return None
    outers, inners = [], None
    for part in root._parts:
        outer, *own = factor(part, [part.size // inner, *sizes[1:]], reason)
        outers.append(outer)
        if inners is None:
            inners = own
        for a, b in zip(inners, own, strict=True):
            unite(a, b, reason)
    return [concatenate(outers), *(inners or [])]


def _split_product(root: Node, sizes: Sequence[int], reason: str) -> list[Node] | None:
    """A product cut into segments: boundaries fall between inner products, and cut the outer factors."""
    parts = root._parts
    inner_from = next(i for i in range(len(parts) + 1) if not any(s % _size(parts[i:]) for s in sizes))
    outer, inner = parts[:inner_from], parts[inner_from:]
    if not inner:
        return None
    if len(outer) > 1:
        for part in outer:
            pin(part, reason)
    heads = split(product(outer), [size // _size(inner) for size in sizes], reason)
    return [product([head, *inner]) for head in heads]


def _size(parts: Sequence[Node]) -> int:
    return math.prod(part.size for part in parts)


def segments(node: Node) -> list[list[Node]]:
    """The node as a list of segments, each a list of whole or pinned factors.

    A sum inside a product has that form only if the factors around it are pinned and can be unrolled, so they
    are pinned here where they are not yet. Callers repeat until nothing changes.
    """
    root = node.root
    if root._reason is not None or root._form == "whole" or root.size <= 1:
        return [[root]]
    if root._form == "sum":
        return [segment for part in root._parts for segment in segments(part)]
    result: list[list[Node]] = [[]]
    for part in root._parts:
        inner = segments(part)
        if len(inner) == 1:
            result = [segment + inner[0] for segment in result]
            continue
        copies = sum(_size(segment) for segment in result)
        why = "it repeats a concatenated axis, which no spec can express"
        for outer in (factor for segment in result for factor in segment):
            pin(outer, why)
        if copies * len(inner) > _MAX_SEGMENTS:
            pin(part, f"it would fall into {copies * len(inner)} segments")
            return [[root]] if root._reason else segments(root)
        result = [list(segment) for _ in range(copies) for segment in inner]
    return result
