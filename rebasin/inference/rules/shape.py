"""Primitives that move, repeat, cut or join positions without computing anything."""

import math
from collections.abc import Iterator, Sequence

from rebasin.inference.axes import Node, concatenate, pin, pinned, product, split, unite
from rebasin.inference.rule import (
    Equation,
    keeps_deferred_reshapes,
    reads_abstract_values,
    register_rule,
)
from rebasin.inference.rules.ranges import every_nth, take_range
from rebasin.inference.values import Components, DeferredReshape, Dims, Positions, Value


@register_rule("broadcast_in_dim", effect="moves")
@reads_abstract_values
def broadcast_in_dim(equation: Equation, x: Value, *_: Dims) -> Sequence[Dims]:
    """Make operand axis k output axis d[k]; the other axes are free, since the output is constant along them.

    The output is also constant along an axis of size 1 that is repeated.
    """
    (shape,) = equation.shapes
    dims = [Node(size) for size in shape]
    for node, d in zip(x, equation.params["broadcast_dimensions"], strict=True):
        if node.size == shape[d]:
            dims[d] = node
    return [x.moved(dims)]


@register_rule("transpose", effect="moves")
@reads_abstract_values
@keeps_deferred_reshapes
def transpose(equation: Equation, x: Value) -> Sequence[Dims]:
    """Make input axis ``permutation[i]`` output axis i."""
    return [x.moved(x[i] for i in equation.params["permutation"])]


@register_rule("squeeze", effect="moves")
@reads_abstract_values
@keeps_deferred_reshapes
def squeeze(equation: Equation, x: Value) -> Sequence[Dims]:
    """Drop axes of size 1."""
    return [x.moved(node for i, node in enumerate(x) if i not in equation.params["dimensions"])]


@register_rule("expand_dims", effect="moves")
@reads_abstract_values
@keeps_deferred_reshapes
def expand_dims(equation: Equation, x: Value) -> Sequence[Dims]:
    """Insert axes of size 1."""
    rest = iter(x)
    (shape,) = equation.shapes
    return [x.moved(Node(1) if i in equation.params["dimensions"] else next(rest) for i in range(len(shape)))]


@register_rule("reshape", effect="moves")
@reads_abstract_values
def reshape(equation: Equation, x: Value, *_: Dims) -> Sequence[Dims]:
    """Read axes as products of common factors and join these, as positions keep their row-major order.

    Reading an axis as a product is deferred (`DeferredReshape`), as its parts may turn out to be segments.
    """
    (shape,) = equation.shapes
    if equation.params.get("dimensions") is not None or math.prod(shape) == 0:
        why = equation.because("a reshape that also transposes, or of no positions")
        x.pin_named(why)
        for node in x:
            pin(node, why)
        return [tuple(pinned(size, why) for size in shape)]
    dims: list[Node] = [Node(1)] * len(shape)
    deferred = []
    for ins, outs in _matching_runs([node.size for node in x], shape):
        if all(x.is_constant(i) for i in ins):
            for o in outs:
                dims[o] = Node(shape[o])
            continue
        whole = product([x[i] for i in ins])
        if len(outs) == 1:
            dims[outs[0]] = whole
            continue
        why = equation.because("no common factors")
        deferred.append(DeferredReshape(whole, [shape[o] for o in outs], why))
        for o, part in zip(outs, deferred[-1].parts, strict=True):
            dims[o] = part
    return [Value(dims, abstract=x.abstract, tie_free=x.tie_free, deferred=deferred)]


