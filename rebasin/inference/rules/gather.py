"""Primitives that read or write positions given by an array of indices."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.rule import Equation, reads_abstract_values, register_rule
from rebasin.inference.rules.ranges import take_positions, take_range
from rebasin.inference.values import AbstractValue, Components, Dims, Positions, Value


@register_rule("gather", effect="moves")
@reads_abstract_values
def gather(equation: Equation, x: Value, indices: Value) -> Sequence[Dims]:
    """Pin the axes that ``out[b, w] = x[indices[b] + w]`` looks up, unless the indices name their positions.

    Where an index is known to be a position along some axis, that axis is united with the one looked up: what
    is found is the same however the two are permuted, as long as they are permuted alike. Static indices cut
    the axis into the segments that they read.

    The window w spans ``slice_sizes``. An axis whose window is the whole axis passes through, as its only
    index is 0 (any other index puts the whole window out of bounds, whatever the order of the positions). The
    axes b are those of the indices without the last, which holds the components of one index. A batching axis
    is shared by x, indices and output: an embedding per head, `take_along_axis`.
    """
    numbers = equation.params["dimension_numbers"]
    (shape,) = equation.shapes
    sizes = equation.params["slice_sizes"]
    why = equation.because("positions are looked up by index")
    if not numbers.operand_batching_dims:
        places = _static_places([node.size for node in x], sizes, indices.static, numbers.start_index_map)
        if places is not None:
            return [_gather_static(equation, x, places, why)]
    for axis, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unite(x[axis], indices[i], equation.because("operands with incompatible factors"))
    pin(indices[-1], equation.because("the components of an index"))
    x.pin_named(equation.because("positions along it are looked up"))
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


class _Place(NamedTuple):
    """Where a gather or a scatter reads or writes one axis, if its indices are static.

    Attributes:
      start: the first position of the window, if it is the same for all indices.
      batch: the axis of the indices along which the position varies, otherwise.
      positions: the position for each index along that axis.
    """

    start: int = 0
    batch: int | None = None
    positions: tuple[int, ...] = ()


def _static_places(
    sizes: Sequence[int], window: Sequence[int], indices: np.ndarray | None, components: Sequence[int]
) -> list[_Place] | None:
    """Return where each axis is read or written, one axis independently of the others.

    Args:
      sizes: sizes of the axes that are read or written.
      window: how many positions along each axis belong to one index.
      indices: the static indices, if they are; their last axis holds the components of an index.
      components: the axis that each component indexes.

    Returns:
      A place for each axis. `None` if the indices are not static, or if some are out of bounds; if a window
      of several positions is at another place for each index; or if the axes do not vary independently.
    """
    if indices is None:
        return None
    places = [_Place()] * len(sizes)
    for axis, column in zip(components, np.moveaxis(indices, -1, 0), strict=True):
        if column.size == 0 or column.min() < 0 or column.max() > sizes[axis] - window[axis]:
            return None
        varying = [b for b in range(column.ndim) if (column != column.take([0], axis=b)).any()]
        if not varying:
            places[axis] = _Place(start=int(column.flat[0]))
        elif len(varying) == 1 and window[axis] == 1:
            along = column[tuple(slice(None) if b in varying else 0 for b in range(column.ndim))]
            places[axis] = _Place(batch=varying[0], positions=tuple(along.tolist()))
        else:
            return None
    batches = [place.batch for place in places if place.batch is not None]
    return places if len(batches) == len(set(batches)) else None


def _gather_static(equation: Equation, x: Value, places: Sequence[_Place], why: str) -> Value:
    """Return the value of a gather at static places; it is constant along the other axes of the indices."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    (shape,) = equation.shapes
    x.pin_named(equation.because("positions along it are looked up"))
    windows, by_batch = [], {}
    for axis, (node, size, place) in enumerate(zip(x, sizes, places, strict=True)):
        if place.batch is None:
            window = take_range(node, place.start, size, why)
        else:
            window, by_batch[place.batch] = Node(1), take_positions(node, place.positions, why)
        if axis not in numbers.collapsed_slice_dims:
            windows.append(window)
    dims, fresh = [], []
    window, batch = iter(windows), iter(range(len(shape)))
    for o, size in enumerate(shape):
        if o in numbers.offset_dims:
            dims.append(next(window))
            continue
        node = by_batch.get(next(batch))
        if node is None:
            node = Node(size)
            fresh.append(node)
        dims.append(node)
    return Value(dims, constant=fresh)


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
    that is written in part is pinned, unless static indices cut it into segments. Updates move with the
    indices that place them, in any order if ∘ commutes. Overwriting keeps the last update, so the order
    counts there unless all indices differ.
    """
    numbers = equation.params["dimension_numbers"]
    incompatible = equation.because("operands with incompatible factors")
    why = equation.because("positions are written by index")
    skipped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [axis for axis in range(len(x)) if axis not in skipped]
    if not numbers.operand_batching_dims and _scatter_static(equation, x, indices, updates, windows):
        return [tuple(x)]
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
    return [tuple(x)]


def _scatter_static(
    equation: Equation, x: Value, indices: Value, updates: Value, windows: Sequence[int]
) -> bool:
    """Tie updates to the parts of x that they are written to.

    Args:
      equation: the scatter.
      x: the array that is written.
      indices: the places.
      updates: what is written.
      windows: the axes of x that the windows of the updates span, in their order.

    Returns:
      Whether this was done. It is not if the places are not static, or if some are written more than once.
    """
    numbers = equation.params["dimension_numbers"]
    update_of = {a: updates[u] for a, u in zip(windows, numbers.update_window_dims, strict=True)}
    sizes, window = [node.size for node in x], [1] * len(x)
    for axis, node in update_of.items():
        window[axis] = node.size
    places = _static_places(sizes, window, indices.static, numbers.scatter_dims_to_operand_dims)
    if places is None:
        return False
    placed = [node for u, node in enumerate(updates) if u not in numbers.update_window_dims]
    batches = [place.batch for place in places if place.batch is not None]
    is_distinct = all(len(set(place.positions)) == len(place.positions) for place in places)
    if not is_distinct or math.prod(placed[b].size for b in batches) != math.prod(n.size for n in placed):
        return False
    why = equation.because("positions are written by index")
    for value in (x, updates):
        value.pin_named(equation.because("positions along it are written"))
    for axis, (node, place) in enumerate(zip(x, places, strict=True)):
        if place.batch is not None:
            written, update = take_positions(node, place.positions, why), placed[place.batch]
        else:
            written, update = take_range(node, place.start, window[axis], why), update_of.get(axis)
        if update is not None:
            unite(written, update, equation.because("operands with incompatible factors"))
    return True


def _tie_window(node: Node, update: Node, why: str, incompatible: str) -> None:
    """Unite an axis with that of its updates if it is written whole; pin both otherwise."""
    if node.size == update.size:
        unite(node, update, incompatible)
    else:
        pin(node, why)
        pin(update, why)
