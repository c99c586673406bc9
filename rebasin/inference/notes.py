"""What is known of the entries of a value, beside how its axes are permuted.

A router computes *which* expert an example goes to: the entries of that value are positions along the axis
of the experts. If the experts are permuted, those entries are renamed, and what is looked up with them is the
same as before. So positions are followed through the program until they meet an axis, by a gather, a scatter
or a comparison with a count along it (one-hot). Whatever else is computed with them pins the axis that they
name.
"""

from typing import NamedTuple, TypeAlias

from rebasin.inference.axes import Node

__all__ = ["NEVER", "Components", "Never", "Note", "Number", "Positions", "named_axes"]


class Positions(NamedTuple):
    """Entries are positions along `axis`, from 0 to its size − 1.

    Attributes:
      axis: the axis that they name; renamed as it is permuted.
      beyond: they were moved past the end, as `x[i]` does for negative i, to be discarded: no use is allowed.
    """

    axis: Node
    beyond: bool = False


class Components(NamedTuple):
    """Entries along the last axis are the components of an index, each with a note of its own."""

    parts: tuple["Note", ...]


class Number(NamedTuple):
    """All entries are this number."""

    value: float


class Never(NamedTuple):
    """All entries are false."""


NEVER = Never()

Note: TypeAlias = Positions | Components | Number | Never | None


def named_axes(note: Note) -> tuple[Node, ...]:
    """The axes whose positions the entries name."""
    if isinstance(note, Positions):
        return (note.axis,)
    if isinstance(note, Components):
        return tuple(axis for part in note.parts for axis in named_axes(part))
    return ()
