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

from rebasin.matching.assignment import maximise_assignments
from rebasin.matching.blocks import PairBlock, UnitRows, lay_out_units
from rebasin.matching.inner import (
    InnerGroup,
    inner_groups,
    match_inner,
    rows_of_pairs,
    usable_inner,
)
from rebasin.matching.similarity import (
    RowStack,
    Similarity,
    gathers_on_device,
    sorted_similarity,
    stack_rows,
    update_similarity,
)
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec

__all__ = [
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
      inner: for each group the inner groups right below it, which hold those below them.
      inner_names: for each group the names of all inner groups that it indexes, at every depth.
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
    inner_names: Mapping[str, tuple[str, ...]]
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
        group: tuple(g for g in sorted(groups) if group in outer_groups.get(g, ()) and of_group[g])
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
        inner={group: inner_groups((group,), names[group], of_group, outer_groups) for group in groups},
        inner_names=names,
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
    linear = not problem.inner_names[group] and all(b.labels.count(group) == 1 for b in problem.blocks[group])
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
    left = (name for group in wanted for name in problem.inner_names[group])
    for group in (*with_outer, *left):
        if group in rows or group not in problem.blocks:
            continue
        if problem.blocks[group]:
            free = {group, *problem.inner_names[group]} - rows.keys()
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
    inner = [
        usable
        for below in problem.inner[group]
        if (usable := usable_inner(below, problem.blocks.keys(), permutation, free))
    ]
    matrix, corrections = _similarity_of(problem, work, group, permutation, free, alone=not inner)
    matches = [match_inner(problem, work, below, permutation) for below in inner]
    for match in matches:
        matrix = matrix + match.values
    current = permutation[group] if free is None else None
    if current is not None and not inner:
        chosen = np.take_along_axis(matrix, current[..., None], axis=-1)[..., 0]
        if (chosen >= matrix.max(axis=-1)).all():  # every unit is paired with its most similar one
            work.certificates += 1
            return {}, 0.0, corrections
    with work.timed("assignment"):
        rows = maximise_assignments(matrix)
    work.assignments += math.prod(rows.shape[:-1])
    moved = {group: rows}
    for below, match in zip(inner, matches, strict=True):
        moved |= rows_of_pairs(problem, below, match, moved)
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
