"""The groups of a spec one at a time: which depend on each other, and one matched again by weights."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np

from rebasin.matching.weights import WeightMatching
from rebasin.permutation import identity_permutation
from rebasin.roles import RoleNames, leaf_roles
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table

__all__ = ["families", "is_nested", "match_by_weights", "restrict_leaves"]


def families(spec: PermutationSpec) -> list[tuple[str, ...]]:
    """Return the groups, each with the outer and inner groups on whose permutations its own depends.

    Examples:
      >>> table = {"w": ("heads", "inner"), "v": ("P0", None)}
      >>> families(PermutationSpec.from_axes(table, indexed={"inner": ["heads"]}))
      [('heads', 'inner'), ('P0',)]
    """
    found: list[tuple[str, ...]] = []
    outer = spec.outer_groups
    for group in spec.outward:
        near = {name for name in outer.get(group, ()) if name not in spec.fixed}
        joined = [family for family in found if near.intersection(family)]
        found = [family for family in found if family not in joined]
        found.append((*itertools.chain.from_iterable(joined), group))
    order = {group: i for i, group in enumerate(spec.groups)}
    return sorted(found, key=lambda family: order[family[0]])


def is_nested(spec: PermutationSpec, group: str) -> bool:
    """Tell whether a group is an outer or an inner group."""
    return any(group == inner or group in outer for inner, outer in spec.indexed)


def restrict_leaves(spec: PermutationSpec, paths: Iterable[str], free: Collection[str]) -> PermutationSpec:
    """Return the spec of some leaves alone, in which only some groups move.

    Args:
      spec: the symmetries of the network.
      paths: path names of the leaves.
      free: the groups that move; none of them nested.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": ("P0", "P1"), "b": ("P1",)})
      >>> print(restrict_leaves(spec, ["w"], {"P1"}))
      1 group, 1 leaf
        w: -, P1
    """
    table = spec.table
    names = dict.fromkeys((*spec.groups, *spec.fixed)) | {group: group for group in free}
    return PermutationSpec(tuple((path, tuple(axis.rename(names) for axis in table[path])) for path in paths))


def match_by_weights(
    spec: PermutationSpec, group: str, params_a: Any, moved: Any, roles: RoleNames
) -> np.ndarray:
    """Find the permutation of one group that is best by weights while all others stay.

    Args:
      spec: the symmetries of the networks.
      group: a group that is not nested.
      params_a: tree of A.
      moved: tree of B as it is permuted so far.
      roles: roles of leaves that would not be found.

    Returns:
      int32 ``[n]``, on top of the permutation so far.
    """
    carrying = [path for path, axes in spec.leaves if any(group in axis.groups for axis in axes)]
    alone = restrict_leaves(spec, carrying, {group})
    a, b = ({path: leaf_table(tree)[path] for path in carrying} for tree in (params_a, moved))
    roles = {path: role for path, role in leaf_roles(params_a, roles).items() if path in carrying}
    if "weight" not in roles.values():
        return identity_permutation(alone, b)[group]
    match = WeightMatching(restarts=0, roles=roles).match(alone, a, b, key=jax.random.key(0))
    return match.permutation[group]
