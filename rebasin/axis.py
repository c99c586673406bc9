"""One axis of a leaf: concatenated segments, each a product of factors."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

__all__ = ["Axis", "AxisLike", "Block", "Factor", "Segment", "SizedFactor", "cut", "iter_blocks", "join"]


class Factor(NamedTuple):
    """One digit of an axis in mixed radix: `size` positions that `group` reorders, or that stay (`None`).

    `size` is `None` where the factor is its whole axis: then the axis' own length counts, and one spec serves
    a model at every width.
    """

    size: int | None
    group: str | None = None


class SizedFactor(NamedTuple):
    """A factor of an axis whose length is known."""

    size: int
    group: str | None


Segment: TypeAlias = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a leaf: a sequence of segments (concatenation), each a product of factors (reshape).

    In a segment the first factor varies slowest, as in ``reshape``. The everyday axis is one segment of one
    factor, written `Axis.whole("P0")`, or `Axis.whole(None)` for an axis that stays put.

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
        """The axis that one group reorders from end to end; `None` for one that stays put."""
        return cls(((Factor(None, group),),))

    @classmethod
    def product(cls, *factors: int | tuple[str, int]) -> "Axis":
        """One segment: each factor is ``(group, size)``, or a bare size for positions that stay."""
        return cls((tuple(Factor(f) if isinstance(f, int) else Factor(f[1], f[0]) for f in factors),))

    @classmethod
    def concatenate(cls, *axes: "Axis") -> "Axis":
        """The segments of `axes`, one after the other; all need sizes."""
        return cls(tuple(itertools.chain.from_iterable(axis.segments for axis in axes)))

    @property
    def is_whole(self) -> bool:
        """Whether the axis is one factor, of whatever size."""
        return len(self.segments) == 1 and len(self.segments[0]) == 1

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of the axis in order, each as often as it occurs."""
        return tuple(f.group for f in itertools.chain.from_iterable(self.segments) if f.group is not None)

    def sized(self, length: int) -> list[list[SizedFactor]]:
        """The segments with every size known, for an axis of `length`."""
        return [
            [SizedFactor(length if self.is_whole else factor.size or 0, factor.group) for factor in segment]
            for segment in self.segments
        ]

    def rename(self, names: Mapping[str, str]) -> "Axis":
        """The axis with its groups renamed."""
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


AxisLike: TypeAlias = str | None | Axis


class Block(NamedTuple):
    """Where a block lies in its leaf, and what its dimensions are.

    Attributes:
      slices: one slice per axis of the leaf.
      shape: sizes of the dimensions, one per factor.
      labels: the group of each dimension, `None` for one that stays.
    """

    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    labels: tuple[str | None, ...]


def iter_blocks(axes: Sequence[Axis], shape: Sequence[int]) -> Iterator[Block]:
    """The blocks of a leaf of `shape`, the last axis' segments varying fastest."""
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
    """The block's values, of shape `block.shape`."""
    return jnp.asarray(leaf)[block.slices].reshape(block.shape)


def join(leaf: jax.Array, pieces: Sequence[tuple[Block, jax.Array]]) -> jax.Array:
    """A leaf like `leaf` made of the values of all its blocks."""
    # Not written into `leaf` itself: XLA on CPU (jaxlib 0.10.2) updates it in place while it still reads the
    # old values of the same block, and silently gets some of them wrong.
    joined = jnp.zeros_like(leaf)
    for block, values in pieces:
        shape = tuple(s.stop - s.start for s in block.slices)
        joined = joined.at[block.slices].set(values.reshape(shape))
    return joined
