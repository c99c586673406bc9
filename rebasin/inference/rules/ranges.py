"""Axes that are read or written at positions that the program fixes: ranges, strides and lists of indices."""

from collections.abc import Sequence

import numpy as np

from rebasin.inference.axes import Node, concatenate, factor, pin, pinned, split

__all__ = ["every_nth", "take_positions", "take_range"]

# A list of indices in more pieces than this is no structure that a reader of the spec would recognise.
_MAX_PIECES = 64


def take_range(node: Node, start: int, size: int, reason: str) -> Node:
    """Return the axis of ``out[i] = x[start + i]``: a segment of `node`, or all of it."""
    if size == node.size:
        return node
    return split(node, [start, size, node.size - start - size], reason)[1]


def every_nth(node: Node, count: int, stride: int, reason: str) -> Node:
    """Return the axis of ``out[i] = x[stride · i + start]``, read as ``[count, stride]`` if strides cover it.

    Then the place within a stride stays put and strides move as one, as interleaved pairs do; every start
    below the stride gives the same `count`. If whole strides do not cover the axis, it is pinned.
    """
    if count * stride != node.size:
        pin(node, reason, position_dependent=False)
        return pinned(count, reason, position_dependent=False)
    strides, place = factor(node, [count, stride], reason)
    pin(place, reason, position_dependent=False)
    return strides


def take_positions(node: Node, positions: Sequence[int], reason: str) -> Node:
    """Return the axis of ``out[i] = x[positions[i]]``, the concatenation of the runs that are read.

    Args:
      node: the axis of x, which is cut where runs of neighbouring positions begin and end.
      positions: the positions in the order in which they are read; a position may occur several times.
      reason: the reason to give if no two neighbours are read together, and the axis is pinned.

    Returns:
      The axis of the output.
    """
    indices = np.asarray(positions, int)
    steps = np.diff(indices)
    if steps.size and steps[0] > 1 and (steps == steps[0]).all() and len(indices) * steps[0] == node.size:
        return every_nth(node, len(indices), int(steps[0]), reason)
    breaks = np.flatnonzero(steps != 1)
    starts, ends = indices[np.r_[0, breaks + 1]], indices[np.r_[breaks, -1]] + 1
    cuts = np.unique(np.r_[0, starts, ends, node.size])
    sizes = np.diff(cuts)
    first, last = np.searchsorted(cuts, starts), np.searchsorted(cuts, ends)
    read = [i for a, b in zip(first, last, strict=True) for i in range(a, b)]
    if len(read) > 1 and (sizes[read].max() == 1 or len(read) > _MAX_PIECES):
        pin(node, reason)
        return pinned(len(indices), reason)
    pieces = split(node, sizes.tolist(), reason)
    return concatenate([pieces[i] for i in read])
