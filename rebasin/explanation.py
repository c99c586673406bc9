"""What a reader should know of a spec beyond its rows: what is tied together, and how much moves."""

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from rebasin.axis import Axis, Block, iter_blocks

__all__ = ["Rows", "UnitShares", "find_ties", "measure_units"]

Rows: TypeAlias = Sequence[tuple[str, tuple[Axis, ...]]]  # the leaves of a spec: path name and axes

# Reasons of axes whose positions are no hidden units: those that a network shares with its inputs and
# outputs, and the windows of convolutions. No spec could move them.
_NO_UNITS = re.compile(r"meets an axis of input|reaches an axis of output|.*positions of a convolution$")


class UnitShares(NamedTuple):
    """How much of a network moves, counted in units: positions along the axes of its leaves.

    A unit counts once for each leaf that has it. The network's own inputs and outputs, the windows of
    convolutions and the positions of stacked layers do not count. The shares add up to 1, but for a network
    without hidden units, of which every share is 0.

    Attributes:
      moving: share of the units that move freely.
      partly: share of the units of which a factor stays, such as dimensions of heads where the heads stay.
      staying: share of the units that stay put.
    """

    moving: float
    partly: float
    staying: float

    def __str__(self) -> str:
        moving, partly, staying = (f"{100 * share:.0f} %" for share in self)
        in_part = f", {partly} in part" if self.partly else ""
        return f"{moving} of the units move{in_part}, {staying} stay put"


def measure_units(
    leaves: Rows,
    shapes: Mapping[str, Sequence[int]],
    moving: Sequence[str],
    fixed: Sequence[str],
    reasons: Mapping[tuple[str, int], str],
) -> UnitShares:
    """Count which share of the units of a network moves.

    Args:
      leaves: the leaves of a spec.
      shapes: the shape of each leaf, by path name.
      moving: the groups that move.
      fixed: the groups that never move and only serve as an outer group, such as stacked layers.
      reasons: why axes stay put, by path name and number of the axis.

    Returns:
      The shares.
    """
    counts = collections.Counter()
    for path, axes in leaves:
        for i, axis in enumerate(axes):
            is_fixed = axis.is_whole and axis.groups and axis.groups[0] in fixed
            if is_fixed or _NO_UNITS.match(reasons.get((path, i), "")):
                continue
            for block in iter_blocks((axis,), (shapes[path][i],)):
                counts[_kind(block, moving)] += math.prod(block.shape)
    total = max(sum(counts.values()), 1)
    return UnitShares(*(counts[kind] / total for kind in UnitShares._fields))


def _kind(block: Block, moving: Sequence[str]) -> str:
    """Tell whether the units of a part of an axis move, or move in part, or stay."""
    moves = [label in moving for size, label in zip(block.shape, block.labels, strict=True) if size > 1]
    if moves and all(moves):
        return "moving"
    return "partly" if any(moves) else "staying"


def find_ties(
    leaves: Rows, moving: Sequence[str], outer_groups: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Say where one permutation moves what a reader might expect to move by itself.

    These are layers that differ in a number of their path names only and carry a group on the same axis,
    parts of one axis or several axes of one leaf, and positions of a factor next to which a group is the same
    everywhere. A residual stream is tied over layers rightly; other groups usually have a reason to look for.

    Args:
      leaves: the leaves of a spec.
      moving: the groups that move.
      outer_groups: the groups that index each inner group.

    Yields:
      Sentences without a full stop.
    """
    for group in moving:
        layers = _tied_layers(leaves, group)
        if layers:
            yield f"{group} is one permutation in all of {', '.join(layers)}"
        for path, axes in leaves:
            axes = [axis for axis in axes if group in axis.groups]
            parts = sum(axis.groups.count(group) for axis in axes)
            if parts > 1:
                what = "axes" if len(axes) == parts else "parts"
                yield f"{group} is one permutation of {parts} {what} of {path}"
            beside = dict.fromkeys(_factors_beside(axes, group, moving, outer_groups))
            if beside:
                yield f"{group} is the same for all positions of {' and '.join(beside)} in {path}"


def _tied_layers(leaves: Rows, group: str) -> list[str]:
    """Return the places, such as ``layers/{0-3}``, whose numbers do not tell a group's axes apart."""
    numbers: dict[tuple[str, str, int], set[int]] = {}
    for path, axes in leaves:
        for i in (i for i, axis in enumerate(axes) if group in axis.groups):
            for found in re.finditer(r"\d+", path):
                # The number and what follows it in its component of the path name the layer.
                component = path[found.end() :].partition("/")
                place = f"{path[: found.start()]}{{}}{component[0]}"
                numbers.setdefault((place, component[2], i), set()).add(int(found[0]))
    places: dict[str, set[int]] = {}
    for (place, _, _), values in numbers.items():
        if len(values) > 1:
            places[place] = places.get(place, set()) | values
    return [place.replace("{}", f"{{{_ranges(sorted(values))}}}") for place, values in places.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with ranges, for example ``0-3,7``."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def _factors_beside(
    axes: Sequence[Axis], group: str, moving: Sequence[str], outer_groups: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Yield the factors of the same axes that neither index a group nor are indexed by it."""
    for axis in (axis for axis in axes if not axis.is_whole):
        for segment in axis.pieces:
            labels = [factor.group for factor in segment]
            if group not in labels:
                continue
            for factor in segment:
                label = factor.group
                related = label == group or label in outer_groups.get(group, ())
                if related or group in outer_groups.get(label or "", ()) or factor.size == 1:
                    continue
                yield label if label is not None else f"the factor of {factor.size}"
