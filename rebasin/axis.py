"""The structure of an axis, and the blocks of a leaf that follow from the structure of its axes.

An axis is a concatenation of segments, and each segment is a product of factors, as a reshape makes it. A
choice of one segment from each axis of a leaf is a block: an array with one dimension for each factor.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

__all__ = ["Axis", "AxisLike", "Block", "Factor", "Segment", "SizedFactor", "cut", "iter_blocks", "join"]


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


Segment: TypeAlias = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a leaf: a concatenation of segments, each of which is a product of factors.

    In a segment the first factor varies slowest, as in ``reshape``. The everyday axis is one segment of one
    factor, written `Axis.whole("P0")`, or `Axis.whole(None)` for an axis that stays put.

    Attributes:
      segments: the factors of each segment.

    Examples:
      >>> print(Axis.whole("P0"), Axis.whole(None))
      P0 -
      >>> print(Axis.product(16, ("P_conv", 512)))  # 4×4 positions of 512 channels, flattened
      16*P_conv:512
      >>> print(Axis.concatenate(Axis.product(("P0", 8)), Axis.product(3), Axis.product(("P1", 4))))
      P0:8 + 3 + P1:4
    """

    segments: tuple[Segment, ...]

    @classmethod
    def whole(cls, group: str | None) -> "Axis":
        """Make the axis that one group reorders from end to end; `None` for one that stays put."""
        return cls(((Factor(None, group),),))

    @classmethod
    def product(cls, *factors: int | tuple[str, int]) -> "Axis":
        """Make an axis of one segment; a factor is ``(group, size)``, or a bare size if it stays put."""
        return cls((tuple(Factor(f) if isinstance(f, int) else Factor(f[1], f[0]) for f in factors),))

    @classmethod
    def concatenate(cls, *axes: "Axis") -> "Axis":
        """Make the axis that has the segments of `axes` one after the other; every factor needs a size."""
        return cls(tuple(itertools.chain.from_iterable(axis.segments for axis in axes)))

    @property
    def is_whole(self) -> bool:
        """Whether the axis is a single factor."""
        return len(self.segments) == 1 and len(self.segments[0]) == 1

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of the axis in their order; a group that occurs twice is listed twice."""
        return tuple(f.group for f in itertools.chain.from_iterable(self.segments) if f.group is not None)

    def sized(self, length: int) -> list[list[SizedFactor]]:
        """Return the segments of an axis of this length, with all sizes known."""
        return [
            [SizedFactor(length if self.is_whole else factor.size or 0, factor.group) for factor in segment]
            for segment in self.segments
        ]

    def rename(self, names: Mapping[str, str]) -> "Axis":
        """Return the axis with its groups renamed; `names` has the new name of each."""
        return Axis(
            tuple(
                tuple(f if f.group is None else f._replace(group=names[f.group]) for f in segment)
                for segment in self.segments
            )
        )

    def __str__(self) -> str:
        if self.is_whole:
            return self.segments[0][0].group or "-"
        return " + ".join(
            "*".join(str(f.size) if f.group is None else f"{f.group}:{f.size}" for f in segment)
            for segment in self.segments
        )


AxisLike: TypeAlias = str | None | Axis  # a group that reorders the whole axis, or None, or an axis


class Block(NamedTuple):
    """A part of a leaf in which each axis is one segment, seen as an array with one dimension per factor.

    Attributes:
      slices: where the block lies in the leaf, one slice for each axis.
      shape: size of each dimension.
      labels: group of each dimension; `None` for one that stays put.
    """

    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    labels: tuple[str | None, ...]


def iter_blocks(axes: Sequence[Axis], shape: Sequence[int]) -> Iterator[Block]:
    """Yield the blocks of a leaf; the segments of its last axis vary fastest.

    Args:
      axes: the axes of the leaf.
      shape: the shape of the leaf.

    Examples:
      >>> axes = (Axis.whole("P0"), Axis.concatenate(Axis.product(("H", 2), 3), Axis.product(1)))
      >>> for block in iter_blocks(axes, (5, 7)):
      ...     print(block.slices[1], block.shape, block.labels)
      slice(0, 6, None) (5, 2, 3) ('P0', 'H', None)
      slice(6, 7, None) (5, 1) ('P0', None)
    """
    choices = []
    for axis, length in zip(axes, shape, strict=True):
        start, segments = 0, []
        for segment in axis.sized(length):
            stop = start + math.prod(factor.size for factor in segment)
            segments.append((slice(start, stop), segment))
            start = stop
        choices.append(segments)
    for choice in itertools.product(*choices):
        factors = list(itertools.chain.from_iterable(segment for _, segment in choice))
        yield Block(
            tuple(where for where, _ in choice),
            tuple(f.size for f in factors),
            tuple(f.group for f in factors),
        )


def cut(leaf: jax.Array, block: Block) -> jax.Array:
    """Return the values of a block, of shape ``block.shape``.

    Examples:
      >>> axis = Axis.concatenate(Axis.product(1), Axis.product(("H", 2), 2))
      >>> [cut(jnp.arange(5), block).tolist() for block in iter_blocks((axis,), (5,))]
      [[0], [[1, 2], [3, 4]]]
    """
    return jnp.asarray(leaf)[block.slices].reshape(block.shape)


def join(leaf: jax.Array, pieces: Sequence[tuple[Block, jax.Array]]) -> jax.Array:
    """Return a leaf of the shape and dtype of `leaf` from the values of its blocks.

    Args:
      leaf: a leaf with the shape and dtype wanted; its values are not read.
      pieces: all blocks of the leaf with their values, of shapes ``block.shape``.

    Examples:
      >>> leaf = jnp.arange(6)
      >>> blocks = iter_blocks((Axis.concatenate(Axis.product(2), Axis.product(("H", 2), 2)),), (6,))
      >>> join(leaf, [(block, cut(leaf, block)[::-1]) for block in blocks]).tolist()
      [1, 0, 4, 5, 2, 3]
    """
    # The values are not written into `leaf` itself: XLA on CPU (jaxlib 0.10.2) would update it in place while
    # it still reads the old values of the same block, and would silently get some of them wrong.
    joined = jnp.zeros_like(leaf)
    for block, values in pieces:
        shape = tuple(s.stop - s.start for s in block.slices)
        joined = joined.at[block.slices].set(values.reshape(shape))
    return joined
