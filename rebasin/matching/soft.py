"""Soft permutations: doubly stochastic matrices in place of permutations, on any spec.

A soft permutation maps each group to an array whose last two axes are ``[n, n]``. Entry ``[i, j]`` is the
fraction of old unit j in new unit i, and a permutation p has a one at ``[i, p[i]]``.

An inner group has one matrix for every *pair* of a new and an old position of each outer group that moves,
and one for every position of an outer group that is fixed. The matrices of head dimensions, for example, have
the shape ``[new head, old head, n, n]``. New head h takes from old head k the fraction that the matrix of the
heads says, with the head dimensions arranged by the matrix of this pair:

    new[h, d] = Σ_k outer[h, k] Σ_e inner[h, k, d, e] old[k, e].

That is linear in the matrices of each group. Where all matrices are permutations, it is exactly
`rebasin.permute` with the inner rows of the pairs that the outer permutation makes.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import cut, iter_blocks, join
from rebasin.matching.assignment import maximise_assignment
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import map_leaves

__all__ = [
    "BlockMove",
    "SoftPermutation",
    "assign_matrices",
    "block_move",
    "harden",
    "move_block",
    "soft_permute",
    "soften",
    "uniform_soft",
]

SoftPermutation: TypeAlias = Mapping[str, Any]  # group -> float array [pairs…, n, n]


class BlockMove(NamedTuple):
    """How a block of a leaf moves: its contraction with the matrices of its groups.

    Attributes:
      subscripts: subscripts of `jnp.einsum`, whose operands are the old values and then the matrices.
      groups: the groups whose matrices are the operands, one for each dimension that moves; empty for a block
        that stays.
    """

    subscripts: str
    groups: tuple[str, ...]


def block_move(spec: PermutationSpec, labels: Sequence[str | None]) -> BlockMove:
    """Make the contraction that moves a block.

    Args:
      spec: the axes that move.
      labels: the group of each dimension of the block, `None` where the dimension stays.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "H", "D")}, indexed={"D": ["H"]})
      >>> block_move(spec, (None, "H", "D"))
      BlockMove(subscripts='aef,be,becf->abc', groups=('H', 'D'))
    """
    moving, outer, labels = set(spec.groups), spec.outer_groups, list(labels)
    new = string.ascii_letters[: len(labels)]
    old = [
        string.ascii_letters[len(labels) + i] if group in moving else new[i] for i, group in enumerate(labels)
    ]
    operands, groups = ["".join(old)], []
    for dim, group in enumerate(labels):
        if group is None or group not in moving:
            continue
        at = [labels.index(other) for other in outer.get(group, ())]
        pairs = "".join(new[i] + old[i] if labels[i] in moving else new[i] for i in at)
        operands.append(pairs + new[dim] + old[dim])
        groups.append(group)
    return BlockMove(f"{','.join(operands)}->{new}", tuple(groups))


def move_block(move: BlockMove, soft: SoftPermutation, values: jax.Array) -> jax.Array:
    """Move the values of a block; the result has the dtype of the matrices, or its complex counterpart."""
    if not move.groups:
        return values
    matrices = [jnp.asarray(soft[group]) for group in move.groups]
    kind = jnp.complex64 if jnp.iscomplexobj(values) else matrices[0].dtype
    values = values.astype(jnp.promote_types(matrices[0].dtype, kind))
    return jnp.einsum(move.subscripts, values, *matrices, precision="highest")


def soft_permute(spec: PermutationSpec, soft: SoftPermutation, tree: Any) -> Any:
    """Move every floating or complex leaf of a tree by a soft permutation; other leaves stay as they are.

    The result is differentiable in `soft` and in `tree`. Where `soft` is a permutation, it is that of
    `rebasin.permute` up to rounding.

    Args:
      spec: the axes that move.
      soft: matrices of every group, as in the module's docstring.
      tree: the tree to move.

    Returns:
      A tree with the structure, shapes and dtypes of `tree`.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> soft = {"P0": jnp.array([[0.5, 0.5], [0.5, 0.5]])}
      >>> soft_permute(spec, soft, {"bias": jnp.array([1.0, 3.0])})["bias"].tolist()
      [2.0, 2.0]
    """
    table = spec.table

    def move(path: str, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact) or not any(axis.groups for axis in table[path]):
            return leaf
        pieces = []
        for block in iter_blocks(table[path], leaf.shape):
            values = move_block(block_move(spec, block.labels), soft, cut(leaf, block))
            pieces.append((block, values.astype(leaf.dtype)))
        return join(leaf, pieces)

    return map_leaves(move, tree)


def uniform_soft(spec: PermutationSpec, tree: Any) -> dict[str, np.ndarray]:
    """Return the barycentre of all permutations, float64: every entry of every matrix is 1/n."""
    moving, outer = set(spec.groups), spec.outer_groups
    uniform = {}
    for group, size in spec.group_sizes(tree).items():
        *index, n = size if isinstance(size, tuple) else (size,)
        pairs: list[int] = []
        for other, length in zip(outer.get(group, ()), index, strict=True):
            pairs += [length, length] if other in moving else [length]
        uniform[group] = np.full((*pairs, n, n), 1 / n)
    return uniform


def soften(spec: PermutationSpec, permutation: Permutation, tree: Any) -> dict[str, np.ndarray]:
    """Return the matrices of a permutation, float64.

    A permutation says nothing about the inner groups of outer units that it does not pair; their matrices are
    uniform.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> soften(spec, {"P0": np.array([1, 0])}, {"bias": np.zeros(2)})["P0"].tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    soft = uniform_soft(spec, tree)
    rows = {group: np.asarray(row) for group, row in permutation.items()}
    for group, matrices in soft.items():
        for position, pair in _pairs(spec, group, rows):
            matrices[pair] = np.eye(matrices.shape[-1])[rows[group][position]]
    return soft


