"""Inner groups: outer units are paired by the value of the best match between what they hold.

An outer group, such as the heads of attention, is solved together with its inner groups, such as the
dimensions of each head, and with the inner groups of those, to any depth. (Two group norms of different
numbers of groups on the same channels give groups of groups of channels.) Every pair of outer units, one of A
and one of B, gets the value of the best match of their inner units. That match in turn counts for every pair
of inner units the best match of what *they* hold.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rebasin.matching.assignment import best_inner_match
from rebasin.matching.blocks import PairBlock
from rebasin.matching.similarity import pair_products
from rebasin.permutation import Permutation

if TYPE_CHECKING:
    from rebasin.matching.ascent import Problem, Work

__all__ = ["InnerGroup", "InnerMatch", "inner_groups", "match_inner", "rows_of_pairs", "usable_inner"]


class InnerGroup(NamedTuple):
    """An inner group, seen from an outer group that is being solved.

    Attributes:
      chain: the groups from the outer group down to this one.
      blocks: the blocks in which this is the deepest group of the chain. A block that also holds another
        inner group of the same outer group has no best match of one of them alone, and does not count.
      below: the inner groups right below this one.
    """

    chain: tuple[str, ...]
    blocks: tuple[PairBlock, ...]
    below: tuple["InnerGroup", ...]

    @property
    def name(self) -> str:
        """The group itself."""
        return self.chain[-1]


class InnerMatch(NamedTuple):
    """The best matches of an inner group for every pair of outer units.

    Attributes:
      values: the value of the best match of each pair of outer units, ``[…, n of A, n of B]``, for each
        position of the groups that index the outer group.
      rows: the rows of the best matches of this group, and of each group below it. Their axes are the other
        outer groups, then the unit of A and the unit of B for each group of the chain but the last, then the
        units of the last.
    """

    values: np.ndarray
    rows: dict[str, np.ndarray]


def inner_groups(
    chain: tuple[str, ...],
    family: Sequence[str],
    of_group: Mapping[str, Sequence[PairBlock]],
    outer_groups: Mapping[str, tuple[str, ...]],
) -> tuple[InnerGroup, ...]:
    """Return the inner groups right below a chain of groups.

    Args:
      chain: the groups from the outer group that is solved down to one of its inner groups, or itself.
      family: all inner groups of the outer group.
      of_group: the blocks that carry each group.
      outer_groups: the groups that index each inner group.
    """
    found = []
    for name in family:
        if set(chain) != {g for g in outer_groups[name] if g == chain[0] or g in family}:
            continue
        longer = (*chain, name)
        blocks = tuple(
            block
            for block in of_group[name]
            if set(family).intersection(block.labels) == set(longer[1:]) and block.labels.count(name) == 1
        )
        found.append(InnerGroup(longer, blocks, inner_groups(longer, family, of_group, outer_groups)))
    return tuple(found)


def usable_inner(
    inner: InnerGroup, groups: Collection[str], known: Permutation, free: Set[str] | None
) -> InnerGroup | None:
    """Return an inner group with the blocks that can be compared now, or `None` if there are none.

    Args:
      inner: the inner group.
      groups: all groups that move.
      known: permutations that are known.
      free: in a pass in order of depth, the groups that are being assigned now; else `None`, all are known.
    """
    if free is None:
        blocks = inner.blocks
    elif inner.name not in free:
        return None
    else:
        blocks = tuple(
            block
            for block in inner.blocks
            if all(g in known or g in free for g in block.labels if g in groups)
        )
    below = tuple(b for b in (usable_inner(b, groups, known, free) for b in inner.below) if b is not None)
    return inner._replace(blocks=blocks, below=below) if blocks or below else None


def match_inner(problem: "Problem", work: "Work", inner: InnerGroup, permutation: Permutation) -> InnerMatch:
    """Match the inner units of every pair of outer units, with all groups outside of the family fixed.

    One outer unit of A is compared with all of B at a time, so memory is that of one row of pairs.

    Args:
      problem: the networks.
      work: what the matching counts.
      inner: an inner group right below the outer group.
      permutation: permutations of the groups that are known.
    """
    outer = inner.chain[0]
    with work.timed("similarity"):
        operands = _operands(problem, inner, permutation)
    values, rows = [], {}
    for unit in range(problem.identity[outer].shape[-1]):
        value, found = _match_unit(problem, work, inner, operands, unit)
        values.append(value)
        for name, matches in found.items():
            rows.setdefault(name, []).append(matches)
    names = (*_batch(problem, inner), outer, f"{outer} of B")
    above = (*problem.outer_groups.get(outer, ()), outer, f"{outer} of B")
    stacked = {
        below.name: np.stack(rows[below.name], axis=len(_batch(problem, below))) for below in _flat(inner)
    }
    return InnerMatch(_summed(np.stack(values, axis=-2), names, above), stacked)


def rows_of_pairs(
    problem: "Problem", inner: InnerGroup, match: InnerMatch, pairs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Of the matches for all pairs of outer units, return those of the pairs that were chosen.

    Args:
      problem: the networks.
      inner: the inner group.
      match: its matches.
      pairs: the permutation of the outer group, and of groups of the chain above `inner`.

    Returns:
      Permutations of the inner group and of those below it.
    """
    batch, rows = _batch(problem, inner), match.rows[inner.name]
    for depth, name in enumerate(inner.chain[:-1]):
        # The axes so far: others, units of A down to this group, its units of B, pairs further down.
        axes = (*batch, *inner.chain[: depth + 1])
        chosen = _arranged(pairs[name], (*problem.outer_groups.get(name, ()), name), axes)
        chosen = chosen.reshape(*chosen.shape, *(1 for _ in range(rows.ndim - chosen.ndim)))
        rows = np.take_along_axis(rows, chosen, axis=len(axes)).squeeze(len(axes))
    own = problem.outer_groups[inner.name]
    found = {inner.name: _arranged(rows, (*batch, *inner.chain), (*own, inner.name))}
    for below in inner.below:
        found |= rows_of_pairs(problem, below, match, {**pairs, **found})
    return found


