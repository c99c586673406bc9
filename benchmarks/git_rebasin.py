"""git-re-basin's weight matching (arXiv 2209.04836, algorithm 1), the peer that ours is measured against.

Written from the algorithm and from how the published code runs it: every operation is dispatched on its
own, without `jax.jit`; every sweep solves every group; for every solve all leaves of the group are permuted
anew along their other axes; a new assignment is taken whether or not it gains. Nothing is cached, and the
objective itself is never computed. That is the peer, and not to be improved here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from rebasin.axis import Axis
from rebasin.errors import SpecError
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table

__all__ = ["GitRebasinMatch", "git_rebasin_matching"]

Table = dict[str, tuple[str | None, ...]]

# The published code's threshold. Its similarities are float32, so this is far below their rounding.
_PROGRESS = 1e-12


class GitRebasinMatch(NamedTuple):
    """What the loop found.

    Attributes:
      permutation: index array for each group, gather convention.
      num_iterations: sweeps made, the last one without progress included.
      num_assignments: linear assignments solved.
    """

    permutation: dict[str, jax.Array]
    num_iterations: int
    num_assignments: int


def git_rebasin_matching(
    spec: PermutationSpec, params_a: Any, params_b: Any, *, key: jax.Array, max_iterations: int = 100
) -> GitRebasinMatch:
    """Coordinate ascent from the identity over the groups of a spec, as git-re-basin runs it.

    A sweep visits the groups in random order. A group is assigned by the similarity of its units of A and of
    B, summed over all leaves that carry it, B's other axes being permuted by the current permutation. Sweeps
    end with the first in which no assignment is better by more than 1e-12 than the one before it.

    Args:
      spec: the symmetries; every axis one whole group, or pinned.
      params_a: tree of A, which stays.
      params_b: tree of B.
      key: PRNG key for the order of groups.
      max_iterations: limit on sweeps.

    Returns:
      The permutation and counts.

    Raises:
      SpecError: an axis has several parts, or a group is indexed; git-re-basin's table cannot say that.
    """
    table = whole_axes(spec)
    a, b = leaf_table(params_a), leaf_table(params_b)
    sites = {
        group: [(path, axis) for path, row in table.items() for axis, name in enumerate(row) if name == group]
        for group in spec.groups
    }
    sizes = {group: a[path].shape[axis] for group, ((path, axis), *_) in sites.items()}
    permutation = {group: jnp.arange(size) for group, size in sizes.items()}
    groups = list(permutation)

    sweeps = assignments = 0
    progress = True
    while progress and sweeps < max_iterations:
        progress = False
        for index in jax.random.permutation(jax.random.fold_in(key, sweeps), len(groups)):
            group = groups[int(index)]
            n = sizes[group]
            similarity = jnp.zeros((n, n))
            for path, axis in sites[group]:
                moved = _permute_others(b[path], table[path], permutation, axis)
                units_a = jnp.moveaxis(a[path], axis, 0).reshape(n, -1)
                similarity += units_a @ jnp.moveaxis(moved, axis, 0).reshape(n, -1).T
            _, columns = linear_sum_assignment(np.asarray(similarity), maximize=True)
            old = jnp.vdot(similarity, jnp.eye(n)[permutation[group]])
            new = jnp.vdot(similarity, jnp.eye(n)[columns])
            progress = progress or bool(new > old + _PROGRESS)
            permutation[group] = jnp.asarray(columns)
            assignments += 1
        sweeps += 1
    return GitRebasinMatch(permutation, sweeps, assignments)


def whole_axes(spec: PermutationSpec) -> Table:
    """The spec as git-re-basin's table: for each axis of a leaf one group, or `None`.

    Raises:
      SpecError: the spec says more than such a table can.
    """
    if spec.indexed or not all(axis.is_whole for _, axes in spec.leaves for axis in axes):
        raise SpecError("git-re-basin's table has one group for a whole axis; this spec has parts of axes")
    return {path: tuple(_group(axis) for axis in axes) for path, axes in spec.leaves}


def _group(axis: Axis) -> str | None:
    return axis.groups[0] if axis.groups else None


def _permute_others(
    leaf: jax.Array, row: tuple[str | None, ...], permutation: dict[str, jax.Array], but: int
) -> jax.Array:
    """A leaf of B permuted along all axes that move, except one."""
    for axis, group in enumerate(row):
        if group is not None and axis != but:
            leaf = jnp.take(leaf, permutation[group], axis=axis)
    return leaf
