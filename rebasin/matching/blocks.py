"""The weights of two networks as matrices whose columns are the units of one group."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import Block, iter_blocks
from rebasin.permutation import Permutation, index_dims
from rebasin.spec import PermutationSpec

__all__ = ["Leaves", "Piece", "Term", "aligned", "inner_product", "iter_pieces"]

Leaves: TypeAlias = Mapping[str, tuple[Any, Any]]  # path -> leaf of A, leaf of B


class Piece(NamedTuple):
    """The same block of A and of B, with the group of each dimension and the dimensions that index it.

    Attributes:
      path: the leaf that it was cut from.
      a: the block of A, of one dimension per factor; float32 at least.
      b: that of B.
      labels: the group of each dimension, `None` for one that stays.
      index: for each dimension those that index it.
    """

    path: str
    a: np.ndarray
    b: np.ndarray
    labels: tuple[str | None, ...]
    index: tuple[tuple[int, ...], ...]

    @property
    def bound(self) -> float:
        """‖A‖‖B‖, which ⟨A, P[B]⟩ cannot exceed."""
        return math.sqrt(_square(self.a) * _square(self.b))

    @property
    def epsilon(self) -> float:
        """Rounding of a sum of products of the two, relative to `bound`."""
        return float(np.finfo(self.a.dtype).eps)

    def value(self, permutation: Permutation) -> float:
        """⟨A, P[B]⟩ over this piece, in float64."""
        b = self.b
        for dim in sorted(range(b.ndim), key=lambda d: len(self.index[d])):  # an index before what it indexes
            label = self.labels[dim]
            if label is None or label not in permutation:
                continue
            rows = np.asarray(permutation[label])
            if self.index[dim]:
                b = np.take_along_axis(b, aligned(rows, self.index[dim], dim, b.shape), axis=dim)
            elif (rows != np.arange(len(rows))).any():
                b = np.take(b, rows, axis=dim)
        return inner_product(self.a, b)


def iter_pieces(spec: PermutationSpec, leaves: Leaves) -> Iterator[Piece]:
    """The blocks of pairs of leaves, as host arrays; no copy where the leaf is one already.

    On the host, because gathering rows there is a plain copy of memory, while in a compiled program it would
    be compiled again for every shape.
    """
    for path, axes in spec.leaves:
        if path not in leaves:
            continue
        a, b = (_host(leaf) for leaf in leaves[path])
        for block in iter_blocks(axes, a.shape):
            index = tuple(() if g is None else index_dims(block.labels, g, spec) for g in block.labels)
            yield Piece(path, _cut(a, block), _cut(b, block), block.labels, index)


def _host(leaf: Any) -> np.ndarray:
    if getattr(leaf, "dtype", None) == np.float32:  # the everyday case; to ask JAX for the dtype takes longer
        return np.asarray(leaf)
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    return np.asarray(jax.device_get(leaf)).astype(dtype, copy=False)


def _cut(leaf: np.ndarray, block: Block) -> np.ndarray:
    return leaf[block.slices].reshape(block.shape)


def aligned(rows: np.ndarray, index: tuple[int, ...], dim: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of an indexed group, ``[index…, n]``, with their axes where the piece has them."""
    dims = (*index, dim)
    rows = np.transpose(rows, np.argsort(dims))  # they stand in the order of the index
    return rows.reshape([size if d in dims else 1 for d, size in enumerate(shape)])


class Term:
    """One dimension of a piece laid out for products: matrices ``[rows, units]`` of A and of B.

    A row is one position of all other dimensions, those that index the group first. However the other
    groups permute B, that is a choice of rows, so that nothing but an index vector ever changes.

    Attributes:
      piece: where it comes from.
      dim: the dimension whose units are the columns.
      batch: sizes of the dimensions that index the group.
      a: matrix of A, ``[batch · k, n]``.
      b: matrix of B, in B's own order.
    """

    def __init__(self, piece: Piece, dim: int) -> None:
        self.piece, self.dim = piece, dim
        index = piece.index[dim]
        others = (d for d in range(piece.a.ndim) if d != dim and d not in index)
        self._order = (*index, *others, dim)
        shape = piece.a.shape
        self.batch = tuple(shape[d] for d in index)
        self.a, self.b = (
            np.ascontiguousarray(np.transpose(block, self._order)).reshape(-1, shape[dim])
            for block in (piece.a, piece.b)
        )
        self._rows: Sequence[Any] = ()
        self._sources: np.ndarray | None = None

    def sources(self, permutation: Permutation) -> np.ndarray:
        """The row of B that stands in each row after permuting; a group without rows stays.

        Returns:
          int32 array ``[batch · k]``; the same one while the rows of the other groups are the same arrays.
        """
        labels = self.piece.labels
        rows = [None if (label := labels[d]) is None else permutation.get(label) for d in self._order[:-1]]
        if self._sources is None or any(new is not old for new, old in zip(rows, self._rows, strict=True)):
            self._rows, self._sources = rows, self._choose(rows)
        return self._sources

    def _choose(self, rows: Sequence[Any]) -> np.ndarray:
        """`sources` of the rows of each dimension but the last, in the order of the layout."""
        shape = self.piece.a.shape
        dims = self._order[:-1]
        if all(np.ndim(row) < 2 for row in rows):
            source = np.zeros((), np.int32)
            for d, row in zip(dims, rows, strict=True):
                row = np.arange(shape[d], dtype=np.int32) if row is None else np.asarray(row, np.int32)
                source = np.add.outer(source * np.int32(shape[d]), row)
            return source.reshape(-1)
        source = np.zeros((1,) * len(shape), np.int32)
        for d, row in zip(dims, rows, strict=True):
            row = np.arange(shape[d], dtype=np.int32) if row is None else np.asarray(row, np.int32)
            index = self.piece.index[d] if row.ndim > 1 else ()
            source = source * np.int32(shape[d]) + aligned(row, index, d, shape)
        return np.broadcast_to(
            np.transpose(source, self._order),
            [1 if d == self.dim else shape[d] for d in self._order],
        ).reshape(-1)

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Each unit's weights in ascending order, which no permutation of other groups can change.

        Returns:
          Arrays ``[batch, k, n]`` of A and of B.
        """
        shape = (math.prod(self.batch), -1, self.a.shape[-1])
        return np.sort(self.a.reshape(shape), axis=1), np.sort(self.b.reshape(shape), axis=1)


def _square(values: np.ndarray) -> float:
    """‖values‖², to a few digits."""
    rows = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
    return float(np.vecdot(rows, rows).sum(dtype=np.float64))


def inner_product(a: np.ndarray, b: np.ndarray) -> float:
    """⟨a, b⟩ in float64, without a copy in float64 and without waking the threads of BLAS."""
    if a.ndim == 0:
        return float(a) * float(b)
    letters = "abcdefghijklmnopqrstuvwxyz"[: a.ndim]
    return float(np.einsum(f"{letters},{letters}->", a, b, dtype=np.float64))
