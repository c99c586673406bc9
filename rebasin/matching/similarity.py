"""Similarities between the units of two networks, kept up to date while permutations change.

The similarity of a group is a matrix for each position of its outer groups: the inner product of every unit
of A with every unit of B, summed over all weights of the unit, while B's other groups are permuted. In terms
of `rebasin.matching.blocks` it is a sum over layouts of AᵀB[s], where s are the rows of B that take the place
of each row. When the permutations of other groups change, only the rows whose source changes are multiplied:

    matrix += A[rows]ᵀ (B[new] − B[old]).

A matrix that is computed anew is the same sum with all rows and nothing to subtract.

On the CPU rows are gathered by NumPy, which copies memory, and multiplied in panels of one shape, so that all
groups of one width share one compiled product. On an accelerator copies between host and device would take
longer than the products, so the layouts live there and a compiled loop gathers and multiplies.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.matching.blocks import UnitRows, other_rows, sorted_units, source_rows
from rebasin.permutation import Permutation

__all__ = [
    "RowStack",
    "Similarity",
    "Sources",
    "gathers_on_device",
    "pair_products",
    "panel_products",
    "sorted_similarity",
    "stack_rows",
    "update_similarity",
]

# A panel has this many values, and at least this many rows: enough that the dispatch of a product does not
# count, and so few that the last panel, which is filled up with zeros, does not count either.
_PANEL_VALUES = 2**16
_PANEL_ROWS = 128

# On an accelerator, the rows that one step of the loop gathers and multiplies.
_DEVICE_ROWS = 1024


class Sources(NamedTuple):
    """The rows of B that stand in each row of one layout.

    Attributes:
      permutations: the permutation of each other dimension that they follow from.
      rows: int32 array ``[batch · k]``.
    """

    permutations: tuple[Any, ...]
    rows: np.ndarray


class Similarity(NamedTuple):
    """The similarities of one group's units under a permutation of the other groups.

    Attributes:
      matrix: float64 array ``[batch, n, n]``, units of A before units of B.
      sources: of each layout the rows that `matrix` contains; `None` for a layout that was left out.
      corrections: how often the matrix was corrected since it was computed as a whole; every correction adds
        the rounding error of one product.
    """

    matrix: np.ndarray
    sources: tuple[Sources | None, ...]
    corrections: int


class RowStack(NamedTuple):
    """All layouts of one width on the device, one below the other, and a last row of zeros.

    Attributes:
      a: rows of A, ``[r + 1, n]``.
      b: rows of B, ``[r + 1, n]``.
      starts: the first row of each layout, by its ``id``.
      capacity: the number of rows of the largest similarity, a multiple of the rows that a step multiplies.
    """

    a: jax.Array
    b: jax.Array
    starts: dict[int, int]
    capacity: int


class _Change(NamedTuple):
    """Rows of one layout whose product is to be added: A's, and B's new ones less the old ones."""

    units: UnitRows
    rows: np.ndarray  # [batch, m]
    new: np.ndarray  # [batch, m]
    old: np.ndarray | None  # [batch, m]


def gathers_on_device() -> bool:
    """Return whether rows are gathered on the device: everywhere but on the CPU."""
    return jax.default_backend() != "cpu"


def update_similarity(
    last: Similarity,
    layouts: Sequence[UnitRows],
    permutation: Permutation,
    *,
    counted: Sequence[bool],
    stack: RowStack | None = None,
) -> Similarity:
    """Bring the similarities of one group up to the permutations of the other groups.

    Args:
      last: the similarities so far, of the same layouts; at first a matrix of zeros that contains none. The
        matrix is changed in place, so `last` must not be used any more.
      layouts: all layouts of the group.
      permutation: permutations of the other groups; a group without one stays.
      counted: which layouts count.
      stack: the layouts on the device, where rows are gathered there.

    Returns:
      The new similarities, by correcting the last ones where that takes fewer products, else computed anew.
    """
    sources = tuple(
        _find_sources(units, permutation, before) if use else None
        for units, before, use in zip(layouts, last.sources, counted, strict=True)
    )
    batch = len(last.matrix)
    pairs = list(zip(layouts, last.sources, sources, strict=True))
    changes = [
        _find_change(units, old, new, batch)
        for units, old, new in pairs
        if new is not None and new is not old
    ]
    changed = sum(change.rows.size for change in changes if change.old is not None)
    kept = sum(new.rows.size for _, old, new in pairs if old is not None and new is not None)
    dropped = any(old is not None and new is None for _, old, new in pairs)
    corrections = last.corrections + (changed > 0)
    if dropped or changed > kept // 2:
        last.matrix[:] = 0
        changes = [_find_change(units, None, new, batch) for units, _, new in pairs if new is not None]
        corrections = 0
    _add_products(last.matrix, [change for change in changes if change.rows.size], stack)
    return Similarity(last.matrix, sources, corrections)


def sorted_similarity(layouts: Sequence[UnitRows], shape: tuple[int, int]) -> np.ndarray:
    """Return the inner products of each unit's sorted weights, float64 ``[batch, n, n]``.

    They stand in for the similarities of a group of which nothing else is known yet.
    """
    matrix = np.zeros((shape[0], shape[1], shape[1]))
    for units in layouts:
        matrix += np.asarray(panel_products(*sorted_units(units)))
    return matrix


def _find_sources(units: UnitRows, permutation: Permutation, last: Sources | None) -> Sources:
    """Return the sources under a permutation, the last ones if these follow from the same arrays."""
    rows = other_rows(units, permutation)
    if last is not None and all(new is old for new, old in zip(rows, last.permutations, strict=True)):
        return last
    return Sources(rows, source_rows(units, rows))


def _find_change(units: UnitRows, old: Sources | None, new: Sources, batch: int) -> _Change:
    """Return the rows of a layout that change between two sources, or all where there are no old ones."""
    target = new.rows.reshape(batch, -1)
    first = np.arange(0, target.size, target.shape[1], dtype=np.int32)[:, None]
    if old is None:
        return _Change(units, first + np.arange(target.shape[1], dtype=np.int32), target, None)
    before = old.rows.reshape(batch, -1)
    changed = np.flatnonzero((target != before).any(axis=0))
    return _Change(units, first + changed, target[:, changed], before[:, changed])


def _add_products(matrix: np.ndarray, changes: Sequence[_Change], stack: RowStack | None) -> None:
    """Add the products of all rows that change to a matrix."""
    if not changes:
        return
    if stack is not None:
        rows_a, rows_b, steps = _stacked_indices(stack, changes)
        matrix += np.asarray(_gather_and_multiply(stack.a, stack.b, rows_a, rows_b, steps))
        return
    batch, n = matrix.shape[:2]
    length = max(_PANEL_ROWS, _PANEL_VALUES // (batch * n))
    pending: collections.deque[jax.Array] = collections.deque()
    for start in range(0, sum(change.rows.shape[1] for change in changes), length):
        pending.append(panel_products(*_gather_panel(changes, start, (batch, length, n))))
        if len(pending) > 1:  # the next panel is gathered while this one is multiplied
            matrix += np.asarray(pending.popleft())
    for product in pending:
        matrix += np.asarray(product)


def _gather_panel(
    changes: Sequence[_Change], start: int, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Gather the rows from `start` of all changes together, filled up with zeros, as panels of one shape."""
    batch, length, _ = shape
    dtype = np.result_type(*(change.units.a.dtype for change in changes))
    # New arrays for each panel: a product that is still being computed may read the last ones.
    a, b = np.zeros((2, *shape), dtype)
    first = 0
    for change in changes:
        low, high = max(start - first, 0), min(start + length - first, change.rows.shape[1])
        if low < high:
            part = np.s_[first + low - start : first + high - start]
            for i in range(batch):
                np.take(change.units.a, change.rows[i, low:high], axis=0, out=a[i, part], mode="clip")
                np.take(change.units.b, change.new[i, low:high], axis=0, out=b[i, part], mode="clip")
                if change.old is not None:
                    b[i, part] -= np.take(change.units.b, change.old[i, low:high], axis=0)
        first += change.rows.shape[1]
    return a, b


