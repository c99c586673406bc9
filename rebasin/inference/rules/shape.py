"""Primitives that move, repeat, cut or join positions without computing anything."""

import math
from collections.abc import Iterator, Sequence

from rebasin.inference.axes import Node, concatenate, factor, pin, pinned, product, split, unite
from rebasin.inference.rule import Equation, keeps_folds, reads_notes, register_rule
from rebasin.inference.values import Components, Dims, Fold, Positions, Value


@register_rule("broadcast_in_dim")
@reads_notes
def broadcast_in_dim(equation: Equation, x: Value, *_: Dims) -> Sequence[Dims]:
    """Operand axis k becomes output axis d[k]; along every other axis any permutation fits a constant.

    An axis of size 1 that is repeated is constant along the output too.
    """
    (shape,) = equation.shapes
    fresh = [Node(size) for size in shape]
    dims = list(fresh)
    for node, d in zip(x, equation.params["broadcast_dimensions"], strict=True):
        if node.size == shape[d]:
            dims[d] = node
    return [x.moved(dims, constant=set(fresh) & set(dims))]


@register_rule("transpose")
@reads_notes
@keeps_folds
def transpose(equation: Equation, x: Value) -> Sequence[Dims]:
    """Output axis i is input axis ``permutation[i]``."""
    return [x.moved(x[i] for i in equation.params["permutation"])]


@register_rule("squeeze")
@reads_notes
@keeps_folds
def squeeze(equation: Equation, x: Value) -> Sequence[Dims]:
    """Axes of size 1 are dropped."""
    return [x.moved(node for i, node in enumerate(x) if i not in equation.params["dimensions"])]


@register_rule("expand_dims")
@reads_notes
@keeps_folds
def expand_dims(equation: Equation, x: Value) -> Sequence[Dims]:
    """Axes of size 1 are inserted."""
    rest = iter(x)
    (shape,) = equation.shapes
    return [x.moved(Node(1) if i in equation.params["dimensions"] else next(rest) for i in range(len(shape)))]


@register_rule("reshape")
@reads_notes
def reshape(equation: Equation, x: Value, *_: Dims) -> Sequence[Dims]:
    """Positions keep their row-major order: axes are read as products of common factors and rejoined.

    Factors are put off (`Fold`), for the case that they turn out to be segments.
    """
    (shape,) = equation.shapes
    if equation.params.get("dimensions") is not None or math.prod(shape) == 0:
        why = equation.because("a reshape that also transposes, or of no positions")
        x.pin_named(why)
        for node in x:
            pin(node, why)
        return [tuple(pinned(size, why) for size in shape)]
    dims: list[Node] = [Node(1)] * len(shape)
    folds = []
    for ins, outs in _matching_runs([node.size for node in x], shape):
        whole = product([x[i] for i in ins])
        if len(outs) == 1:
            dims[outs[0]] = whole
            continue
        folds.append(Fold(whole, [shape[o] for o in outs], equation.because("no common factors")))
        for o, part in zip(outs, folds[-1].parts, strict=True):
            dims[o] = part
    return [Value(dims, note=x.note, distinct=x.distinct, folds=folds)]


