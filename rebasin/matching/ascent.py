"""Coordinate ascent over the groups of a spec, the machinery of weight matching."""

import functools
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.assignment import maximise_assignment
from rebasin.blocks import Block, cut, iter_blocks
from rebasin.permutation import Permutation, index_dims, take_indexed
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, leaf_table

__all__ = ["Ascent"]

_Rows = dict[str, np.ndarray]


class _Piece(NamedTuple):
    """The same block of A and of B, with the group of each dimension and the dimensions that index it."""

    a: jax.Array
    b: jax.Array
    labels: tuple[str | None, ...]
    index: tuple[tuple[int, ...], ...]
    resolution: float  # rounding of an inner product of the two, relative to their norms


class Ascent:
    """One coordinate ascent: the current permutation, its objective, and what has to be solved.

    Attributes:
      groups: the groups of the spec, in its order.
      permutation: current rows of each group.
      objective: ⟨A, P[B]⟩ over all weights, each counted once, float64.
      stale: groups whose neighbours have changed since they were last solved.
      stats: counts and seconds.
    """

    def __init__(self, spec: PermutationSpec, params_a: Any, params_b: Any, predicate: LeafPredicate) -> None:
        self.spec, self.groups = spec, spec.groups  # the property walks all leaves
        a, b = leaf_table(params_a), leaf_table(params_b)
        self.pieces: list[_Piece] = []
        moving = frozenset(self.groups)
        self.constant = 0.0  # the part of the objective in which nothing moves
        for path, axes in spec.leaves:
            if not predicate(path, a[path]):
                continue
            for block in iter_blocks(axes, np.shape(a[path])):
                piece = _piece(spec, a[path], b[path], block)
                if not moving.isdisjoint(piece.labels):
                    self.pieces.append(piece)
                else:
                    self.constant += _inner_product(piece.a, piece.b)
        self.of_group = {g: [p for p in self.pieces if g in p.labels] for g in self.groups}
        self.neighbours = {
            group: {label for piece in pieces for label in piece.labels if label in self.of_group}
            for group, pieces in self.of_group.items()
        }
        # A gain below the rounding of the similarities it was computed from is not a gain.
        self.resolution = {
            group: sum(piece.resolution for piece in pieces) for group, pieces in self.of_group.items()
        }
        outer = spec.outer_groups
        self.inner = {group: [g for g in self.groups if group in outer.get(g, ())] for group in self.groups}
        self.stats = {"assignments": 0, "seconds_similarity": 0.0, "seconds_assignment": 0.0}

    def restart(self, permutation: Mapping[str, np.ndarray]) -> None:
        """Starts from a permutation, with every group to be solved."""
        self.permutation = dict(permutation)
        self.stale = {group for group, pieces in self.of_group.items() if pieces}
        self.objective = self.constant + sum(_value(piece, self.permutation) for piece in self.pieces)

    def improve(self, group: str) -> None:
        """Solves one group with all others fixed, if any neighbour changed since it was last solved.

        A group that indexes others is solved together with them. The objective is then, as where a leaf
        carries the group on two axes, not that of the assignment, and the gain is taken from the objective
        itself.
        """
        if group not in self.stale:
            return
        self.stale.discard(group)
        pieces = self.of_group[group]
        moved, gain = self._solve(group, pieces, self.permutation)
        exact = not self.inner[group] and all(piece.labels.count(group) == 1 for piece in pieces)
        if not exact:
            new = self.permutation | moved
            gain = sum(_value(piece, new) - _value(piece, self.permutation) for piece in pieces)
        if gain > self.resolution[group]:
            self.permutation |= moved
            self.objective += gain
            self.stale |= set().union(*(self.neighbours[changed] for changed in moved))
            if exact:
                self.stale.discard(group)

    def depth_pass(self, fallback: Mapping[str, np.ndarray]) -> _Rows:
        """A permutation found group by group in order of depth, each from what is already known.

        Only those pieces count whose other dimensions stay or belong to groups already assigned; a group
        without any is left as in `fallback`.
        """
        known: _Rows = {}
        outer = self.spec.outer_groups
        for group in itertools.chain.from_iterable((*outer.get(g, ()), g) for g in self.groups):
            if group in known or group not in self.of_group:
                continue
            free = {group, *self.inner[group]} - known.keys()
            usable = [
                piece
                for piece in self.of_group[group]
                if piece.labels.count(group) == 1
                and all(g in known or g in free or g not in self.of_group for g in piece.labels)
            ]
            known[group] = fallback[group]
            if usable:
                known |= self._solve(group, usable, known | {g: fallback[g] for g in free})[0]
        return known

    def _solve(self, group: str, pieces: list[_Piece], permutation: Permutation) -> tuple[_Rows, float]:
        """New rows of a group and of those it indexes, with all others fixed, and the assignment's gain."""
        inner = {g for g in self.inner[group] if any(g in piece.labels for piece in pieces)}
        plain = [piece for piece in pieces if not inner.intersection(piece.labels)]
        shape = np.shape(permutation[group])
        similarity = np.zeros((*shape, shape[-1]))
        similarity += self._similarity(group, plain, permutation)
        # Outer units are paired by the value of the best match between their insides.
        best: dict[str, np.ndarray] = {}
        for name in sorted(inner):
            value, best[name] = self._match_insides(group, name, pieces, permutation)
            similarity += value
        rows = self._assign(similarity)
        moved = {group: rows}
        for name, matches in best.items():
            index = self.spec.outer_groups[name]
            axes = [index.index(other) for other in (*self.spec.outer_groups.get(group, ()), group)]
            moved[name] = _at_pairs(matches, rows, axes)
        chosen = np.take_along_axis(similarity, rows[..., None], axis=-1).sum()
        current = np.asarray(permutation[group])
        return moved, float(chosen - np.take_along_axis(similarity, current[..., None], axis=-1).sum())

    def _similarity(self, group: str, pieces: list[_Piece], permutation: Permutation) -> np.ndarray | float:
        """Inner products of A's units and B's, float64 [index…, n, n], over all that `group` moves."""
        began = time.perf_counter()
        terms = []
        for piece in pieces:
            rows = _rows(piece, permutation)
            for dim in (d for d, label in enumerate(piece.labels) if label == group):
                others = tuple(None if d == dim else row for d, row in enumerate(rows))
                terms.append(_gram(piece.a, piece.b, others, piece.index, dim))
        total = sum((np.asarray(term, np.float64) for term in terms), 0.0)
        self.stats["seconds_similarity"] += time.perf_counter() - began
        return total

    def _match_insides(
        self, outer: str, inner: str, pieces: list[_Piece], permutation: Permutation
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best match of an inner group for every pair of outer units.

        Pieces that hold two groups indexed by `outer` have no best match of one of them alone and do not
        count here; the gain in `improve` counts them.

        Returns:
          Values ``[index of outer…, n, n]`` of A's outer units and B's, and rows ``[index of inner…, n, m]``,
          in which the axis of `outer` is A's unit and the last but one axis B's.
        """
        index, above = self.spec.outer_groups[inner], self.spec.outer_groups.get(outer, ())
        siblings = {g for g in self.inner[outer] if g != inner}
        holding = [p for p in pieces if inner in p.labels and not siblings.intersection(p.labels)]
        count = np.shape(permutation[outer])[-1]
        values, rows = [], []
        for unit in range(count):
            began = time.perf_counter()
            terms = []
            for piece in holding:
                dims = (piece.labels.index(outer), piece.labels.index(inner))
                others = tuple(None if d in dims else row for d, row in enumerate(_rows(piece, permutation)))
                terms.append(_unit_gram(piece.a, piece.b, others, piece.index, *dims, unit))
            size = np.shape(permutation[inner])
            batch = [length for name, length in zip(index, size, strict=False) if name != outer]
            total = sum(
                (np.asarray(t, np.float64) for t in terms), np.zeros((*batch, count, size[-1], size[-1]))
            )
            self.stats["seconds_similarity"] += time.perf_counter() - began
            matched = self._assign(total)
            rows.append(matched)
            values.append(np.take_along_axis(total, matched[..., None], axis=-1)[..., 0].sum(axis=-1))
        # [batch…, A's unit, B's unit], with the part of the batch that does not index `outer` summed up.
        value = np.stack(values, axis=-2)
        batch_names = [name for name in index if name != outer]
        value = value.sum(axis=tuple(i for i, name in enumerate(batch_names) if name not in above))
        return value, np.stack(rows, axis=index.index(outer))

    def _assign(self, similarity: np.ndarray) -> np.ndarray:
        """An assignment for each matrix of a stack, int32."""
        began = time.perf_counter()
        matrices = similarity.reshape(-1, *similarity.shape[-2:])
        rows = np.stack([maximise_assignment(matrix) for matrix in matrices]).reshape(similarity.shape[:-1])
        self.stats["assignments"] += len(matrices)
        self.stats["seconds_assignment"] += time.perf_counter() - began
        return rows


def _at_pairs(matches: np.ndarray, pairs: np.ndarray, axes: list[int]) -> np.ndarray:
    """Of the matches for all pairs of outer units, those of the pairs chosen.

    Args:
      matches: ``[index…, n, m]``, with A's outer units along an axis of the index and B's along the last but
        one.
      pairs: B's outer unit for each of A's, ``[index of outer…, n]``.
      axes: where the axes of `pairs` stand in the index.
    """
    shape = [1] * matches.ndim
    for axis, size in zip(axes, pairs.shape, strict=True):
        shape[axis] = size
    return np.take_along_axis(matches, pairs.reshape(shape), axis=-2)[..., 0, :]


def _piece(spec: PermutationSpec, a: Any, b: Any, block: Block) -> _Piece:
    """One block of both networks, in float32 at least."""
    dtype = jnp.promote_types(jnp.result_type(a), jnp.float32)
    a, b = (cut(leaf, block).astype(dtype) for leaf in (a, b))
    index = tuple(() if label is None else index_dims(block.labels, label, spec) for label in block.labels)
    norms = math.sqrt(_inner_product(a, a) * _inner_product(b, b))
    return _Piece(a, b, block.labels, index, float(jnp.finfo(dtype).eps) * norms)


def _rows(piece: _Piece, permutation: Permutation) -> tuple[Any, ...]:
    """The rows of each dimension; `None` for one that stays, or whose group is not known yet."""
    return tuple(None if label is None else permutation.get(label) for label in piece.labels)


def _move(b: jax.Array, rows: tuple[Any, ...], index: tuple[tuple[int, ...], ...]) -> jax.Array:
    """A block of B permuted along the dimensions that have rows, every index before what it indexes."""
    for dim in sorted(range(b.ndim), key=lambda d: len(index[d])):
        if rows[dim] is not None:
            b = take_indexed(b, rows[dim], index[dim], dim)
    return b


@functools.partial(jax.jit, static_argnums=(3, 4))
def _gram(
    a: jax.Array, b: jax.Array, rows: tuple[Any, ...], index: tuple[tuple[int, ...], ...], dim: int
) -> jax.Array:
    """⟨A's unit i, B's unit j⟩ along one dimension, [index…, i, j], with B's other dimensions permuted.

    Compiled once for a shape, whichever leaf it comes from.
    """
    return _contract(a, _move(b, rows, index), batch=index[dim], free=(dim,))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _unit_gram(
    a: jax.Array,
    b: jax.Array,
    rows: tuple[Any, ...],
    index: tuple[tuple[int, ...], ...],
    outer: int,
    inner: int,
    unit: jax.Array,
) -> jax.Array:
    """⟨inside i of one unit of A, inside j of each unit of B⟩, [index but outer…, B's unit, i, j]."""
    batch = tuple(d for d in index[inner] if d != outer)
    one = lax.dynamic_index_in_dim(a, unit, axis=outer)
    products = _contract(one, _move(b, rows, index), batch=batch, free=(outer, inner))
    # [batch…, one and i, B's unit and j], each two in the order of the leaf.
    k = len(batch)
    if outer < inner:
        return jnp.transpose(jnp.squeeze(products, axis=k), (*range(k), k + 1, k, k + 2))
    return jnp.transpose(jnp.squeeze(products, axis=k + 1), (*range(k), k + 2, k, k + 1))


def _contract(a: jax.Array, b: jax.Array, *, batch: tuple[int, ...], free: tuple[int, ...]) -> jax.Array:
    """Sums over all dimensions but `batch`, which go together, and `free`, which stay apart."""
    summed = tuple(d for d in range(a.ndim) if d not in (*batch, *free))
    return lax.dot_general(a, b, ((summed, summed), (batch, batch)), precision="highest")


def _value(piece: _Piece, permutation: Permutation) -> float:
    """⟨A, P[B]⟩ over one piece, in float64."""
    return _inner_product(piece.a, _moved(piece.b, _rows(piece, permutation), piece.index))


_moved = jax.jit(_move, static_argnums=2)


def _inner_product(a: Any, b: Any) -> float:
    # Not `vdot`: BLAS wakes its threads for it, which costs milliseconds for a small leaf on a busy machine.
    return float(np.sum(np.multiply(a, b, dtype=np.float64)))
