"""Coordinate ascent over the groups of a spec, by linear assignment.

With all other groups fixed, the objective ⟨A, P[B]⟩ is linear in the permutation of one group: it is the sum
of the similarities of paired units, and a linear assignment maximises it. An iteration does so once for every
group whose neighbours have changed. What never changes is a `Problem`; the permutation reached so far is a
`State`, which every step takes and returns; similarities that are kept for the next step, and counts, are in
`Work`.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from rebasin.matching.assignment import best_inner_match, maximise_assignments
from rebasin.matching.blocks import PairBlock, UnitRows, lay_out_units, other_rows, source_rows
from rebasin.matching.similarity import (
    RowStack,
    Similarity,
    gathers_on_device,
    pair_products,
    sorted_similarity,
    stack_rows,
    update_similarity,
)
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec

__all__ = [
    "InnerGroup",
    "Problem",
    "State",
    "Work",
    "assign_in_order",
    "improve",
    "lay_out",
    "objective_of",
    "state_at",
]

_Rows = dict[str, np.ndarray]


class InnerGroup(NamedTuple):
    """An inner group, seen from one of the outer groups that index it.

    Attributes:
      name: the inner group.
      layouts: its layouts that count. A layout that also holds another inner group of the same outer group
        has no best match of one of them alone, and does not count.
      outer_groups: all groups that index the inner group.
      axis: the position of the outer group among them.
    """

    name: str
    layouts: tuple[UnitRows, ...]
    outer_groups: tuple[str, ...]
    axis: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Two networks laid out for coordinate ascent; nothing in it ever changes.

    Attributes:
      groups: the groups of the spec, in order of depth.
      outer_groups: the groups that index each inner group.
      identity: the permutation that moves nothing.
      blocks: for each group the blocks that carry it.
      moving_blocks: all blocks that carry a group.
      constant: the part of the objective in which nothing moves.
      layouts: for each group its layouts; blocks that hold inner groups of it are compared through those.
      inner: for each group the inner groups that it indexes.
      neighbours: for each group the groups that share a leaf with it, itself included.
      bound: the objective that no permutation can exceed, by the Cauchy–Schwarz inequality.
      rounding: rounding error of the objective; smaller gains are ignored.
      resolution: for each group the rounding error of its similarities; smaller gains are ignored.
      kept: the groups whose similarities are kept between iterations.
      stacks: the layouts of each width on the device, where rows are gathered there.
    """

    groups: tuple[str, ...]
    outer_groups: Mapping[str, tuple[str, ...]]
    identity: Mapping[str, np.ndarray]
    blocks: Mapping[str, tuple[PairBlock, ...]]
    moving_blocks: tuple[PairBlock, ...]
    constant: float
    layouts: Mapping[str, tuple[UnitRows, ...]]
    inner: Mapping[str, tuple[InnerGroup, ...]]
    neighbours: Mapping[str, frozenset[str]]
    bound: float
    rounding: float
    resolution: Mapping[str, float]
    kept: frozenset[str]
    stacks: Mapping[int, RowStack]


@dataclasses.dataclass
class Work:
    """What one matching remembers and counts on its way.

    Attributes:
      similarities: the last similarities of the groups in `Problem.kept`.
      assignments: number of assignments solved.
      certificates: number of times that a group's present permutation was seen to be optimal without one.
      seconds: seconds spent on each part.
    """

    similarities: dict[str, Similarity] = dataclasses.field(default_factory=dict)
    assignments: int = 0
    certificates: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(_PARTS, 0.0))

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the seconds of a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began


_PARTS = ("layout", "similarity", "assignment", "objective")


class State(NamedTuple):
    """A point of the ascent.

    Attributes:
      permutation: the permutation of each group.
      objective: ⟨A, P[B]⟩ over all weights that count, float64.
      stale: groups of which a neighbour has changed since they were last solved.
    """

    permutation: _Rows
    objective: float
    stale: frozenset[str]