def _flat(inner: InnerGroup) -> list[InnerGroup]:
    """Return an inner group and all below it."""
    return [inner, *(deeper for below in inner.below for deeper in _flat(below))]


def _batch(problem: "Problem", inner: InnerGroup) -> tuple[str, ...]:
    """Return the outer groups of an inner group that are not in its chain; their positions are fixed."""
    return tuple(name for name in problem.outer_groups[inner.name] if name not in inner.chain)


def _sizes(problem: "Problem", inner: InnerGroup) -> dict[str, int]:
    """Return the number of positions of every outer group of an inner group, and of its own units."""
    names = (*problem.outer_groups[inner.name], inner.name)
    return dict(zip(names, problem.identity[inner.name].shape, strict=True))


def _operands(
    problem: "Problem", inner: InnerGroup, permutation: Permutation
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what is multiplied for an inner group and each below it.

    Returns:
      Arrays of A and of B by group, ``[others, outer units, k, units of the rest of the chain]``.
    """
    operands = {}
    for below in (below for below in _flat(inner) if below.blocks):
        batch, chain = _batch(problem, below), below.chain
        fixed = {g: row for g, row in permutation.items() if g not in chain}
        parts: list[list[np.ndarray]] = [[], []]
        for block in below.blocks:
            first = [block.labels.index(name) for name in (*batch, chain[0])]
            last = [block.labels.index(name) for name in chain[1:]]
            rest = [dim for dim in range(block.a.ndim) if dim not in (*first, *last)]
            shape = [block.a.shape[dim] for dim in first]
            units = int(np.prod([block.a.shape[dim] for dim in last]))
            for side, values in zip(parts, (block.a, block.permuted_b(fixed)), strict=True):
                moved = np.transpose(values, (*first, *rest, *last))
                side.append(moved.reshape(int(np.prod(shape[:-1])), shape[-1], -1, units))
        operands[below.name] = tuple(np.concatenate(side, axis=2) for side in parts)
    return operands


def _match_unit(
    problem: "Problem",
    work: "Work",
    inner: InnerGroup,
    operands: Mapping[str, tuple[np.ndarray, np.ndarray]],
    unit: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Match the inner units of one outer unit of A with those of all outer units of B.

    Returns:
      The value of the best match, ``[others…, outer units of B, pairs of the chain in between…]``; and the
      rows of the best match of the group and of each below it, with the group's own units as a last axis.
    """
    sizes, batch = _sizes(problem, inner), _batch(problem, inner)
    lead = (*(sizes[name] for name in batch), sizes[inner.chain[0]])
    lengths = [sizes[name] for name in inner.chain[1:]]
    total = np.zeros((*lead, *(n for length in lengths for n in (length, length))))
    if inner.name in operands:
        with work.timed("similarity"):
            a, b = operands[inner.name]
            products = pair_products(a[:, unit], b).reshape(*lead, *lengths, *lengths)
        # From all units of A, then all of B, to the two of each group side by side.
        count = len(lengths)
        pairs = [len(lead) + i + side * count for i in range(count) for side in range(2)]
        total += products.transpose(*range(len(lead)), *pairs)
    rows = {}
    for below in inner.below:
        value, found = _match_unit(problem, work, below, operands, unit)
        names = (*_batch(problem, below), *(f"axis {i}" for i in range(total.ndim - len(batch))))
        total += _summed(value, names, (*batch, *names[len(_batch(problem, below)) :]))
        rows |= found
    with work.timed("assignment"):
        rows[inner.name], value = best_inner_match(total)
    work.assignments += value.size
    return value, rows


def _summed(values: np.ndarray, names: tuple[str, ...], wanted: tuple[str, ...]) -> np.ndarray:
    """Sum over the axes that are not wanted, and put the others in the wanted order."""
    kept = tuple(name for name in names if name in wanted)
    summed = values.sum(axis=tuple(i for i, name in enumerate(names) if name not in wanted))
    return summed.transpose([kept.index(name) for name in wanted])


def _arranged(rows: np.ndarray, names: tuple[str, ...], wanted: tuple[str, ...]) -> np.ndarray:
    """Put axes into the wanted order, with length 1 for an axis that is not there."""
    present = [name for name in wanted if name in names]
    rows = np.transpose(rows, [names.index(name) for name in present])
    return np.expand_dims(rows, tuple(i for i, name in enumerate(wanted) if name not in names))
