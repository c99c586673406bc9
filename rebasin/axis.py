"""The structure of an axis, and the blocks of a leaf that follow from the structure of its axes.

An axis is a concatenation of segments, and each segment is a product of factors, as a reshape makes it. The
last factor of a product may itself be a concatenation: an axis that holds queries, keys and values head by
head is ``H:3*(Q:4 + K:4 + V:4)``. A choice of one segment wherever there are several, on each axis of a leaf,
is a block: an array with one dimension for each factor.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

__all__ = [
    "Axis",
    "AxisLike",
    "Block",
    "Factor",
    "Segment",
    "SizedFactor",
    "View",
    "cut",
    "iter_blocks",
    "join",
]

_T = TypeVar("_T")


class Factor(NamedTuple):
    """One dimension of a segment before the reshape that flattened it.

    Attributes:
      size: number of positions; `None` if the factor is its whole axis. The length of the axis then counts,
        so that one spec serves a model at every width.
      group: the group that reorders the positions; `None` if they stay put.
    """

    size: int | None
    group: str | None = None


class SizedFactor(NamedTuple):
    """A factor of an axis whose length is known.

    Attributes:
      size: number of positions.
      group: the group that reorders the positions; `None` if they stay put.
    """

    size: int
    group: str | None


Segment: TypeAlias = "tuple[Factor | Axis, ...]"


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a leaf: a concatenation of segments, each of which is a product of factors.

    In a segment the first factor varies slowest, as in ``reshape``. The everyday axis is one segment of one
    factor, written `Axis.whole("P0")`, or `Axis.whole(None)` for an axis that stays put. The last factor of a
    segment may be an axis of several segments, which is then repeated at every position of the factors before
    it.

    Attributes:
      segments: the factors of each segment.

    Examples:
      >>> print(Axis.whole("P0"), Axis.whole(None))
      P0 -
      >>> print(Axis.product(16, ("P_conv", 512)))  # 4×4 positions of 512 channels, flattened
      16*P_conv:512
      >>> print(Axis.concatenate(Axis.product(("P0", 8)), Axis.product(3), Axis.product(("P1", 4))))
      P0:8 + 3 + P1:4
      >>> turned_and_passed = Axis.concatenate(Axis.product(2), Axis.product(("P1", 6)))
      >>> print(Axis.product(("heads", 4), turned_and_passed))  # partial rotary embedding
      heads:4*(2 + P1:6)
    """

    segments: tuple[Segment, ...]

    @classmethod
    def whole(cls, group: str | None) -> "Axis":
        """Make the axis that one group reorders from end to end; `None` for one that stays put."""
        return cls(((Factor(None, group),),))

    @classmethod
    def product(cls, *factors: "int | tuple[str, int] | Axis") -> "Axis":
        """Make the axis whose positions are read in mixed radix over some factors.

        Args:
          *factors: ``(group, size)``, or a bare size for a factor that stays put, or an axis of which every
            factor has a size.

        Returns:
          The axis. An axis of several segments is distributed over the factors behind it, since
          ``(a + b)*c`` is ``a*c + b*c``; so it stands last wherever it stays one factor.
        """
        axes = [
            f if isinstance(f, Axis) else cls(((Factor(f) if isinstance(f, int) else Factor(f[1], f[0]),),))
            for f in factors
        ]
        return functools.reduce(_times, axes) if axes else cls(((),))

    @classmethod
    def concatenate(cls, *axes: "Axis") -> "Axis":
        """Make the axis that has the segments of `axes` one after the other; every factor needs a size."""
        return cls(tuple(itertools.chain.from_iterable(axis.segments for axis in axes)))

    @property
    def is_whole(self) -> bool:
        """Whether the axis is a single factor."""
        return [len(segment) for segment in self.segments] == [1] and isinstance(self.segments[0][0], Factor)

    @property
    def factors(self) -> Iterator[Factor]:
        """The factors of all segments in their order, at every depth."""
        for part in itertools.chain.from_iterable(self.segments):
            yield from part.factors if isinstance(part, Axis) else (part,)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of the axis in their order; a group that occurs twice is listed twice."""
        return tuple(factor.group for factor in self.factors if factor.group is not None)

    @property
    def size(self) -> int | None:
        """Number of positions that the sizes of the factors make; `None` if one of them is not stated."""
        sizes = [[part.size for part in segment] for segment in self.segments]
        if any(size is None for segment in sizes for size in segment):
            return None
        return sum(math.prod(size or 0 for size in segment) for segment in sizes)

    @property
    def pieces(self) -> tuple[tuple[Factor, ...], ...]:
        """The factors of each choice of one segment wherever there are several."""
        choices = (
            itertools.product(*(part.pieces if isinstance(part, Axis) else ((part,),) for part in segment))
            for segment in self.segments
        )
        return tuple(
            tuple(itertools.chain.from_iterable(choice)) for choice in itertools.chain.from_iterable(choices)
        )

    def sized(self, length: int) -> list[SizedFactor]:
        """Return the factors of an axis of this length, with all sizes known."""
        return [SizedFactor(length if self.is_whole else f.size or 0, f.group) for f in self.factors]

    def fold(
        self,
        length: int,
        factor: Callable[[SizedFactor], _T],
        product: Callable[[list[_T]], _T],
        concatenate: Callable[[list[_T]], _T],
    ) -> _T:
        """Compute something of an axis of this length from the same of its factors.

        Args:
          length: length of the axis.
          factor: makes the value of a factor.
          product: makes the value of a segment from those of its factors.
          concatenate: makes the value of an axis from those of its segments.

        Examples:
          >>> axis = Axis.product(("H", 3), Axis.concatenate(Axis.product(2), Axis.product(("P1", 6))))
          >>> axis.fold(24, lambda factor: factor.size, math.prod, sum)
          24
        """
        if self.is_whole:
            return factor(self.sized(length)[0])
        return concatenate(
            [
                product(
                    [
                        part.fold(part.size or 0, factor, product, concatenate)
                        if isinstance(part, Axis)
                        else factor(SizedFactor(part.size or 0, part.group))
                        for part in segment
                    ]
                )
                for segment in self.segments
            ]
        )

    def rename(self, names: Mapping[str, str | None]) -> "Axis":
        """Return the axis with the groups that `names` says in place of its own; `None` lets one stay."""
        return Axis(
            tuple(
                tuple(
                    part.rename(names)
                    if isinstance(part, Axis)
                    else Factor(part.size, None if part.group is None else names[part.group])
                    for part in segment
                )
                for segment in self.segments
            )
        )

    def simplify(self) -> "Axis":
        """Return the axis with neighbours that stay put joined into one; every factor needs a size.

        Examples:
          >>> turned = Axis.concatenate(Axis.product(2), Axis.product(2))
          >>> print(Axis.product(("heads", 3), turned).simplify())
          heads:3*4
        """
        segments: list[Segment] = []
        for segment in itertools.chain.from_iterable(map(_simplify_segment, self.segments)):
            if segments and _stays(segments[-1]) and _stays(segment):
                segment = (Factor((segments.pop()[0].size or 0) + (segment[0].size or 0)),)
            segments.append(segment)
        return Axis(tuple(segments))

    def __str__(self) -> str:
        if self.is_whole:
            return next(self.factors).group or "-"
        return " + ".join("*".join(map(_describe, segment)) for segment in self.segments)


def _describe(part: Factor | Axis) -> str:
    """Return the text of a factor of a segment."""
    if isinstance(part, Axis):
        return f"({part})"
    return str(part.size) if part.group is None else f"{part.group}:{part.size}"


def _times(axis: Axis, other: Axis) -> Axis:
    """Return the product of two axes."""

    def segment_times(segment: Segment) -> Segment:
        if isinstance(segment[-1], Axis):
            return (*segment[:-1], _times(segment[-1], other))
        return (*segment, *(other.segments[0] if len(other.segments) == 1 else (other,)))

    return Axis(tuple(map(segment_times, axis.segments)))


def _simplify_segment(segment: Segment) -> tuple[Segment, ...]:
    """Return a segment with neighbouring factors that stay put joined, without factors of one position.

    If nothing is left but a concatenation, such as that of a single head, it is no longer inside a product:
    the result then has several segments.
    """
    parts: list[Factor | Axis] = []
    for part in segment:
        axis = part.simplify() if isinstance(part, Axis) else Axis(((part,),))
        parts += axis.segments[0] if len(axis.segments) == 1 else (axis,)
    joined: list[Factor | Axis] = []
    for part in parts:
        if joined and _stays((joined[-1],)) and _stays((part,)):
            joined[-1] = Factor((joined[-1].size or 0) * (part.size or 0))
        else:
            joined.append(part)
    moving = tuple(part for part in joined if part != Factor(1))
    if len(moving) == 1 and isinstance(moving[0], Axis):
        return moving[0].segments
    return (moving or (Factor(1),),)


def _stays(segment: Segment) -> bool:
    """Tell whether a segment is a single factor that stays put."""
    return len(segment) == 1 and isinstance(segment[0], Factor) and segment[0].group is None


AxisLike: TypeAlias = str | None | Axis  # a group that reorders the whole axis, or None, or an axis


class View(NamedTuple):
    """A part of an array, seen as an array of another shape.

    Attributes:
      slices: where the part lies, one slice for each axis.
      shape: the shape of the view.
    """

    slices: tuple[slice, ...]
    shape: tuple[int, ...]


class Block(NamedTuple):
    """A part of a leaf without any concatenation, seen as an array with one dimension for each factor.

    Attributes:
      views: the block is the last of these views, each of which is a view of the one before it; the first is
        a view of the leaf. There is one unless a concatenation stands inside a product.
      labels: group of each dimension; `None` for one that stays put.
    """

    views: tuple[View, ...]
    labels: tuple[str | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return self.views[-1].shape

    def read(self, leaf: Any) -> Any:
        """Return the values of the block, of a NumPy or a JAX array; NumPy does not copy them."""
        for view in self.views:
            leaf = leaf[view.slices].reshape(view.shape)
        return leaf


def iter_blocks(axes: Sequence[Axis], shape: Sequence[int]) -> Iterator[Block]:
    """Yield the blocks of a leaf; the segments of its last axis vary fastest.

    Args:
      axes: the axes of the leaf.
      shape: the shape of the leaf.

    Examples:
      >>> axes = (Axis.whole("P0"), Axis.concatenate(Axis.product(("H", 2), 3), Axis.product(1)))
      >>> for block in iter_blocks(axes, (5, 7)):
      ...     print(block.views[0].slices[1], block.shape, block.labels)
      slice(0, 6, None) (5, 2, 3) ('P0', 'H', None)
      slice(6, 7, None) (5, 1) ('P0', None)
    """
    choices = []
    for axis, length in zip(axes, shape, strict=True):
        start, segments = 0, []
        for segment in ((Factor(length, next(axis.factors).group),),) if axis.is_whole else axis.segments:
            stop = start + math.prod(part.size or 0 for part in segment)
            segments.append((slice(start, stop), segment))
            start = stop
        choices.append(segments)
    for choice in itertools.product(*choices):
        parts = list(itertools.chain.from_iterable(segment for _, segment in choice))
        view = View(tuple(where for where, _ in choice), tuple(part.size or 0 for part in parts))
        if not any(isinstance(part, Axis) for part in parts):
            yield Block((view,), tuple(part.group for part in parts if isinstance(part, Factor)))
            continue
        # Behind this reshape the concatenations inside products are axes of their own.
        inner_axes = [part if isinstance(part, Axis) else Axis(((part,),)) for part in parts]
        for block in iter_blocks(inner_axes, view.shape):
            yield Block((view, *block.views), block.labels)


def cut(leaf: jax.Array, block: Block) -> jax.Array:
    """Return the values of a block as a JAX array, of shape ``block.shape``.

    Examples:
      >>> axis = Axis.concatenate(Axis.product(1), Axis.product(("H", 2), 2))
      >>> [cut(jnp.arange(5), block).tolist() for block in iter_blocks((axis,), (5,))]
      [[0], [[1, 2], [3, 4]]]
      >>> axis = Axis.product(("H", 2), Axis.concatenate(Axis.product(1), Axis.product(2)))
      >>> [cut(jnp.arange(6), block).tolist() for block in iter_blocks((axis,), (6,))]
      [[[0], [3]], [[1, 2], [4, 5]]]
    """
    return block.read(jnp.asarray(leaf))


def join(leaf: jax.Array, pieces: Sequence[tuple[Block, jax.Array]]) -> jax.Array:
    """Return a leaf of the shape and dtype of `leaf` from the values of its blocks.

    Args:
      leaf: a leaf with the shape and dtype wanted; its values are not read.
      pieces: all blocks of the leaf with their values, of shapes ``block.shape``, in the order of
        `iter_blocks`.

    Examples:
      >>> leaf = jnp.arange(6)
      >>> blocks = iter_blocks((Axis.concatenate(Axis.product(2), Axis.product(("H", 2), 2)),), (6,))
      >>> join(leaf, [(block, cut(leaf, block)[::-1]) for block in blocks]).tolist()
      [1, 0, 4, 5, 2, 3]
    """
    return _join(leaf, [(block.views, values) for block, values in pieces])


def _join(leaf: jax.Array, pieces: Sequence[tuple[tuple[View, ...], jax.Array]]) -> jax.Array:
    """Join blocks as `join` does; each is given by its views of `leaf`."""
    # The values are not written into `leaf` itself: XLA on CPU (jaxlib 0.10.2) would update it in place while
    # it still reads the old values of the same block, and would silently get some of them wrong. For the same
    # reason a view of several blocks is joined by itself first.
    joined = jnp.zeros_like(leaf)
    for view, of_view in itertools.groupby(pieces, key=lambda piece: piece[0][0]):
        inner = [(views[1:], values) for views, values in of_view]
        is_block = not inner[0][0]
        values = inner[0][1] if is_block else _join(leaf[view.slices].reshape(view.shape), inner)
        shape = tuple(s.stop - s.start for s in view.slices)
        joined = joined.at[view.slices].set(values.reshape(shape))
    return joined