def lay_out(
    spec: PermutationSpec,
    blocks: Iterable[PairBlock],
    identity: Mapping[str, np.ndarray],
    *,
    memory: float = 1.0,
) -> Problem:
    """Lay two networks out for coordinate ascent.

    Args:
      spec: the symmetries.
      blocks: the blocks of the leaves that count; of several pairs of networks together, if one permutation
        is wanted for all of them.
      identity: the permutation that moves nothing, which gives the shapes.
      memory: how much memory similarities that are kept may take, in copies of the networks. Layouts take
        about one copy more; the similarities of a wide MLP would be larger than the MLP.
    """
    groups, outer_groups = spec.groups, spec.outer_groups
    every = list(blocks)
    moving = tuple(block for block in every if not set(groups).isdisjoint(block.labels))
    of_group = {group: tuple(b for b in moving if group in b.labels) for group in groups}
    names = {
        group: [g for g in sorted(groups) if group in outer_groups.get(g, ()) and of_group[g]]
        for group in groups
    }
    layouts = {group: _lay_out_group(group, of_group[group], names[group]) for group in groups}
    constant = sum(block.value({}) for block in every if set(groups).isdisjoint(block.labels))
    bounds = {id(block): block.bound for block in moving}
    rounding = {id(block): float(np.finfo(block.a.dtype).eps) * bounds[id(block)] for block in moving}
    return Problem(
        groups=groups,
        outer_groups=outer_groups,
        identity=dict(identity),
        blocks=of_group,
        moving_blocks=moving,
        constant=constant,
        layouts=layouts,
        inner={group: _inner_groups(group, names[group], layouts, outer_groups) for group in groups},
        neighbours={
            group: frozenset(label for b in of_group[group] for label in b.labels if label in of_group)
            for group in groups
        },
        bound=constant + sum(bounds.values()),
        rounding=sum(rounding.values()),
        resolution={group: sum(rounding[id(b)] for b in of_group[group]) for group in groups},
        kept=_choose_kept(identity, memory * 2 * sum(block.a.nbytes for block in moving)),
        stacks=_stack_by_width(layouts, identity) if gathers_on_device() else {},
    )


def _lay_out_group(group: str, blocks: Sequence[PairBlock], inner: Sequence[str]) -> tuple[UnitRows, ...]:
    return tuple(
        lay_out_units(block, dim)
        for block in blocks
        if set(inner).isdisjoint(block.labels)
        for dim, label in enumerate(block.labels)
        if label == group
    )


def _inner_groups(
    group: str,
    names: Sequence[str],
    layouts: Mapping[str, tuple[UnitRows, ...]],
    outer_groups: Mapping[str, tuple[str, ...]],
) -> tuple[InnerGroup, ...]:
    """Return the inner groups that a group indexes."""
    found = []
    for name in names:
        siblings = set(names) - {name}
        alone = tuple(units for units in layouts[name] if siblings.isdisjoint(units.block.labels))
        found.append(InnerGroup(name, alone, outer_groups[name], outer_groups[name].index(group)))
    return tuple(found)


def _choose_kept(identity: Mapping[str, np.ndarray], budget: float) -> frozenset[str]:
    """Return the groups whose float64 similarities fit into a budget of bytes, the smallest first."""
    sizes = {group: 8 * rows.size * rows.shape[-1] for group, rows in identity.items()}
    ordered = sorted(sizes, key=lambda group: sizes[group])
    totals = itertools.accumulate(sizes[group] for group in ordered)
    return frozenset(group for group, total in zip(ordered, totals, strict=True) if total <= budget)


def _stack_by_width(
    layouts: Mapping[str, tuple[UnitRows, ...]], identity: Mapping[str, np.ndarray]
) -> dict[int, RowStack]:
    widths: dict[int, list[tuple[int, Sequence[UnitRows]]]] = {}
    for group, of_group in layouts.items():
        if of_group:
            rows = identity[group]
            widths.setdefault(rows.shape[-1], []).append((math.prod(rows.shape[:-1]), of_group))
    return {width: stack_rows(members) for width, members in widths.items()}


def objective_of(problem: Problem, work: Work, permutation: Permutation) -> float:
    """Return the objective of a permutation, in float64 from the weights themselves."""
    with work.timed("objective"):
        return problem.constant + sum(block.value(permutation) for block in problem.moving_blocks)


def state_at(problem: Problem, work: Work, permutation: Permutation) -> State:
    """Return the state at a permutation, in which every group is still to be solved."""
    rows = {group: np.asarray(row, np.int32) for group, row in permutation.items()}
    stale = frozenset(group for group in problem.groups if problem.blocks[group])
    return State(rows, objective_of(problem, work, rows), stale)


