"""The algebra of axes: a union-find whose elements can be refined into factors and segments.

A `Node` stands for one permutation of ``size`` positions that is not known yet. Every axis of every value in
a program is a node, and two axes that must be permuted alike are united into one node. A node takes one of
these forms:

- *whole*: any permutation of its positions;
- a *product* of nodes: its positions are read in mixed radix, the first part varying slowest (a reshape);
- a *sum* of nodes: its positions are consecutive segments (a concatenation).

A node can also be *pinned*: only the identity is left, and the reason is kept. A product or sum whose parts
are all pinned is pinned too. A pinned node is *position-dependent* if the program makes its positions meet
(neighbours in a convolution, steps of a running sum). Then no inner group can be permuted differently at each
of them.

Refining a node (whole → product or sum, any form → pinned) only ever shrinks the set of permutations that it
allows, and nothing undoes a refinement. So constraints may come in any order, an early answer stays valid
when a later equation refines its nodes, and whatever cannot be expressed is pinned, which is always sound.

After every public call these invariants hold: the sizes of the parts multiply or add up to the size of their
node; no part of a product has size 1; the parts of a pinned node are pinned; a node is never among its own
parts.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rebasin.axis import Axis, Factor

__all__ = [
    "Node",
    "atoms",
    "concatenate",
    "factor",
    "factors",
    "pieces",
    "pin",
    "pinned",
    "product",
    "reasons",
    "split",
    "unite",
    "write_axis",
]

# The reason of a part of an axis that is a single position, such as the gate in an interleaved gated unit.
_SINGLE_POSITION = "a position that is taken out by itself"

# A sum of shifted values, h + roll(h, 1), refines an axis once per position until only the identity is left.
# An axis refined this often is pinned at once; otherwise Python's recursion limit would be reached first.
_MAX_DEPTH = 64


class Node:
    """One permutation of `size` positions that is not known yet."""

    __slots__ = ("_form", "_parent", "_parts", "_position_dependent", "_reason", "size")

    def __init__(self, size: int) -> None:
        self.size = int(size)  # sizes from `jnp.split` are NumPy integers, which JSON does not know
        self._parent: Node | None = None
        self._form: Literal["whole", "product", "sum"] = "whole"
        self._parts: tuple[Node, ...] = ()
        self._reason: str | None = None
        self._position_dependent = False

    @property
    def root(self) -> "Node":
        """Return the representative of all nodes united with this one."""
        node = self
        while node._parent is not None:
            if node._parent._parent is not None:
                node._parent = node._parent._parent  # shortens the next search
            node = node._parent
        return node

    @property
    def form(self) -> Literal["whole", "product", "sum"]:
        """Tell whether the node is whole, a product or a sum."""
        return self.root._form

    @property
    def parts(self) -> tuple["Node", ...]:
        """Return the factors of a product or the segments of a sum, first to last."""
        return self.root._parts

    @property
    def reason(self) -> str | None:
        """Return why the node is pinned as a whole; `None` if it is not."""
        return _settle(self.root)._reason

    @property
    def is_pinned(self) -> bool:
        """Tell whether only the identity is left; a single position cannot move either."""
        return self.size <= 1 or _settle(self.root)._reason is not None

    @property
    def is_atomic(self) -> bool:
        """Tell whether the node is whole or pinned, so that it is one factor of an axis."""
        return self.root._form == "whole" or self.is_pinned

    @property
    def is_position_dependent(self) -> bool:
        """Tell whether positions meet each other, which keeps the node from being an outer group.

        They do if a segment occurs twice: the axis was united with itself in another order.
        """
        root = _settle(self.root)
        segments = [part.root for part in root._parts] if root._form == "sum" else []
        return root._position_dependent or len(set(segments)) < len(segments)

    def __repr__(self) -> str:
        root = self.root
        if root._reason is not None:
            return f"pinned {root.size}"
        if root._form == "whole":
            return f"{root.size}"
        return "(" + {"product": "*", "sum": "+"}[root._form].join(map(repr, root._parts)) + ")"


def _settle(root: Node) -> Node:
    """Mark a root as pinned if all its parts have been pinned since it was made; return it."""
    if root._reason is None and root._parts and all(part.is_pinned for part in root._parts):
        known = (part.reason for part in root._parts)
        root._reason = next((reason for reason in known if reason is not None), _SINGLE_POSITION)
        root._position_dependent = any(part.is_position_dependent for part in root._parts)
    return root


def pinned(size: int, reason: str, *, position_dependent: bool = True) -> Node:
    """Make a node that allows only the identity; the arguments are those of `pin`."""
    node = Node(size)
    pin(node, reason, position_dependent=position_dependent)
    return node


def pin(node: Node, reason: str, *, position_dependent: bool = True) -> None:
    """Restrict `node` and everything united with it to the identity. The first reason is kept.

    Args:
      node: the node to pin.
      reason: why it cannot move, for `PermutationSpec.explain`.
      position_dependent: whether the positions of the node meet each other; false where they are only told
        apart, as along the axes of an input.
    """
    root = node.root
    if root._reason is None or position_dependent > root._position_dependent:
        root._reason = root._reason or reason
        root._position_dependent = root._position_dependent or position_dependent
        for part in root._parts:
            pin(part, reason, position_dependent=position_dependent)


def atoms(node: Node) -> frozenset[Node]:
    """Return the roots that a node is composed of, which have no parts themselves."""
    root = node.root
    if not root._parts:
        return frozenset((root,))
    return frozenset().union(*map(atoms, root._parts))


def product(parts: Sequence[Node]) -> Node:
    """Make the node whose positions are read in mixed radix over `parts`."""
    return _compound(
        "product", [part for part in parts if part.size != 1], math.prod(part.size for part in parts)
    )


def concatenate(parts: Sequence[Node]) -> Node:
    """Make the node whose positions are those of `parts`, one after the other."""
    return _compound("sum", [part for part in parts if part.size], sum(part.size for part in parts))


def _compound(form: Literal["product", "sum"], parts: list[Node], size: int) -> Node:
    if len(parts) == 1:
        return parts[0]
    node = Node(size)
    if parts and size:
        node._form, node._parts = form, tuple(parts)
    return node


def unite(x: Node, y: Node, reason: str, *, depth: int = 0) -> None:
    """Make two nodes of equal size the same permutation.

    Args:
      x: one node.
      y: the other node.
      reason: the reason to give if their refinements have nothing in common and both are pinned.
      depth: number of nested calls that led here.
    """
    x, y = _settle(x.root), _settle(y.root)
    if x is y:
        return
    if depth > _MAX_DEPTH:
        pin(x, reason)
    assert x.size == y.size, f"axes of sizes {x.size} and {y.size} cannot be one"
    if x._reason is not None or y._reason is not None:
        known = x._reason or y._reason or reason
        position_dependent = x._position_dependent or y._position_dependent
        pin(x, known, position_dependent=position_dependent)
        pin(y, known, position_dependent=position_dependent)
    elif x._form != "whole" and y._form != "whole":
        _unite_refined(x, y, reason, depth)
        # Uniting the parts may have pinned or united x and y themselves, so their roots are looked up again.
        x, y = x.root, y.root
    if x is not y:
        keep, drop = (x, y) if x._form != "whole" else (y, x)
        drop._parent = keep


def _unite_refined(x: Node, y: Node, reason: str, depth: int) -> None:
    """Bring two refined nodes to a common refinement and unite them part by part."""
    if x._form == "sum" and y._form == "product":
        x, y = y, x
    # Where one is a sum and the other a product, the sum is read as a product: `factor` makes all its
    # segments share the same inner factors.
    refine = split if x._form == "sum" else factor
    wanted = x._parts
    for a, b in zip(wanted, refine(y, [part.size for part in wanted], reason), strict=True):
        unite(a, b, reason, depth=depth + 1)
    if y._reason is not None:
        pin(x, y._reason, position_dependent=y._position_dependent)


def factor(node: Node, sizes: Sequence[int], reason: str) -> list[Node]:
    """Read a node as a product of factors of the given sizes.

    Args:
      node: the node, which is refined in place.
      sizes: sizes of the factors, the slowest first; their product is the size of the node.
      reason: the reason to give if the node is refined in a way that does not allow this, and is pinned.

    Returns:
      One node for each size.
    """
    root = _settle(node.root)
    assert math.prod(sizes) == root.size, f"{root.size} positions do not factor into {list(sizes)}"
    proper = [size for size in sizes if size != 1]
    if len(proper) <= 1 or not root.size:
        parts = [root] if len(proper) == 1 else [Node(size) for size in proper]
    elif root._form == "product":
        parts = _refine(root._parts, proper, _quotient, factor, product, reason)
    elif root._reason is not None:
        parts = _pinned_like(root, root._reason, proper)
    elif root._form == "whole":
        parts = [Node(size) for size in proper]
        root._form, root._parts = "product", tuple(parts)
    else:
        parts = _factor_sum(root, proper, reason)
    if parts is None:
        parts = _pin_clash(root, reason, proper)
    queue = iter(parts)
    return [Node(1) if size == 1 else next(queue) for size in sizes]


def split(node: Node, sizes: Sequence[int], reason: str) -> list[Node]:
    """Cut a node into consecutive segments of the given sizes.

    Args:
      node: the node, which is refined in place.
      sizes: sizes of the segments, first to last; their sum is the size of the node.
      reason: the reason to give if the node is refined in a way that does not allow this, and is pinned.

    Returns:
      One node for each size.
    """
    root = _settle(node.root)
    assert sum(sizes) == root.size, f"{root.size} positions do not split into {list(sizes)}"
    proper = [size for size in sizes if size]
    if len(proper) <= 1:
        parts = [root] if proper else []
    elif root._form == "sum":
        parts = _refine(root._parts, proper, _difference, split, concatenate, reason)
    elif root._reason is not None:
        parts = _pinned_like(root, root._reason, proper)
    elif root._form == "whole":
        parts = [Node(size) for size in proper]
        root._form, root._parts = "sum", tuple(parts)
    else:
        parts = _split_product(root, proper, reason)
    if parts is None:
        parts = _pin_clash(root, reason, proper)
    queue = iter(parts)
    return [next(queue) if size else Node(0) for size in sizes]


def _pin_clash(root: Node, reason: str, sizes: Sequence[int]) -> list[Node]:
    """Pin a node whose parts do not fit `sizes`; return a pinned node of each size."""
    if root._reason is None:
        pin(root, reason)
    return _pinned_like(root, root._reason or reason, sizes)


def _pinned_like(root: Node, reason: str, sizes: Sequence[int]) -> list[Node]:
    """Make one pinned node of each size, for the parts of a pinned node."""
    return [pinned(size, reason, position_dependent=root._position_dependent) for size in sizes]


def _refine(
    parts: Sequence[Node],
    sizes: Sequence[int],
    rest: Callable[[int, int], int],
    cut: Callable[[Node, Sequence[int], str], list[Node]],
    compose: Callable[[Sequence[Node]], Node],
    reason: str,
) -> list[Node] | None:
    """Regroup consecutive parts into nodes of the given sizes, cutting the parts that cross a boundary.

    The same walk serves products and sums. They differ in `rest`, which gives the size that remains of a
    whole without a part (0 if that is impossible), in how a part is cut, and in how parts are put together.

    Returns:
      One node for each size; `None` if the boundaries of the parts and of the sizes clash.
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
                part, leftover = cut(part, [missing, remainder], reason)
                queue.appendleft(leftover)
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
    """Read a sum as a product: every segment holds whole copies of the inner factors, which move alike."""
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
    """Cut a product into segments: boundaries cut the outer factors and leave the inner factors whole."""
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


