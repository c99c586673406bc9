"""A leaf cut into blocks whose every dimension belongs to one group, or to none.

Where axes have segments or factors, a leaf is a patchwork: a block is one choice of segment for each axis,
reshaped so that each factor has a dimension of its own. A leaf of everyday axes is a single block, itself.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rebasin.axis import Axis

__all__ = ["Block", "cut", "iter_blocks", "join"]


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