def improve(problem: Problem, work: Work, state: State, group: str) -> State:
    """Solve one group with all others fixed, if a neighbour has changed since it was last solved.

    A new permutation is taken only for a gain above the rounding error of the similarities. The gain is that
    of the assignment where the objective is linear in the group. It is computed from the objective itself
    where a leaf carries the group on two axes, or where the group was solved together with its inner groups.
    """
    if group not in state.stale:
        return state
    state = state._replace(stale=state.stale - {group})
    moved, gain, corrections = _solve(problem, work, group, state.permutation)
    if not moved:
        return state
    linear = not problem.inner[group] and all(b.labels.count(group) == 1 for b in problem.blocks[group])
    permutation = state.permutation | moved
    if not linear:
        with work.timed("objective"):
            blocks = {id(block): block for changed in moved for block in problem.blocks[changed]}
            gain = sum(b.value(permutation) - b.value(state.permutation) for b in blocks.values())
    if gain <= problem.resolution[group] * (1 + corrections):
        return state
    stale = state.stale.union(*(problem.neighbours[changed] for changed in moved))
    return State(permutation, state.objective + gain, stale - {group} if linear else stale)


def assign_in_order(
    problem: Problem, work: Work, order: Sequence[str] | None = None, known: Permutation | None = None
) -> _Rows:
    """Find a permutation group by group, each from what is already known.

    Only those layouts count whose other dimensions stay or belong to groups already assigned. A group without
    such a layout is assigned by its units' sorted weights, which do not depend on the order of any other
    group. So with nothing known at first, the order of B's units never matters.

    Args:
      problem: the networks.
      work: what the matching remembers and counts.
      order: the groups to assign, by default all in order of depth; outer groups come before their inner
        groups.
      known: permutations of the other groups.
    """
    rows = {group: np.asarray(row, np.int32) for group, row in (known or {}).items()}
    wanted = problem.groups if order is None else order
    with_outer = itertools.chain.from_iterable((*problem.outer_groups.get(g, ()), g) for g in wanted)
    # Inner groups are assigned with their outer group, but for those that met nothing known at that time.
    left = (inner.name for group in wanted for inner in problem.inner[group])
    for group in (*with_outer, *left):
        if group in rows or group not in problem.blocks:
            continue
        if problem.blocks[group]:
            free = {group, *(inner.name for inner in problem.inner[group])} - rows.keys()
            rows |= _solve(problem, work, group, rows, free)[0]
        else:
            rows[group] = problem.identity[group]
    return rows


def _solve(
    problem: Problem, work: Work, group: str, permutation: Permutation, free: Set[str] | None = None
) -> tuple[_Rows, float, int]:
    """Solve a group, together with its inner groups, with all others fixed.

    Args:
      problem: the networks.
      work: what the matching remembers and counts.
      group: the group.
      permutation: permutations of all groups, or in a pass in order of depth of those already known.
      free: in such a pass, the groups to be assigned now.

    Returns:
      New permutations, none where the present ones are optimal; the gain in the sum of similarities; and the
      number of corrections since the similarities were computed as a whole.
    """
    inner_layouts = [
        (inner, layouts)
        for inner in problem.inner[group]
        if (layouts := _usable(problem, inner.layouts, permutation, free))
        and (free is None or inner.name in free)
    ]
    matrix, corrections = _similarity_of(problem, work, group, permutation, free, alone=not inner_layouts)
    inner_rows: dict[str, tuple[InnerGroup, np.ndarray]] = {}
    for inner, layouts in inner_layouts:
        values, rows = _match_inner(problem, work, group, inner, layouts, permutation)
        inner_rows[inner.name] = inner, rows
        matrix = matrix + values
    current = permutation[group] if free is None else None
    if current is not None and not inner_rows:
        chosen = np.take_along_axis(matrix, current[..., None], axis=-1)[..., 0]
        if (chosen >= matrix.max(axis=-1)).all():  # every unit is paired with its most similar one
            work.certificates += 1
            return {}, 0.0, corrections
    with work.timed("assignment"):
        rows = maximise_assignments(matrix)
    work.assignments += math.prod(rows.shape[:-1])
    moved = {group: rows}
    for name, (inner, matches) in inner_rows.items():
        moved[name] = _at_pairs(problem, group, inner, matches, rows)
    if current is None:
        return moved, 0.0, corrections
    new, old = (np.take_along_axis(matrix, r[..., None], axis=-1)[..., 0] for r in (rows, current))
    # Differences first: units that stay cancel exactly.
    return moved, float((new - old).sum()), corrections


