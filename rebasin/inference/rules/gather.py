"""Primitives that read or write positions given by an array of indices."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.rule import Equation, reads_abstract_values, register_rule
from rebasin.inference.values import AbstractValue, Components, Dims, Positions, Value


@register_rule("gather", effect="moves")
@reads_abstract_values
def gather(equation: Equation, x: Value, indices: Value) -> Sequence[Dims]:
    """Pin the axes that ``out[b, w] = x[indices[b] + w]`` looks up, unless the indices name their positions.

    Where an index is known to be a position along some axis, that axis is united with the one looked up: what
    is found is the same however the two are permuted, as long as they are permuted alike.

    The window w spans ``slice_sizes``. An axis whose window is the whole axis passes through, as its only
    index is 0 (any other index puts the whole window out of bounds, whatever the order of the positions). The
    axes b are those of the indices without the last, which holds the components of one index. A batching axis
    is shared by x, indices and output: an embedding per head, `take_along_axis`.
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
    """Unite axes of x with the axes whose positions the indices name.

    Args:
      equation: the gather or scatter.
      x: the array that is read or written.
      indices: the indices; their last axis holds the components of an index.
      components: the axis of x that each component indexes.
      single: axes of x along which one position is read or written for each index.

    Returns:
      The axes of x that were united.
    """
    parts: tuple[AbstractValue, ...] = (indices.abstract,) * len(components)
    if isinstance(indices.abstract, Components):
        parts = indices.abstract.parts
    tied = set()
    for axis, known in zip(components, parts, strict=True):
        match known:
            case Positions(named, beyond=False) if axis in single and named.size == x[axis].size:
                unite(x[axis], named, equation.because("positions of axes with incompatible factors"))
                tied.add(axis)
            case Positions(named):
                why = equation.because("positions along it look up another axis")
                pin(named, why, position_dependent=False)
    return tied


@register_rule("scatter", effect="moves")
@register_rule("scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", effect="pools")
@reads_abstract_values
def scatter(equation: Equation, x: Value, indices: Value, updates: Value, *_: Dims) -> Sequence[Dims]:
    """Tie the axes of ``out = x``, then ``out[indices[b] + w] ∘= updates[b, w]`` for every b.

    This is the counterpart of `gather`. A window axis that is written whole moves with its updates; an axis
    that is written in part is pinned. Updates move with the indices that place them, in any order if ∘
    commutes. Overwriting keeps the last update, so the order counts there unless all indices differ.
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
    return [tuple(x)]  # what was known of the entries of x holds no longer


def _tie_window(node: Node, update: Node, why: str, incompatible: str) -> None:
    """Unite an axis with that of its updates if it is written whole; pin both otherwise."""
    if node.size == update.size:
        unite(node, update, incompatible)
    else:
        pin(node, why)
        pin(update, why)
