"""Primitives that read or write the positions that an array of indices names."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.registry import Dims, Equation, register_rule


@register_rule("gather")
def gather(equation: Equation, x: Dims, indices: Dims) -> Sequence[Dims]:
    """``out[b, w] = x[indices[b] + w]``: an index names positions, so an axis that is looked up is pinned.

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
    windows = []
    for axis, (node, size) in enumerate(zip(x, equation.params["slice_sizes"], strict=True)):
        if axis in numbers.operand_batching_dims:
            continue
        whole = node.size == size
        if not whole:
            pin(node, why)
        if axis not in numbers.collapsed_slice_dims:
            windows.append(node if whole else pinned(size, why))
    window, index = iter(windows), iter(indices[:-1])
    return [tuple(next(window) if o in numbers.offset_dims else next(index) for o in range(len(shape)))]


@register_rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def scatter(equation: Equation, x: Dims, indices: Dims, updates: Dims, *_: Dims) -> Sequence[Dims]:
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
    for axis in numbers.inserted_window_dims:
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