def harden(spec: PermutationSpec, soft: SoftPermutation) -> dict[str, np.ndarray]:
    """Round a soft permutation to the nearest permutation, by one linear assignment for each matrix.

    Outer groups are rounded first. Of the matrices of an inner group, only those are used that belong to the
    pairs which the outer permutations make.

    Returns:
      int32 rows of every group, as `rebasin.permute` takes them.
    """
    rows: dict[str, np.ndarray] = {}
    for group in spec.outward:
        matrices = np.asarray(soft[group])
        outer = spec.outer_groups.get(group, ())
        sizes = _outer_sizes(spec, outer, matrices.shape)
        rows[group] = np.empty((*sizes, matrices.shape[-1]), np.int32)
        for position, pair in _pairs(spec, group, rows):
            rows[group][position] = maximise_assignment(matrices[pair])
    return {group: rows[group] for group in spec.groups}


def assign_matrices(similarity: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Find the permutation matrices that maximise ⟨similarity, ·⟩, for each matrix of a stack.

    Args:
      similarity: the stack of similarities, ``[pairs…, n, n]``.
      current: the matrices to keep where the similarity is constant, so that it prefers no permutation.

    Returns:
      The stack of permutation matrices, float64.
    """
    chosen = np.array(current, np.float64)
    for index in np.ndindex(similarity.shape[:-2]):
        matrix = similarity[index]
        if matrix.shape[-1] > 1 and np.ptp(matrix) > 0:
            chosen[index] = np.eye(matrix.shape[-1])[maximise_assignment(matrix)]
    return chosen


def _outer_sizes(spec: PermutationSpec, outer: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """Read the sizes of the outer groups from the shape of an inner group's matrices."""
    sizes, axis = [], 0
    for other in outer:
        sizes.append(shape[axis])
        axis += 1 if other in spec.fixed else 2
    return tuple(sizes)


def _pairs(
    spec: PermutationSpec, group: str, rows: Mapping[str, np.ndarray]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield every new outer position of a group, with the index of the matrix that belongs to it.

    The outer permutations decide which old position is paired with a new one, and so which matrix it is. A
    group without outer groups has one position, ``()``.
    """
    outer = spec.outer_groups.get(group, ())
    for position in np.ndindex(rows[group].shape[:-1]):
        at = dict(zip(outer, position, strict=True))
        pair: list[int] = []
        for other in outer:
            pair.append(at[other])
            if other not in spec.fixed:
                above = tuple(at[o] for o in spec.outer_groups.get(other, ()))
                pair.append(int(rows[other][*above, at[other]]))
        yield position, tuple(pair)