def _matching_runs(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Iterate over the shortest runs of axes before and after with equal products, without axes of size 1."""
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


@register_rule("concatenate", effect="moves")
@reads_abstract_values
def concatenate_rule(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Join the operands as segments along ``dimension``, and unite them along every other axis."""
    axis = equation.params["dimension"]
    dims = list(inputs[0])
    for other in inputs[1:]:
        for i, (x, y) in enumerate(zip(dims, other, strict=True)):
            if i != axis:
                unite(x, y, equation.because("operands with incompatible factors"))
    dims[axis] = concatenate([x[axis] for x in inputs])
    if axis == len(dims) - 1 and all(x[axis].size == 1 for x in inputs):
        return [Value(dims, abstract=Components(tuple(x.abstract for x in inputs)))]
    for x in inputs:
        x.pin_named(equation.because("positions are joined to other numbers"))
    return [tuple(dims)]


@register_rule("stack", effect="moves")
def stack(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Unite the operands of ``out[…, j, …] = x_j[…]``; pin the new axis, along which their order counts."""
    axis = equation.params["axis"]
    for other in inputs[1:]:
        for x, y in zip(inputs[0], other, strict=True):
            unite(x, y, equation.because("operands with incompatible factors"))
    why = equation.because("operands are stacked in order")
    order = pinned(len(inputs), why, position_dependent=False)
    return [(*inputs[0][:axis], order, *inputs[0][axis:])]


@register_rule("unstack", effect="moves")
@keeps_deferred_reshapes
def unstack(equation: Equation, x: Value) -> Sequence[Dims]:
    """Pin the axis of ``out_j[…] = x[…, j, …]``, every position of which becomes an output of its own.

    An axis of a deferred reshape is cut into segments instead.
    """
    axis = equation.params["axis"]
    cut = _cut_deferred(x, axis, [1] * x[axis].size)
    if cut is not None:
        return [part.moved(node for i, node in enumerate(part) if i != axis) for part in cut]
    pin(x[axis], equation.because("each position becomes a value of its own"), position_dependent=False)
    return [(*x[:axis], *x[axis + 1 :]) for _ in equation.shapes]


@register_rule("tile", effect="moves")
def tile(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Make the product (copies, positions) of the axis in ``out[r · n + i] = x[i]``; copies are all equal."""
    return [tuple(product([Node(r), node]) for r, node in zip(equation.params["reps"], x, strict=True))]


@register_rule("split", effect="moves")
@keeps_deferred_reshapes
def split_rule(equation: Equation, x: Value) -> Sequence[Dims]:
    """Cut one axis into consecutive segments, one for each output."""
    axis = equation.params["axis"]
    cut = _cut_deferred(x, axis, equation.params["sizes"])
    if cut is not None:
        return cut
    parts = split(x[axis], equation.params["sizes"], equation.because("its segments cut through factors"))
    return [(*x[:axis], part, *x[axis + 1 :]) for part in parts]


def _cut_deferred(x: Value, axis: int, sizes: Sequence[int]) -> list[Value] | None:
    """Cut an axis of a deferred reshape into segments whose reshape is deferred still.

    Args:
      x: the value to cut.
      axis: the axis to cut.
      sizes: sizes of the segments.

    Returns:
      A value for each segment. `None` if the axis is not of a deferred reshape; then all reshapes of the
      value have been resolved.
    """
    found = [
        (d, place)
        for d in x.deferred
        if not d.is_resolved
        for place, part in enumerate(d.parts)
        if part is x[axis]
    ]
    if not found:
        x.resolve_reshapes()
        return None
    ((reshape, place),) = found
    others = [d for d in x.deferred if d is not reshape]
    values = []
    for piece in reshape.cut(place, sizes):
        new = dict(zip(reshape.parts[place:], piece.parts, strict=True))
        dims = (new.get(node, node) for node in x)
        values.append(Value(dims, abstract=x.abstract, deferred=[*others, piece]))
    return values


@register_rule("slice", effect="moves")
@reads_abstract_values
@keeps_deferred_reshapes
def slice_rule(equation: Equation, x: Value) -> Sequence[Dims]:
    """Cut a contiguous range out of its axis as a segment; `every_nth` handles a range with gaps."""
    if isinstance(x.abstract, Components):
        x.pin_named(equation.because("a part of an index"))
        x = Value(x, deferred=x.deferred)
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(x)
    (shape,) = equation.shapes
    shortened = [i for i, node in enumerate(x) if shape[i] != node.size]
    if len(shortened) == 1 and strides[shortened[0]] == 1:
        (i,) = shortened
        cut = _cut_deferred(x, i, [starts[i], limits[i] - starts[i], x[i].size - limits[i]])
        if cut is not None:
            return cut[1:2]
    x.resolve_reshapes()
    dims = []
    for i, node in enumerate(x):
        if shape[i] == node.size:
            dims.append(node)
        elif strides[i] == 1:
            sizes = [starts[i], limits[i] - starts[i], node.size - limits[i]]
            dims.append(split(node, sizes, equation.because("the range cuts through factors"))[1])
        else:
            why = equation.because(f"one position in {strides[i]}")
            dims.append(every_nth(node, shape[i], strides[i], why))
    return [x.moved(dims)]


@register_rule("pad", effect="moves")
def pad(equation: Equation, x: Dims, value: Dims) -> Sequence[Dims]:
    """Add segments of padding, which fit any permutation; padding between positions, or negative, pins."""
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


@register_rule("rev", effect="moves")
def rev(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Pin the reversed axes, since the output would need another permutation than the operand."""
    for axis in equation.params["dimensions"]:
        pin(x[axis], equation.because("the axis is reversed"))
    return [x]


@register_rule("iota")
def iota(equation: Equation, *_: Dims) -> Sequence[Dims]:
    """Make a count along one axis: its entries name the positions of that axis, whatever their order."""
    (shape,) = equation.shapes
    nodes = [Node(size) for size in shape]
    return [Value(nodes, abstract=Positions(nodes[equation.params["dimension"]]))]


@register_rule("dynamic_slice", effect="moves")
def dynamic_slice(equation: Equation, x: Value, *starts: Value) -> Sequence[Dims]:
    """Pass on an axis that is taken whole, and cut a segment out of it if its start is static.

    An axis whose range starts at a computed position is pinned.
    """
    (shape,) = equation.shapes
    return [tuple(_range(equation, *axis) for axis in zip(x, starts, shape, strict=True))]


@register_rule("dynamic_update_slice", effect="moves")
def dynamic_update_slice(equation: Equation, x: Value, update: Value, *starts: Value) -> Sequence[Dims]:
    """Tie each axis of the update to the part of x that it overwrites, cut out as by `dynamic_slice`."""
    for node, start, part in zip(x, starts, update, strict=True):
        written = _range(equation, node, start, part.size)
        unite(written, part, equation.because("operands with incompatible factors"))
    return [tuple(x)]


def _range(equation: Equation, node: Node, start: Value, size: int) -> Node:
    """Return the axis of a range of `size` positions from `start`, which is clamped so that it fits."""
    if size == node.size:
        return node
    if start.static is None:
        why = equation.because("a range whose start depends on the data")
        pin(node, why)
        return pinned(size, why)
    first = min(max(int(start.static), 0), node.size - size)
    return take_range(node, first, size, equation.because("the range cuts through factors"))