def _matching_runs(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Shortest runs of axes of equal product; axes of size 1 are left out."""
    left = [i for i, size in enumerate(before) if size != 1]
    right = [o for o, size in enumerate(after) if size != 1]
    while left:
        ins, outs = [left.pop(0)], [right.pop(0)]
        a, b = before[ins[0]], after[outs[0]]
        while a != b:
            if a < b:
                ins.append(left.pop(0))
                a *= before[ins[-1]]
            else:
                outs.append(right.pop(0))
                b *= after[outs[-1]]
        yield ins, outs


@register_rule("concatenate")
@reads_notes
def concatenate_rule(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Along ``dimension`` the operands are segments; along every other axis they are permuted alike."""
    axis = equation.params["dimension"]
    dims = list(inputs[0])
    for other in inputs[1:]:
        for i, (x, y) in enumerate(zip(dims, other, strict=True)):
            if i != axis:
                unite(x, y, equation.because("operands with incompatible factors"))
    dims[axis] = concatenate([x[axis] for x in inputs])
    if axis == len(dims) - 1 and all(x[axis].size == 1 for x in inputs):
        return [Value(dims, note=Components(tuple(x.note for x in inputs)))]
    for x in inputs:
        x.pin_named(equation.because("positions are joined to other numbers"))
    return [tuple(dims)]


@register_rule("stack")
def stack(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """``out[…, j, …] = x_j[…]``: operands are permuted alike, and keep their order along the new axis."""
    axis = equation.params["axis"]
    for other in inputs[1:]:
        for x, y in zip(inputs[0], other, strict=True):
            unite(x, y, equation.because("operands with incompatible factors"))
    order = pinned(len(inputs), equation.because("operands are stacked in order"), mixed=False)
    return [(*inputs[0][:axis], order, *inputs[0][axis:])]


@register_rule("unstack")
@keeps_folds
def unstack(equation: Equation, x: Value) -> Sequence[Dims]:
    """``out_j[…] = x[…, j, …]``: every position of the axis is an output of its own."""
    axis = equation.params["axis"]
    cut = _cut_fold(x, axis, [1] * x[axis].size)
    if cut is not None:
        return [part.moved(node for i, node in enumerate(part) if i != axis) for part in cut]
    pin(x[axis], equation.because("each position becomes a value of its own"), mixed=False)
    return [(*x[:axis], *x[axis + 1 :]) for _ in equation.shapes]


@register_rule("tile")
def tile(equation: Equation, x: Dims) -> Sequence[Dims]:
    """``out[r · n + i] = x[i]``: an axis is read as (copies, positions), and copies are all the same."""
    return [tuple(product([Node(r), node]) for r, node in zip(equation.params["reps"], x, strict=True))]


@register_rule("split")
@keeps_folds
def split_rule(equation: Equation, x: Value) -> Sequence[Dims]:
    """The outputs are consecutive segments along one axis."""
    axis = equation.params["axis"]
    cut = _cut_fold(x, axis, equation.params["sizes"])
    if cut is not None:
        return cut
    parts = split(x[axis], equation.params["sizes"], equation.because("segments that cut factors"))
    return [(*x[:axis], part, *x[axis + 1 :]) for part in parts]


def _cut_fold(x: Value, axis: int, sizes: Sequence[int]) -> list[Value] | None:
    """The segments of an axis that is the first of a fold, still folded.

    Where it is not, `None`, and the folds are open.
    """
    first = [fold for fold in x.folds if not fold.is_open and fold.parts[0] is x[axis]]
    if not first:
        for fold in x.folds:
            fold.open()
        return None
    others = [fold for fold in x.folds if fold is not first[0]]
    values = []
    for piece in first[0].cut(sizes):
        new = dict(zip(first[0].parts, piece.parts, strict=True))
        values.append(Value((new.get(node, node) for node in x), note=x.note, folds=[*others, piece]))
    return values


@register_rule("slice")
@reads_notes
@keeps_folds
def slice_rule(equation: Equation, x: Value) -> Sequence[Dims]:
    """A contiguous range is a segment of its axis; of a range with gaps see `_every_nth`."""
    if isinstance(x.note, Components):
        x.pin_named(equation.because("a part of an index"))
        x = Value(x, folds=x.folds)
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(x)
    (shape,) = equation.shapes
    shortened = [i for i, node in enumerate(x) if shape[i] != node.size]
    if len(shortened) == 1 and strides[shortened[0]] == 1:
        (i,) = shortened
        cut = _cut_fold(x, i, [starts[i], limits[i] - starts[i], x[i].size - limits[i]])
        if cut is not None:
            return cut[1:2]
    for fold in x.folds:
        fold.open()
    dims = []
    for i, node in enumerate(x):
        if shape[i] == node.size:
            dims.append(node)
        elif strides[i] == 1:
            sizes = [starts[i], limits[i] - starts[i], node.size - limits[i]]
            dims.append(split(node, sizes, equation.because("a range that cuts factors"))[1])
        else:
            dims.append(_every_nth(equation, node, shape[i], strides[i]))
    return [x.moved(dims)]


def _every_nth(equation: Equation, node: Node, count: int, stride: int) -> Node:
    """``out[i] = x[stride · i + start]``: if whole strides cover x, it is read as ``[count, stride]``.

    The place within a stride stays put, and strides move as one: the halves of an interleaved pair. Starts
    below the stride all give the same `count` then. Otherwise the axis is pinned.
    """
    why = equation.because(f"one position in {stride}")
    if count * stride != node.size:
        pin(node, why, mixed=False)
        return pinned(count, why, mixed=False)
    strides, place = factor(node, [count, stride], why)
    pin(place, why, mixed=False)
    return strides


@register_rule("pad")
def pad(equation: Equation, x: Dims, value: Dims) -> Sequence[Dims]:
    """Padding adds segments of one value, which fit any permutation; inner or negative padding pins."""
    dims = []
    (shape,) = equation.shapes
    for node, size, (low, high, interior) in zip(x, shape, equation.params["padding_config"], strict=True):
        if interior == 0 and low >= 0 and high >= 0:
            dims.append(concatenate([Node(low), node, Node(high)]))
        else:
            why = equation.because("padding between positions, or negative")
            pin(node, why)
            dims.append(pinned(size, why))
    return [tuple(dims)]


@register_rule("rev")
def rev(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Reversed axes are pinned: the output's permutation would be another one."""
    for axis in equation.params["dimensions"]:
        pin(x[axis], equation.because("the axis is reversed"))
    return [x]


@register_rule("iota")
def iota(equation: Equation, *_: Dims) -> Sequence[Dims]:
    """``out[i] = i``: names the positions of its own axis, whatever their order; constant along others."""
    (shape,) = equation.shapes
    nodes = [Node(size) for size in shape]
    # A count says nothing about a permutation that it may follow.
    return [Value(nodes, constant=nodes, note=Positions(nodes[equation.params["dimension"]]))]


@register_rule("dynamic_slice", "dynamic_update_slice")
def dynamic_slice(equation: Equation, x: Dims, *rest: Dims) -> Sequence[Dims]:
    """An axis taken or written whole passes through; a range that starts where the data say pins its axis."""
    (shape,) = equation.shapes
    update = rest[0] if equation.primitive == "dynamic_update_slice" else tuple(Node(size) for size in shape)
    dims = []
    for node, part, size in zip(x, update, shape, strict=True):
        if node.size == part.size:
            unite(node, part, equation.because("operands with incompatible factors"))
            dims.append(node)
        else:
            why = equation.because("a range that starts where the data say")
            pin(node, why)
            pin(part, why)
            dims.append(pinned(size, why))
    return [tuple(dims)]
