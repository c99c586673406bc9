"""The objective of weight matching on soft permutations, for two networks or more.

For networks θ_0, …, θ_{k−1}, of which θ_0 stays,

    f(M) = Σ_{i<j} ⟨M_i[θ_i], M_j[θ_j]⟩, M_0 the identity,

over all weights. It is a polynomial in the matrices: along a segment its degree is at most the number of
matrices that meet in one block, twice that where two of the networks in a product move.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.blocks import cut, iter_blocks
from rebasin.permutation import Permutation, permute
from rebasin.soft import BlockMove, SoftPermutation, block_move, move_block
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, leaf_table

__all__ = ["Relaxation", "compiled_permute", "joint_objective"]

# Gathers called one by one cost more than all that a step computes, for small networks.
compiled_permute = jax.jit(permute, static_argnums=0)

_Softs = tuple[SoftPermutation, ...]  # of all networks but the first


class Relaxation:
    """The objective on soft permutations: its gradient, and itself along a segment.

    Attributes:
      degree: of the polynomial along a segment.
      scale: Σ_{i<j} ‖θ_i‖ ‖θ_j‖ over all weights, a bound on the objective.
    """

    def __init__(self, spec: PermutationSpec, trees: Sequence[Any], predicate: LeafPredicate) -> None:
        tables = [leaf_table(tree) for tree in trees]
        moves, arrays = [], []
        norms = np.zeros(len(trees))
        self.constant = 0.0  # what the leaves that never move add
        for path, axes in spec.leaves:
            if not predicate(path, tables[0][path]):
                continue
            leaves = [jnp.asarray(table[path]) for table in tables]
            norms += [_square(leaf) for leaf in leaves]
            for block in iter_blocks(axes, leaves[0].shape):
                move = block_move(spec, block.labels)
                pieces = tuple(cut(leaf, block) for leaf in leaves)
                if move.groups:
                    moves.append(move)
                    arrays.append(pieces)
                else:
                    self.constant += _pair_sum(pieces)
        self._moves, self._arrays = tuple(moves), tuple(arrays)
        roots = np.sqrt(norms)
        self.scale = float((roots.sum() ** 2 - norms.sum()) / 2)
        self.degree = (1 if len(trees) == 2 else 2) * max((len(move.groups) for move in moves), default=0)

    def gradient(self, softs: _Softs) -> list[dict[str, np.ndarray]]:
        """∂f/∂M of every network that moves, float64 from float32 products at highest precision."""
        gradients = _gradient(self._moves, _as(softs, np.float32), self._arrays)
        return [{g: np.asarray(x, np.float64) for g, x in one.items()} for one in jax.device_get(gradients)]

    def along(self, softs: _Softs, ends: _Softs) -> np.polynomial.Polynomial:
        """The polynomial t ↦ f(M + t(E − M)) on [0, 1], exact up to rounding in float64.

        A polynomial of degree d through its values at d + 1 Chebyshev–Lobatto points, both ends of the
        segment among them.
        """
        points = (1 - np.cos(np.pi * np.arange(self.degree + 1) / max(self.degree, 1))) / 2
        with jax.enable_x64(True):
            values = _values(self._moves, _as(softs, np.float64), _as(ends, np.float64), self._arrays, points)
            values = np.asarray(values) + self.constant
        return np.polynomial.Polynomial.fit(points, values, self.degree, domain=[0, 1])


def joint_objective(
    spec: PermutationSpec,
    permutations: Sequence[Permutation],
    trees: Sequence[Any],
    predicate: LeafPredicate,
) -> float:
    """Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ over all weights, in float64."""
    moved = [
        leaf_table(compiled_permute(spec, permutation, tree))
        for permutation, tree in zip(permutations, trees, strict=True)
    ]
    return sum(
        _pair_sum([table[path] for table in moved])
        for path, _ in spec.leaves
        if predicate(path, moved[0][path])
    )


def _pair_sum(arrays: Sequence[Any]) -> float:
    """Σ_{i<j} ⟨x_i, x_j⟩ in float64, pair by pair: a difference of squares would lose digits."""
    total, before = 0.0, np.asarray(arrays[0], np.float64)
    for array in arrays[1:]:
        array = np.asarray(array, np.float64)
        # Not `vdot`: BLAS wakes its threads for it, which costs milliseconds for a small leaf.
        total += float(np.sum(before * array))
        before = before + array
    return total


def _square(leaf: Any) -> float:
    return float(np.sum(np.square(np.asarray(leaf, np.float64))))


def _as(softs: _Softs, dtype: Any) -> _Softs:
    return tuple({group: np.asarray(m, dtype) for group, m in soft.items()} for soft in softs)


def _objective(
    moves: tuple[BlockMove, ...], softs: _Softs, arrays: tuple[tuple[jax.Array, ...], ...]
) -> jax.Array:
    total = jnp.zeros((), jax.tree.leaves(softs)[0].dtype)
    for move, (anchor, *pieces) in zip(moves, arrays, strict=True):
        before = anchor.astype(total.dtype)
        for piece, soft in zip(pieces, softs, strict=True):
            moved = move_block(move, soft, piece)
            total += jnp.vdot(before, moved, precision="highest")
            before = before + moved
    return total


_gradient = functools.partial(jax.jit, static_argnums=0)(jax.grad(_objective, argnums=1))


@functools.partial(jax.jit, static_argnums=0)
def _values(
    moves: tuple[BlockMove, ...],
    softs: _Softs,
    ends: _Softs,
    arrays: tuple[tuple[jax.Array, ...], ...],
    points: jax.Array,
) -> jax.Array:
    def at(t: jax.Array) -> jax.Array:
        return _objective(moves, jax.tree.map(lambda m, e: m + t * (e - m), softs, ends), arrays)

    return jax.lax.map(at, points)
