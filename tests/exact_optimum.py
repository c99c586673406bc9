"""The exact optimum where all groups are small, as an oracle: every permutation is a state of its group.

Every block of the weights then is a table over the states of the few groups that it carries, the objective
is the sum of the tables, and eliminating one group after the other finds its maximum (bucket elimination;
Bertelè and Brioschi, Nonserial Dynamic Programming, 1972). The time is exponential in the groups that have to
be looked at together, which are two or three in most networks, not in all of them.
"""

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rebasin.matching.blocks import PairBlock

__all__ = ["MAX_STATES", "exact_optimum"]

MAX_STATES = 600  # 4! and, for two positions of an index, 4!²
MAX_TABLE = 2**20


class _Table(NamedTuple):
    """A part of the objective: one axis of `values` for each group, one position for each state."""

    groups: tuple[str, ...]
    values: np.ndarray


def exact_optimum(
    blocks: Sequence[PairBlock], identity: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """The permutation of highest objective, or `None` where there are too many to look at.

    Args:
      blocks: the weights.
      identity: rows of every group, ``[index…, n]``.

    Returns:
      int32 rows of each group; of equal optima always the same.
    """
    shapes = {group: np.shape(rows) for group, rows in identity.items()}
    counts = {g: math.factorial(shape[-1]) ** math.prod(shape[:-1]) for g, shape in shapes.items()}
    if not counts or max(counts.values()) > MAX_STATES:
        return None
    carried = [tuple(dict.fromkeys(g for g in p.labels if g in counts)) for p in blocks]
    if any(math.prod(counts[g] for g in groups) > MAX_TABLE for groups in carried):
        return None
    states = {group: _states(shape) for group, shape in shapes.items()}
    tables = [
        _Table(groups, _tabulate(block, groups, states))
        for block, groups in zip(blocks, carried, strict=True)
        if groups
    ]
    best = _eliminate(tables, counts)
    if best is None:
        return None
    return {group: states[group][best.get(group, 0)] for group in shapes}


def _states(shape: tuple[int, ...]) -> np.ndarray:
    """All rows of a group, int32 ``[states, index…, n]``, the identity first."""
    rows = list(itertools.permutations(range(shape[-1])))
    choices = itertools.product(rows, repeat=math.prod(shape[:-1]))
    return np.array(list(choices), np.int32).reshape(-1, *shape)


def _tabulate(block: PairBlock, groups: tuple[str, ...], states: Mapping[str, np.ndarray]) -> np.ndarray:
    """⟨A, P[B]⟩ over one block for every choice of states, float64, one axis for each of `groups`."""
    rank = block.a.ndim
    names = string.ascii_letters
    new, old = list(names[:rank]), list(names[:rank])  # subscripts of A's dimensions and B's
    state = dict(zip(groups, names[2 * rank :], strict=False))
    terms, operands = [], []
    for dim, group in enumerate(block.labels):
        if group is not None and group in state:
            old[dim] = names[rank + dim]
            terms.append(
                "".join([state[group], *(new[d] for d in block.outer_dims[dim]), new[dim], old[dim]])
            )
            operands.append(np.eye(block.a.shape[dim])[states[group]])
    a, b = (np.asarray(values, np.float64) for values in (block.a, block.b))
    subscripts = ",".join(["".join(new), "".join(old), *terms]) + "->" + "".join(state.values())
    return np.einsum(subscripts, a, b, *operands, optimize="greedy")


def _eliminate(tables: list[_Table], counts: Mapping[str, int]) -> dict[str, int] | None:
    """The state of each group that maximises the sum of all tables; `None` if one would be too large."""
    left = set(itertools.chain.from_iterable(table.groups for table in tables))
    choices: list[tuple[str, _Table]] = []  # for each group eliminated its best state, given the others
    while left:
        together = {
            group: {group}.union(*(table.groups for table in tables if group in table.groups))
            for group in sorted(left)
        }
        entries, group = min((math.prod(counts[g] for g in together[group]), group) for group in left)
        if entries > MAX_TABLE:
            return None
        touching = [table for table in tables if group in table.groups]
        others = sorted({g for table in touching for g in table.groups} - {group})
        total = sum((_aligned(table, (*others, group)) for table in touching), np.zeros(()))
        choices.append((group, _Table(tuple(others), total.argmax(axis=-1))))
        tables = [table for table in tables if group not in table.groups]
        tables.append(_Table(tuple(others), total.max(axis=-1)))
        left.remove(group)
    best: dict[str, int] = {}
    for group, table in reversed(choices):
        best[group] = int(table.values[tuple(best[g] for g in table.groups)])
    return best


def _aligned(table: _Table, groups: tuple[str, ...]) -> np.ndarray:
    """A table with its axes in the order of `groups`, of length 1 where it does not depend on one."""
    present = [g for g in groups if g in table.groups]
    values = np.transpose(table.values, [table.groups.index(g) for g in present])
    return np.expand_dims(values, [i for i, g in enumerate(groups) if g not in table.groups])
