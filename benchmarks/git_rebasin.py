"""git-re-basin's weight matching (arXiv 2209.04836, algorithm 1), which ours is compared with.

It is written from the algorithm and from how the published code runs it. Every operation is dispatched on
its own, without `jax.jit`. Every iteration assigns every group, and for every assignment all leaves of the
group are permuted again along their other axes. A new assignment is taken whether or not it improves the
objective. Nothing is cached, and the objective itself is never computed. Do not improve any of this here: a
faster loop would no longer be git-re-basin's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from rebasin.axis import Axis
from rebasin.errors import SpecError
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table

__all__ = ["Found", "git_rebasin_matching", "whole_axes"]

Table = dict[str, tuple[str | None, ...]]

# The published code's threshold. Its similarities are float32, so this is far below their rounding.
_PROGRESS = 1e-12


class Found(NamedTuple):
    """What a weight matching found.

    Attributes:
      permutation: index array of each group, in the gather convention.
      num_iterations: number of passes over the groups, of git-re-basin's loop with the last one, which finds
        nothing better.
      num_assignments: number of linear assignments solved.
    """

    permutation: Mapping[str, Any]
    num_iterations: int
    num_assignments: int


def git_rebasin_matching(
    spec: PermutationSpec, params_a: Any, params_b: Any, *, key: jax.Array, max_iterations: int = 100
) -> Found:
    """Run coordinate ascent from the identity over the groups of a spec, as git-re-basin does.

    An iteration visits the groups in random order and assigns each by the similarity of its units. The ascent
    ends with the first iteration in which no assignment is better by more than 1e-12 than the one before it.

    Args:
      spec: the symmetries; every axis has to be one whole group, or pinned.
      params_a: tree of A, which stays.
      params_b: tree of B.
      key: PRNG key for the order of groups.
      max_iterations: largest number of iterations.

    Returns:
      The permutation and counts.

    Raises:
      SpecError: the spec cannot be written as git-re-basin's table, see `whole_axes`.
    """
    table = whole_axes(spec)
    a, b = leaf_table(params_a), leaf_table(params_b)
    permutation = {group: jnp.arange(size) for group, size in spec.group_sizes(params_a).items()}
    groups = list(permutation)
    iterations, assignments, progress = 0, 0, True
    while progress and iterations < max_iterations:
        progress = False
        for index in jax.random.permutation(jax.random.fold_in(key, iterations), len(groups)):
            group = groups[int(index)]
            similarity = _similarity(group, table, a, b, permutation)
            _, columns = linear_sum_assignment(np.asarray(similarity), maximize=True)
            n = len(columns)
            old = jnp.vdot(similarity, jnp.eye(n)[permutation[group]])
            new = jnp.vdot(similarity, jnp.eye(n)[columns])
            progress = progress or bool(new > old + _PROGRESS)
            permutation[group] = jnp.asarray(columns)
            assignments += 1
        iterations += 1
    return Found(permutation, iterations, assignments)


def whole_axes(spec: PermutationSpec) -> Table:
    """Return the spec as git-re-basin's table: for each axis of a leaf one group, or `None`.

    Raises:
      SpecError: an axis has several parts, or a group is an inner group; the table has no way to say that.
    """
    if spec.indexed or not all(axis.is_whole for _, axes in spec.leaves for axis in axes):
        raise SpecError("git-re-basin's table has one group for a whole axis; this spec has parts of axes")
    return {path: tuple(_group(axis) for axis in axes) for path, axes in spec.leaves}


def _group(axis: Axis) -> str | None:
    return axis.groups[0] if axis.groups else None


def _similarity(
    group: str,
    table: Table,
    a: Mapping[str, jax.Array],
    b: Mapping[str, jax.Array],
    permutation: dict[str, jax.Array],
) -> jax.Array:
    """Return the similarity [n, n] of the units of A and B, summed over all leaves that the group permutes.

    B's other axes are permuted by the current permutation.
    """
    n = len(permutation[group])
    similarity = jnp.zeros((n, n))
    for path, row in table.items():
        for axis, name in enumerate(row):
            if name == group:
                moved = _permute_others(b[path], row, permutation, axis)
                units_a = jnp.moveaxis(a[path], axis, 0).reshape(n, -1)
                similarity += units_a @ jnp.moveaxis(moved, axis, 0).reshape(n, -1).T
    return similarity


def _permute_others(
    leaf: jax.Array, row: tuple[str | None, ...], permutation: dict[str, jax.Array], but: int
) -> jax.Array:
    """Permute a leaf of B along all axes that move, except the axis `but`."""
    for axis, group in enumerate(row):
        if group is not None and axis != but:
            leaf = jnp.take(leaf, permutation[group], axis=axis)
    return leaf