@jax.jit
def panel_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply panels: ``[batch, k, n], [batch, k, n] -> [batch, n, n]``, units of A before units of B."""
    return lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), precision="highest")


@jax.jit
def _pair_products(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (2,)), ((0,), (0,))), precision="highest")


def pair_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply the inner units of one outer unit of A with those of all outer units of B.

    Args:
      a: ``[batch, k, n]``.
      b: ``[batch, m, k, n]``.

    Returns:
      float64 array ``[batch, m, n, n]``, units of A before units of B.
    """
    return np.asarray(_pair_products(a, b), np.float64).transpose(0, 2, 1, 3)


def stack_rows(layouts_of_groups: Sequence[tuple[int, Sequence[UnitRows]]]) -> RowStack:
    """Put the layouts of groups of one width on the device.

    Args:
      layouts_of_groups: number of positions of the outer groups, and the layouts, of each group.
    """
    every = [units for _, layouts in layouts_of_groups for units in layouts]
    starts, start = {}, 0
    for units in every:
        starts[id(units)] = start
        start += len(units.a)
    zeros = np.zeros((1, every[0].a.shape[-1]), every[0].a.dtype)
    # Joined on the host: on the device, every combination of shapes would be compiled.
    a, b = (
        jax.device_put(np.concatenate([*(getattr(units, side) for units in every), zeros])) for side in "ab"
    )
    needed = max(sum(len(u.a) for u in layouts) // batch for batch, layouts in layouts_of_groups)
    return RowStack(a, b, starts, math.ceil(needed / _DEVICE_ROWS) * _DEVICE_ROWS)


def _stacked_indices(stack: RowStack, changes: Sequence[_Change]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the rows of A, and of B new and old, as rows of the stack; the row of zeros fills up.

    Returns:
      int32 arrays ``[batch, capacity]`` and ``[2, batch, capacity]``, and the number of steps to multiply.
    """
    zero, batch = len(stack.a) - 1, len(changes[0].rows)
    a = np.full((batch, stack.capacity), zero, np.int32)
    b = np.full((2, batch, stack.capacity), zero, np.int32)
    stop = 0
    for change in changes:
        start, first = stop, stack.starts[id(change.units)]
        stop = start + change.rows.shape[1]
        a[:, start:stop] = change.rows + first
        b[0, :, start:stop] = change.new + first
        if change.old is not None:
            b[1, :, start:stop] = change.old + first
    return a, b, math.ceil(stop / _DEVICE_ROWS)


@jax.jit
def _gather_and_multiply(
    a: jax.Array, b: jax.Array, rows_a: jax.Array, rows_b: jax.Array, steps: jax.Array
) -> jax.Array:
    """Return A[rows]ᵀ (B[new] − B[old]), in `steps` steps of equal size, ``[batch, n, n]``."""

    def take(values: jax.Array, rows: jax.Array, step: jax.Array) -> jax.Array:
        chosen = lax.dynamic_slice_in_dim(rows, step * _DEVICE_ROWS, _DEVICE_ROWS, axis=1)
        return values.at[chosen].get(mode="promise_in_bounds")

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        changed = take(b, rows_b[0], step) - take(b, rows_b[1], step)
        return total + panel_products(take(a, rows_a, step), changed)

    n = a.shape[-1]
    return lax.fori_loop(0, steps, add, jnp.zeros((len(rows_a), n, n), a.dtype))
