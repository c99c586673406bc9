"""Primitives that read or write the positions that an array of indices names."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.rule import Equation, reads_notes, register_rule
from rebasin.inference.values import Components, Dims, Note, Positions, Value


@register_rule("gather")
@reads_notes
def gather(equation: Equation, x: Value, indices: Value) -> Sequence[Dims]:
    """``out[b, w] = x[indices[b] + w]``: an index names positions, so an axis that is looked up is pinned.

    Not so where the index is known to be a position along an axis: then what is found is the same however the
    two axes are permuted, as long as they are permuted alike.

    The window w spans ``slice_sizes``. An axis whose window is the whole of it passes through, as its only
    index is 0 (any other puts the whole window out of bounds, whatever the order of its positions). The axes
    b are those of the indices, without the last, which holds the components of one index. A batching axis is
    shared by x, indices and output: an embedding per head, `take_along_axis`.
    """
    numbers = equation.params["dimension_numbers"]
    (shape,) = equation.shapes
    why = equation.because("positions are looked up by index")
    for axis, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unite(x[axis], indices[i], equation.because("operands with incompatible factors"))
    pin(indices[-1], equation.because("the components of an index"))
    x.pin_named(equation.because("positions along it are looked up"))
    sizes = equation.params["slice_sizes"]
    named = _tie_named(
        equation, x, indices, numbers.start_index_map, {i for i, size in enumerate(sizes) if size == 1}
    )
    windows = []
    for axis, (node, size) in enumerate(zip(x, sizes, strict=True)):
        if axis in numbers.operand_batching_dims:
            continue
        whole = node.size == size
        if not whole and axis not in named:
            pin(node, why)
        if axis not in numbers.collapsed_slice_dims:
            windows.append(node if whole else pinned(size, why))
    window, index = iter(windows), iter(indices[:-1])
    return [tuple(next(window) if o in numbers.offset_dims else next(index) for o in range(len(shape)))]


def _tie_named(
    equation: Equation, x: Dims, indices: Value, components: Sequence[int], single: set[int]
) -> set[int]:
    """Ties the axes of x to those whose positions the indices name; returns the axes of x that it tied.

    Args:
      equation: the gather or scatter.
      x: what is read or written.
      indices: the last axis holds the components of an index.
      components: the axis of x that each component indexes.
      single: axes of x of which one position is read or written for each index.
    """
    notes: tuple[Note, ...] = (indices.note,) * len(components)
    if isinstance(indices.note, Components):
        notes = indices.note.parts
    tied = set()
    for axis, note in zip(components, notes, strict=True):
        match note:
            case Positions(named, beyond=False) if axis in single and named.size == x[axis].size:
                unite(x[axis], named, equation.because("positions of axes with incompatible factors"))
                tied.add(axis)
            case Positions(named):
                pin(named, equation.because("positions along it look up another axis"), mixed=False)
    return tied


@register_rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
@reads_notes
def scatter(equation: Equation, x: Value, indices: Value, updates: Value, *_: Dims) -> Sequence[Dims]:
    """``out = x``, then ``out[indices[b] + w] ∘= updates[b, w]`` for every b: the counterpart of gather.

    A window axis that is written whole moves with its updates; an axis written in part is pinned. Updates
    move with the indices that place them, in any order where ∘ commutes; overwriting keeps the last one, so
    there the order counts unless all indices differ.
    """
    numbers = equation.params["dimension_numbers"]
    incompatible = equation.because("operands with incompatible factors")
    why = equation.because("positions are written by index")
    skipped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [axis for axis in range(len(x)) if axis not in skipped]
    for axis, u in zip(windows, numbers.update_window_dims, strict=True):
        _tie_window(x[axis], updates[u], why, incompatible)
    for value in (x, updates):
        value.pin_named(equation.because("positions along it are written"))
    inserted = set(numbers.inserted_window_dims)
    named = _tie_named(equation, x, indices, numbers.scatter_dims_to_operand_dims, inserted)
    for axis in inserted - named:
        pin(x[axis], why)

    placed = [node for u, node in enumerate(updates) if u not in numbers.update_window_dims]
    for node, index in zip(placed, indices, strict=False):
        unite(node, index, incompatible)
    for axis, i in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        unite(x[axis], indices[i], incompatible)
    pin(indices[-1], equation.because("the components of an index"))
    if equation.primitive == "scatter" and not equation.params["unique_indices"]:
        for i, node in enumerate(indices[:-1]):
            if i not in numbers.scatter_indices_batching_dims:
                pin(node, equation.because("later updates overwrite earlier ones"))
    return [x]


def _tie_window(node: Node, update: Node, why: str, incompatible: str) -> None:
    if node.size == update.size:
        unite(node, update, incompatible)
    else:
        pin(node, why)
        pin(update, why)
