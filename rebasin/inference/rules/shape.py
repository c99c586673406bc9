"""Primitives that move, repeat, cut or join positions without computing anything."""

import math
from collections.abc import Iterator, Sequence

from rebasin.inference.axes import Node, concatenate, factor, pin, pinned, product, split, unite
from rebasin.inference.notes import Components, Positions
from rebasin.inference.registry import Dims, Equation, Value, reads_notes, register_rule


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
def transpose(equation: Equation, x: Value) -> Sequence[Dims]:
    """Output axis i is input axis ``permutation[i]``."""
    return [x.moved(x[i] for i in equation.params["permutation"])]


@register_rule("squeeze")
@reads_notes
def squeeze(equation: Equation, x: Value) -> Sequence[Dims]:
    """Axes of size 1 are dropped."""
    return [x.moved(node for i, node in enumerate(x) if i not in equation.params["dimensions"])]


@register_rule("expand_dims")
@reads_notes
def expand_dims(equation: Equation, x: Value) -> Sequence[Dims]:
    """Axes of size 1 are inserted."""
    rest = iter(x)
    (shape,) = equation.shapes
    return [x.moved(Node(1) if i in equation.params["dimensions"] else next(rest) for i in range(len(shape)))]


@register_rule("reshape")
@reads_notes
def reshape(equation: Equation, x: Value, *_: Dims) -> Sequence[Dims]:
    """Positions keep their row-major order: axes are read as products of common factors and rejoined."""
    (shape,) = equation.shapes
    if equation.params.get("dimensions") is not None or math.prod(shape) == 0:
        why = equation.because("a reshape that also transposes, or of no positions")
        x.pin_named(why)
        for node in x:
            pin(node, why)
        return [tuple(pinned(size, why) for size in shape)]
    dims: list[Node] = [Node(1)] * len(shape)
    for ins, outs in _matching_runs([node.size for node in x], shape):
        whole = product([x[i] for i in ins])
        parts = factor(whole, [shape[o] for o in outs], equation.because("no common factors"))
        for o, part in zip(outs, parts, strict=True):
            dims[o] = part
    return [x.moved(dims)]


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
def unstack(equation: Equation, x: Dims) -> Sequence[Dims]:
    """``out_j[…] = x[…, j, …]``: every position of the axis is an output of its own."""
    axis = equation.params["axis"]
    pin(x[axis], equation.because("each position becomes a value of its own"), mixed=False)
    return [(*x[:axis], *x[axis + 1 :]) for _ in equation.shapes]


@register_rule("tile")
def tile(equation: Equation, x: Dims) -> Sequence[Dims]:
    """``out[r · n + i] = x[i]``: an axis is read as (copies, positions), and copies are all the same."""
    return [tuple(product([Node(r), node]) for r, node in zip(equation.params["reps"], x, strict=True))]


@register_rule("split")
def split_rule(equation: Equation, x: Dims) -> Sequence[Dims]:
    """The outputs are consecutive segments along one axis."""
    axis = equation.params["axis"]
    parts = split(x[axis], equation.params["sizes"], equation.because("segments that cut factors"))
    return [(*x[:axis], part, *x[axis + 1 :]) for part in parts]


@register_rule("slice")
@reads_notes
def slice_rule(equation: Equation, x: Value) -> Sequence[Dims]:
    """A contiguous range is a segment of its axis; of a range with gaps see `_every_nth`."""
    if isinstance(x.note, Components):
        x.pin_named(equation.because("a part of an index"))
        x = Value(x)
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(x)
    (shape,) = equation.shapes
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
