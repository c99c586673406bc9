"""Two networks cut into blocks, and laid out as matrices whose columns are the units of one group."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import iter_blocks
from rebasin.permutation import Permutation, index_dims
from rebasin.spec import PermutationSpec
from rebasin.trees import longest_name, real_parts

__all__ = [
    "LeafPairs",
    "PairBlock",
    "UnitRows",
    "lay_out_units",
    "other_rows",
    "pair_blocks",
    "sorted_units",
    "source_rows",
]

LeafPairs: TypeAlias = Mapping[str, tuple[Any, Any]]  # path -> leaf of A, leaf of B


class PairBlock(NamedTuple):
    """The same block of a leaf of A and of B, with the group of each dimension.

    A block of a complex leaf has a last dimension of its own for real and imaginary parts, which stays.

    Attributes:
      path: path name of the leaf that the block was cut from.
      a: the block of A, with one dimension for each factor; at least float32.
      b: the block of B.
      labels: the group of each dimension, `None` for one that stays.
      outer_dims: for each dimension, the dimensions of the outer groups that index its group.
    """

    path: str
    a: np.ndarray
    b: np.ndarray
    labels: tuple[str | None, ...]
    outer_dims: tuple[tuple[int, ...], ...]

    @property
    def bound(self) -> float:
        """‖A‖‖B‖, which ⟨A, P[B]⟩ cannot exceed."""
        rows = (x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1) for x in (self.a, self.b))
        with np.errstate(over="ignore"):  # infinity says that the networks have to be rescaled
            return math.prod(math.sqrt(np.vecdot(x, x).sum(dtype=np.float64)) for x in rows)

    def permuted_b(self, permutation: Permutation) -> np.ndarray:
        """Return the block of B permuted along the dimensions whose group has a permutation."""
        b = self.b
        # An inner group is indexed by new outer positions, so outer groups are permuted first.
        for dim in sorted(range(b.ndim), key=lambda d: len(self.outer_dims[d])):
            label = self.labels[dim]
            if label is None or label not in permutation:
                continue
            rows = np.asarray(permutation[label])
            if self.outer_dims[dim]:
                b = np.take_along_axis(b, _aligned(rows, self.outer_dims[dim], dim, b.shape), axis=dim)
            elif (rows != np.arange(len(rows))).any():
                b = np.take(b, rows, axis=dim)
        return b

    def value(self, permutation: Permutation) -> float:
        """Return ⟨A, P[B]⟩ over this block, in float64."""
        return _inner_product(self.a, self.permuted_b(permutation))


def pair_blocks(
    spec: PermutationSpec, leaves: LeafPairs, leaf_weights: Mapping[str, float]
) -> Iterator[PairBlock]:
    """Cut pairs of leaves into blocks on the host, without a copy where a leaf is a host array already.

    Args:
      spec: the symmetries.
      leaves: the leaves that count, of A and of B, by path name.
      leaf_weights: factors of leaves or of whole subtrees in the objective; of the names that a leaf lies
        below, the longest decides. A leaf of weight zero is left out.
    """
    for path, axes in spec.leaves:
        name = longest_name(path, leaf_weights)
        weight = 1.0 if name is None else leaf_weights[name]
        if path not in leaves or weight == 0:
            continue
        a, b = (_to_host(leaf) for leaf in leaves[path])
        if weight != 1:
            a = a * a.dtype.type(weight)
        for block in iter_blocks(axes, a.shape):
            outer_dims = tuple(() if g is None else index_dims(block.labels, g, spec) for g in block.labels)
            block_a, block_b = (real_parts(block.read(leaf)) for leaf in (a, b))
            added = block_a.ndim - len(block.shape)
            yield PairBlock(
                path, block_a, block_b, (*block.labels, *[None] * added), (*outer_dims, *[()] * added)
            )


def _to_host(leaf: Any) -> np.ndarray:
    if getattr(leaf, "dtype", None) == np.float32:  # the usual case; asking JAX for the dtype takes longer
        return np.asarray(leaf)
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    return np.asarray(jax.device_get(leaf)).astype(dtype, copy=False)


class UnitRows(NamedTuple):
    """A block laid out for one of its dimensions: matrices whose columns are the units of that dimension.

    A row is one position of all other dimensions, those of the outer groups first. However the other groups
    permute B, the permuted matrix is a choice of rows of `b`, so nothing but an index vector ever changes.

    Attributes:
      block: the block that the rows come from.
      order: the dimensions of the block in the order of the layout; the last one has the units.
      batch: sizes of the dimensions of the outer groups.
      a: matrix of A, ``[batch · k, n]``; a view of the leaf where the units are its last axis.
      b: matrix of B in B's own order, ``[batch · k, n]``.
    """

    block: PairBlock
    order: tuple[int, ...]
    batch: tuple[int, ...]
    a: np.ndarray
    b: np.ndarray


def lay_out_units(block: PairBlock, dim: int) -> UnitRows:
    """Lay out a block for the units of dimension `dim`."""
    outer = block.outer_dims[dim]
    others = (d for d in range(block.a.ndim) if d != dim and d not in outer)
    order = (*outer, *others, dim)
    shape = block.a.shape
    a, b = (
        np.ascontiguousarray(np.transpose(values, order)).reshape(-1, shape[dim])
        for values in (block.a, block.b)
    )
    return UnitRows(block, order, tuple(shape[d] for d in outer), a, b)


def other_rows(units: UnitRows, permutation: Permutation) -> tuple[Any, ...]:
    """Return the permutation of each dimension but that of the units, `None` for one that stays."""
    labels = (units.block.labels[dim] for dim in units.order[:-1])
    return tuple(None if label is None else permutation.get(label) for label in labels)


def source_rows(units: UnitRows, rows: Sequence[Any]) -> np.ndarray:
    """Return the row of B's matrix that takes the place of each row once B is permuted.

    Args:
      units: the layout.
      rows: the permutations of the other dimensions, as `other_rows` returns them.

    Returns:
      int32 array ``[batch · k]``.
    """
    shape, dims = units.block.a.shape, units.order[:-1]
    filled = [np.arange(shape[d]) if r is None else np.asarray(r) for d, r in zip(dims, rows, strict=True)]
    if all(row.ndim == 1 for row in filled):
        source = np.zeros((), np.int32)
        for d, row in zip(dims, filled, strict=True):
            source = np.add.outer(source * np.int32(shape[d]), row.astype(np.int32))
        return source.reshape(-1)
    source = np.zeros((1,) * len(shape), np.int32)
    for d, row in zip(dims, filled, strict=True):
        outer = units.block.outer_dims[d] if row.ndim > 1 else ()
        source = source * np.int32(shape[d]) + _aligned(row.astype(np.int32), outer, d, shape)
    sizes = [1 if d == units.order[-1] else shape[d] for d in units.order]
    return np.broadcast_to(np.transpose(source, units.order), sizes).reshape(-1)


def sorted_units(units: UnitRows) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of each unit of A and of B in ascending order, ``[batch, k, n]``.

    No permutation of other groups can change them.
    """
    shape = (math.prod(units.batch), -1, units.a.shape[-1])
    return np.sort(units.a.reshape(shape), axis=1), np.sort(units.b.reshape(shape), axis=1)


def _aligned(rows: np.ndarray, outer: tuple[int, ...], dim: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the rows of an inner group, ``[outer…, n]``, with their axes where the block has them."""
    dims = (*outer, dim)
    rows = np.transpose(rows, np.argsort(dims))
    return rows.reshape([size if d in dims else 1 for d, size in enumerate(shape)])


def _inner_product(a: np.ndarray, b: np.ndarray) -> float:
    """Return ⟨a, b⟩ in float64, without a copy in float64 and without waking the threads of BLAS."""
    if a.ndim == 0:
        return float(a) * float(b)
    letters = "abcdefghijklmnopqrstuvwxyz"[: a.ndim]
    return float(np.einsum(f"{letters},{letters}->", a, b, dtype=np.float64))