def reasons(node: Node) -> list[str]:
    """Return why an axis, or parts of it, stay put; nothing for an axis of one position."""

    def whole_parts(root: Node) -> Iterator[Node]:
        for part in root._parts:
            yield from whole_parts(part.root)
        if not root._parts:
            yield root

    found = (
        p.reason or (_SINGLE_POSITION if p.size == 1 < node.size else None) for p in whole_parts(node.root)
    )
    return [reason for reason in dict.fromkeys(found) if reason is not None]


def factors(node: Node) -> Iterator[Node]:
    """Yield the roots that a node is made of, at every depth: each is whole or pinned."""
    root = node.root
    if root.is_atomic:
        yield root
        return
    for part in root._parts:
        yield from factors(part)


def pieces(node: Node) -> list[list[Node]]:
    """Return the factors of each choice of one segment wherever a node is a sum, as `Axis.pieces` does."""
    root = node.root
    if root.is_atomic:
        return [[root]]
    parts = [pieces(part) for part in root._parts]
    if root._form == "sum":
        return list(itertools.chain.from_iterable(parts))
    return [list(itertools.chain.from_iterable(choice)) for choice in itertools.product(*parts)]


def write_axis(
    node: Node,
    label: Callable[[Node], str | None],
    *,
    is_factor: Callable[[Node], bool] = lambda node: node.is_atomic,
) -> Axis:
    """Write a node as an axis; neighbours without a label are joined into one.

    Args:
      node: the node.
      label: returns the group of a root, `None` for one that stays put.
      is_factor: tells whether a root is to be one factor, whatever its parts.

    Returns:
      The axis; all its factors have sizes.
    """

    def write(root: Node) -> Axis:
        if is_factor(root):
            return Axis(((Factor(root.size, label(root)),),))
        join = Axis.product if root._form == "product" else Axis.concatenate
        return join(*(write(part.root) for part in root._parts))

    return write(node.root).simplify()
