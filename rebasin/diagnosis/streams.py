"""Groups that several layers write into: what it costs them that one permutation must serve all of them."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rebasin.axis import Axis
from rebasin.diagnosis.layers import WeightOfLayer
from rebasin.matching.weights import WeightMatching
from rebasin.permutation import compiled_permute
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, map_leaves

__all__ = ["BlockMatch", "match_blocks", "stream_groups", "untie"]


class BlockMatch(NamedTuple):
    """The weights with which one block reads and writes a group, and how they match those of another network.

    Cosines are ⟨A, P[B]⟩ / ‖A‖‖B‖ over these weights, with all other groups as they were given.

    Attributes:
      paths: path names of the weights.
      shared: the cosine under the one permutation that all blocks share.
      own: the cosine under the permutation that is best for this block alone.
      chance: the cosine of the best permutation where there is nothing to find: after every other axis of B's
        weights was put into random order.
      same: share of the units that both permutations place alike.
      rows: the block's own permutation, on top of the shared one.
    """

    paths: tuple[str, ...]
    shared: float
    own: float
    chance: float
    same: float
    rows: np.ndarray


def stream_groups(spec: PermutationSpec, weights: Sequence[WeightOfLayer]) -> tuple[str, ...]:
    """Return the groups that at least two layers write into, such as a residual stream.

    Outer and inner groups are left out: the permutation of one depends on that of the other.
    """
    nested = {group for inner, outer in spec.indexed for group in (inner, *outer)}
    written = [group for weight in weights for group in weight.writes]
    return tuple(g for g in spec.groups if written.count(g) > 1 and g not in nested)


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
    spec: PermutationSpec, weights: Sequence[WeightOfLayer], group: str, params_a: Any, moved: Any
) -> tuple[BlockMatch, ...]:
    """Find the permutation of a group that is best for each block alone, by weight matching.

    Args:
      spec: the symmetries of the networks.
      weights: the weights of the layers, in the order of the program.
      group: a group of `stream_groups`.
      params_a: tree of A.
      moved: tree of B under the permutation that all blocks share.

    Returns:
      The match of each block, in the order of the program.
    """
    a, b = ({path: np.asarray(x) for path, x in leaf_table(tree).items()} for tree in (params_a, moved))
    found = []
    for paths in _blocks(spec, weights, group):
        alone = PermutationSpec(tuple((p, _only(spec.table[p], group)) for p in paths))
        part_a, part_b = ({path: leaves[path] for path in paths} for leaves in (a, b))
        scale = np.sqrt(np.prod([sum(np.vdot(x, x).real for x in p.values()) for p in (part_a, part_b)]))
        rows, shared, own = _match(alone, part_a, part_b, group)
        _, _, chance = _match(alone, part_a, _scramble(alone, part_b, group), group)
        cosines = np.array([shared, own, chance]) / max(float(scale), 1e-30)
        same = float(np.mean(rows == np.arange(len(rows))))
        found.append(BlockMatch(paths, *map(float, cosines), same, rows))
    return tuple(found)


def untie(spec: PermutationSpec, group: str, blocks: Sequence[BlockMatch], moved: Any) -> Any:
    """Give each block its own permutation of a group. The tree that results computes another function.

    Leaves that are no weights of layers, such as biases and scales, go with the block before them.
    """
    owner, at = {}, 0
    starts = {path: i for i, block in enumerate(blocks) for path in block.paths}
    for path, axes in spec.leaves:
        at = starts.get(path, at)
        if any(group in axis.groups for axis in axes):
            owner[path] = at
    alone = {path: PermutationSpec(((path, _only(spec.table[path], group)),)) for path in owner}

    def reorder(path: str, leaf: Any) -> Any:
        if path not in owner:
            return leaf
        rows = {group: blocks[owner[path]].rows}
        return compiled_permute(alone[path], rows, {path: leaf})[path]

    return map_leaves(reorder, moved)


def _only(axes: Sequence[Axis], group: str) -> tuple[Axis, ...]:
    """Return axes on which only one group moves."""
    names = {g: g if g == group else None for g in itertools.chain.from_iterable(x.groups for x in axes)}
    return tuple(axis.rename(names) for axis in axes)


def _match(spec: PermutationSpec, part_a: Any, part_b: Any, group: str) -> tuple[np.ndarray, float, float]:
    """Return the best permutation of the group, and ⟨A, P[B]⟩ under the identity and under it."""
    import jax

    method = WeightMatching(start="identity", restarts=0, roles={"": "weight"})
    match = method.match(spec, part_a, part_b, key=jax.random.key(0))
    return match.permutation[group], float(match.objective[0]), float(match.objective[-1])


def _scramble(spec: PermutationSpec, part: Any, group: str) -> dict[str, np.ndarray]:
    """Put the positions along every axis without the group into random order."""
    random = np.random.default_rng(0)
    scrambled = {}
    for path, axes in spec.leaves:
        leaf = part[path]
        for i, axis in enumerate(axes):
            if group not in axis.groups:
                leaf = np.take(leaf, random.permutation(leaf.shape[i]), axis=i)
        scrambled[path] = leaf
    return scrambled