def _similarity_of(
    problem: Problem,
    work: Work,
    group: str,
    permutation: Permutation,
    free: Set[str] | None,
    *,
    alone: bool,
) -> tuple[np.ndarray, int]:
    """Return the similarities of a group, float64 ``[outer…, n, n]``, and the number of their corrections.

    Where nothing tells the units apart yet, neither a layout nor (`alone`) an inner group, the units' sorted
    weights do.
    """
    layouts, rows = problem.layouts[group], problem.identity[group]
    shape = math.prod(rows.shape[:-1]), rows.shape[-1]
    usable = _usable(problem, layouts, permutation, free)
    with work.timed("similarity"):
        if alone and not usable:
            return sorted_similarity(layouts, shape).reshape(*rows.shape, -1), 0
        names = {id(units) for units in usable}
        counted = [id(units) in names for units in layouts]
        last = work.similarities.get(group)
        if last is None:
            last = Similarity(np.zeros((shape[0], shape[1], shape[1])), (None,) * len(layouts), 0)
        stack = problem.stacks.get(shape[1])
        found = update_similarity(last, layouts, permutation, counted=counted, stack=stack)
    if group in problem.kept:
        work.similarities[group] = found
    return found.matrix.reshape(*rows.shape, -1), found.corrections


def _usable(
    problem: Problem, layouts: Sequence[UnitRows], known: Permutation, free: Set[str] | None
) -> list[UnitRows]:
    """Return the layouts whose other dimensions all stay, are known or (`free`) are being assigned now."""
    if free is None:
        return list(layouts)
    usable = []
    for units in layouts:
        labels = units.block.labels
        once = labels.count(labels[units.order[-1]]) == 1
        if once and all(g in known or g in free for g in labels if g in problem.blocks):
            usable.append(units)
    return usable


def _match_inner(
    problem: Problem,
    work: Work,
    outer: str,
    inner: InnerGroup,
    layouts: Sequence[UnitRows],
    permutation: Permutation,
) -> tuple[np.ndarray, np.ndarray]:
    """Match the inner units of every pair of outer units.

    Returns:
      The value of the best match for A's outer units and B's, ``[outer groups of the outer group…, n, n]``;
      and its rows ``[outer groups of the inner group…, n, m]``, in which the axis of the outer group is A's
      unit and the last but one axis is B's.
    """
    fixed = {g: row for g, row in permutation.items() if g not in (outer, inner.name)}
    shape = problem.identity[inner.name].shape
    batch = tuple(size for axis, size in enumerate(shape[:-1]) if axis != inner.axis)
    with work.timed("similarity"):
        stacked_a, stacked_b = [], []
        for units in layouts:
            moved = units.b[source_rows(units, other_rows(units, fixed))]
            stacked_a.append(_by_outer_unit(units.a, units.batch, inner.axis))
            stacked_b.append(_by_outer_unit(moved, units.batch, inner.axis))
        a, b = (np.concatenate(parts, axis=2) for parts in (stacked_a, stacked_b))
    values, found = [], []
    for unit in range(a.shape[1]):
        with work.timed("similarity"):
            products = pair_products(a[:, unit], b)
        with work.timed("assignment"):
            rows, value = best_inner_match(products.reshape(*batch, *products.shape[1:]))
        work.assignments += value.size
        values.append(value)
        found.append(rows)
    names = [name for name in inner.outer_groups if name != outer]
    above = problem.outer_groups.get(outer, ())
    summed = tuple(i for i, name in enumerate(names) if name not in above)
    return np.stack(values, axis=-2).sum(axis=summed), np.stack(found, axis=inner.axis)


def _by_outer_unit(matrix: np.ndarray, batch: tuple[int, ...], axis: int) -> np.ndarray:
    """Return a layout's matrix as ``[other outer positions, outer units, k, n]``."""
    blocks = matrix.reshape(*batch, -1, matrix.shape[-1])
    blocks = np.moveaxis(blocks, axis, len(batch) - 1)
    return blocks.reshape(-1, batch[axis], *blocks.shape[-2:])


def _at_pairs(
    problem: Problem, outer: str, inner: InnerGroup, matches: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
    """Of the matches for all pairs of outer units, return those of the pairs that were chosen.

    Args:
      problem: the networks.
      outer: the outer group.
      inner: the inner group.
      matches: rows from `_match_inner`.
      pairs: B's outer unit for each of A's, ``[outer groups of the outer group…, n]``.
    """
    shape = [1] * matches.ndim
    for name, size in zip((*problem.outer_groups.get(outer, ()), outer), pairs.shape, strict=True):
        shape[inner.outer_groups.index(name)] = size
    return np.take_along_axis(matches, pairs.reshape(shape), axis=-2)[..., 0, :]
