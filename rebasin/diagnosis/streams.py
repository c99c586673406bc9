"""Groups that several layers write into: what it costs them that one permutation must serve all of them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rebasin.diagnosis.groups import is_nested, match_by_weights, restrict_leaves
from rebasin.diagnosis.layers import WeightOfLayer
from rebasin.matching.weights import WeightMatching
from rebasin.permutation import compiled_permute
from rebasin.roles import RoleNames
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table

__all__ = ["BlockMatch", "match_blocks", "stream_groups"]


class BlockMatch(NamedTuple):
    """The weights with which one block reads and writes a group, and how they match those of another network.

    Cosines are ⟨A, P[B]⟩ / ‖A‖‖B‖ over these weights, where the inner units of the block, those of groups
    that no other block carries, are matched too.

    Attributes:
      paths: path names of the weights.
      shared: the cosine under the one permutation of the group that is best for all blocks together.
      own: the cosine under the permutation of the group that is best for this block alone.
      chance: the same where there is nothing to find, after the entries of B's weights were shuffled.
      same: share of the units of the group that both permutations place alike.
    """

    paths: tuple[str, ...]
    shared: float
    own: float
    chance: float
    same: float

    @property
    def gain(self) -> float:
        """The cosine that the block gains by its own permutation, over the shared one and over chance."""
        return self.own - max(self.shared, self.chance)


def stream_groups(spec: PermutationSpec, weights: Sequence[WeightOfLayer]) -> tuple[str, ...]:
    """Return the groups that at least two layers write into, such as a residual stream.

    Outer and inner groups are left out: the permutation of one depends on that of the other.
    """
    written = [group for weight in weights for group in weight.writes]
    return tuple(g for g in spec.groups if written.count(g) > 1 and not is_nested(spec, g))


def _blocks(spec: PermutationSpec, weights: Sequence[WeightOfLayer], group: str) -> list[tuple[str, ...]]:
    """Cut the weights that carry a group into blocks, each of which ends with a layer that writes into it."""
    carrying = [w for w in weights if any(group in axis.groups for axis in spec.table[w.path])]
    blocks: list[list[str]] = [[]]
    for weight in carrying:
        blocks[-1].append(weight.path)
        if group in weight.writes:
            blocks.append([])
    return [tuple(block) for block in blocks if block]


def match_blocks(
    spec: PermutationSpec,
    weights: Sequence[WeightOfLayer],
    group: str,
    params_a: Any,
    moved: Any,
    roles: RoleNames = None,
) -> tuple[BlockMatch, ...]:
    """Compare the one permutation of a group that serves all blocks with the best for each of them.

    All of them are found by weight matching.

    Args:
      spec: the symmetries of the networks.
      weights: the weights of the layers, in the order of the program.
      group: a group of `stream_groups`.
      params_a: tree of A.
      moved: tree of B as it is permuted so far; the group is matched again first, with all others as they
        are.
      roles: roles of leaves that would not be found.

    Returns:
      The match of each block, in the order of the program.
    """
    everywhere = restrict_leaves(spec, spec.table, {group})
    moved = compiled_permute(
        everywhere, {group: match_by_weights(spec, group, params_a, moved, roles)}, moved
    )
    a, b = ({path: np.asarray(x) for path, x in leaf_table(tree).items()} for tree in (params_a, moved))
    random = np.random.default_rng(0)
    found = []
    for paths in _blocks(spec, weights, group):
        part_a, part_b = ({path: leaves[path] for path in paths} for leaves in (a, b))
        shuffled = {path: random.permutation(x.ravel()).reshape(x.shape) for path, x in part_b.items()}
        inner = _inner_groups(spec, weights, paths)
        kept, free = (restrict_leaves(spec, paths, groups) for groups in (inner, {group, *inner}))
        _, shared = _match(kept, part_a, part_b)
        rows, own = _match(free, part_a, part_b)
        _, chance = _match(free, part_a, shuffled)
        same = float(np.mean(rows[group] == np.arange(len(rows[group]))))
        found.append(BlockMatch(paths, shared, own, chance, same))
    return tuple(found)


def _inner_groups(
    spec: PermutationSpec, weights: Sequence[WeightOfLayer], paths: Sequence[str]
) -> frozenset[str]:
    """Return the groups that the weights of a block carry and those of no other layer."""
    inside, outside = set[str](), {group for inner, outer in spec.indexed for group in (inner, *outer)}
    for weight in weights:
        groups = itertools.chain.from_iterable(axis.groups for axis in spec.table[weight.path])
        (inside if weight.path in paths else outside).update(groups)
    return frozenset(inside - outside - set(spec.fixed))


def _match(spec: PermutationSpec, part_a: Any, part_b: Any) -> tuple[dict[str, np.ndarray], float]:
    """Return the best permutation of a block, and the cosine under it."""
    inner, permutation = sum(np.vdot(part_a[path], part_b[path]).real for path in part_a), {}
    if spec.groups:
        match = WeightMatching(roles={"": "weight"}).match(spec, part_a, part_b, key=jax.random.key(0))
        inner, permutation = match.objective[-1], match.permutation
    norms = (math.sqrt(sum(np.vdot(x, x).real for x in part.values())) for part in (part_a, part_b))
    return permutation, float(inner) / max(math.prod(norms), 1e-30)
