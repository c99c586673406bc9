"""Coordinate ascent over the groups of a spec, the machinery of weight matching."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rebasin.matching.assignment import maximise_assignment
from rebasin.matching.blocks import Piece, Term, inner_product
from rebasin.matching.insides import Insides
from rebasin.matching.similarity import Similarity
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec

__all__ = ["Ascent"]

_Rows = dict[str, np.ndarray]


class Ascent:
    """One coordinate ascent: the current permutation, its objective, and what has to be solved.

    Attributes:
      groups: the groups of the spec, in its order.
      permutation: current rows of each group.
      objective: Σ ⟨A, P[B]⟩ over all pairs of networks and all weights, each counted once, float64.
      bound: what no permutation's objective can exceed, by Cauchy and Schwarz.
      rounding: of the objective as a whole.
      resolution: that of the similarities of each group.
      neighbours: of each group those that share a leaf with it, itself included.
      inner: of each group those that it indexes.
      stale: groups whose neighbours have changed since they were last solved.
      stats: counts and seconds.
    """

    def __init__(self, spec: PermutationSpec, pieces: Iterable[Piece], identity: Mapping[str, Any]) -> None:
        self.spec, self.groups = spec, spec.groups  # the property walks all leaves
        self.identity = dict(identity)
        self.stats: dict[str, Any] = {"assignments": 0, "certificates": 0}
        self.stats |= {f"seconds_{name}": 0.0 for name in ("layout", "similarity", "assignment", "objective")}
        with self._timed("layout"):
            self._lay_out(pieces)

    def _lay_out(self, pieces: Iterable[Piece]) -> None:
        outer, moving = self.spec.outer_groups, frozenset(self.groups)
        self.pieces: list[Piece] = []
        self.constant = 0.0  # the part of the objective in which nothing moves
        for piece in pieces:
            if moving.isdisjoint(piece.labels):
                self.constant += inner_product(piece.a, piece.b)
            else:
                self.pieces.append(piece)
        self.of_group = {g: [p for p in self.pieces if g in p.labels] for g in self.groups}
        self.neighbours = {
            group: {label for piece in carrying for label in piece.labels if label in moving}
            for group, carrying in self.of_group.items()
        }
        self.inner = {
            group: sorted(g for g in self.groups if group in outer.get(g, ()) and self.of_group[g])
            for group in self.groups
        }
        # A gain below the rounding of the similarities it was computed from is not a gain.
        bounds = [piece.bound for piece in self.pieces]
        self.bound = self.constant + sum(bounds)
        rounding = {id(p): p.epsilon * bound for p, bound in zip(self.pieces, bounds, strict=True)}
        self.rounding = sum(rounding.values())
        self.resolution = {g: sum(rounding[id(p)] for p in some) for g, some in self.of_group.items()}
        self.similarities: dict[str, Similarity] = {}
        # Layouts are one copy of each network; remembered similarities are to be one more at most. Those of a
        # wide MLP would be larger than the MLP.
        self._budget = 2 * sum(piece.a.nbytes for piece in self.pieces)
        self._remembered: list[str] = []
        self.insides: dict[tuple[str, str], Insides] = {}
        for group, shape in ((g, np.shape(self.identity[g])) for g in self.groups):
            # Pieces that hold the insides of a group are compared through those.
            terms = [
                Term(piece, dim)
                for piece in self.of_group[group]
                if not set(self.inner[group]).intersection(piece.labels)
                for dim, label in enumerate(piece.labels)
                if label == group
            ]
            self.similarities[group] = Similarity(terms, math.prod(shape[:-1]), shape[-1])
        for group in self.groups:
            for name in self.inner[group]:
                siblings = {g for g in self.inner[group] if g != name}
                self.insides[group, name] = Insides(
                    self.spec, group, name, self.similarities[name].terms, siblings
                )

    def start(
        self,
        permutation: Mapping[str, np.ndarray],
        objective: float | None = None,
        stale: set[str] | None = None,
    ) -> None:
        """Starts from a permutation, by default with every group to be solved."""
        self.permutation = {group: np.asarray(row, np.int32) for group, row in permutation.items()}
        self.stale = {group for group, pieces in self.of_group.items() if pieces} if stale is None else stale
        self.objective = self.value(self.permutation) if objective is None else objective

    def value(self, permutation: Permutation) -> float:
        """The objective of a permutation, in float64 from the weights themselves."""
        with self._timed("objective"):
            return self.constant + sum(piece.value(permutation) for piece in self.pieces)

    def sweep(self, order: Sequence[int]) -> None:
        """Improves every group once, in the order given."""
        for group in (self.groups[i] for i in order):
            self.improve(group)

    def improve(self, group: str) -> None:
        """Solves one group with all others fixed, if any neighbour changed since it was last solved.

        A group that indexes others is solved together with them. The objective is then, as where a leaf
        carries the group on two axes, not that of the assignment, and the gain is taken from the objective
        itself.
        """
        if group not in self.stale:
            return
        self.stale.discard(group)
        moved, gain = self._solve(group, self.permutation)
        exact = not self.inner[group] and all(p.labels.count(group) == 1 for p in self.of_group[group])
        if not exact and moved:
            with self._timed("objective"):
                new = self.permutation | moved
                pieces = {id(piece): piece for changed in moved for piece in self.of_group[changed]}
                gain = sum(p.value(new) - p.value(self.permutation) for p in pieces.values())
        if gain > self.resolution[group] * (1 + self.similarities[group].updates):
            self.permutation |= moved
            self.objective += gain
            self.stale |= set().union(*(self.neighbours[changed] for changed in moved))
            if exact:
                self.stale.discard(group)

    def reassign(self, order: Sequence[str] | None = None, known: Permutation | None = None) -> _Rows:
        """A permutation found group by group, each from what is already known.

        Only those terms count whose other dimensions stay or belong to groups already assigned. A group
        without any is assigned by its units' sorted weights, which do not depend on the order of any other
        group: with nothing known at first, the order of B's units never matters.

        Args:
          order: the groups to assign, an index before what it indexes; by default all in order of depth.
          known: rows of the other groups.
        """
        rows = dict(known or {})
        outer = self.spec.outer_groups
        for group in itertools.chain.from_iterable((*outer.get(g, ()), g) for g in order or self.groups):
            if group in rows or group not in self.of_group:
                continue
            if not self.of_group[group]:
                rows[group] = self.identity[group]
                continue
            rows |= self._solve(group, rows, {group, *self.inner[group]} - rows.keys())[0]
        return rows

    def _solve(
        self, group: str, permutation: Permutation, free: set[str] | None = None
    ) -> tuple[_Rows, float]:
        """New rows of a group and of those it indexes, with all others fixed, and the assignment's gain.

        Args:
          group: the group.
          permutation: rows of all groups, or in the pass in order of depth of those already known.
          free: in that pass, the groups to be assigned now.

        Returns:
          Rows, empty where the present ones are optimal, and the gain in the sum of the similarities.
        """
        similarity = self.similarities[group]
        wanted = (
            None if free is None else [self._usable(term, permutation, free) for term in similarity.terms]
        )
        insides = []
        for inside in (self.insides[group, name] for name in self.inner[group]):
            terms = [t for t in inside.terms if free is None or self._usable(t, permutation, free)]
            if terms and (free is None or inside.name in free):
                insides.append((inside, terms))
        self._make_room(group)
        with self._timed("similarity"):
            matrix = similarity.update(permutation, wanted)
            if wanted is not None and not any(wanted) and not insides:
                matrix = similarity.sorted()
        shape = np.shape(self.identity[group])
        matrix = matrix.reshape(*shape, shape[-1])
        # Outer units are paired by the value of the best match between their insides.
        best: dict[str, np.ndarray] = {}
        for inside, terms in insides:
            value, best[inside.name] = inside.match(permutation, terms, self._assign, self._timed)
            matrix = matrix + value
        current = None if free is not None else np.asarray(self.permutation[group])
        if current is not None and not best:
            chosen = np.take_along_axis(matrix, current[..., None], axis=-1)[..., 0]
            if (chosen >= matrix.max(axis=-1)).all():  # nothing can be better than each unit's best
                self.stats["certificates"] += 1
                return {}, 0.0
        rows = self._assign(matrix)
        moved = {group: rows}
        for name, matches in best.items():
            moved[name] = self.insides[group, name].at_pairs(matches, rows)
        gain = 0.0
        if current is not None:
            new, old = (np.take_along_axis(matrix, r[..., None], axis=-1)[..., 0] for r in (rows, current))
            gain = float((new - old).sum())  # the differences first: units that stay cancel exactly
        return moved, gain

    def _make_room(self, group: str) -> None:
        """Forgets those similarities that were used longest ago, where all would be too large together."""
        self._remembered = [other for other in self._remembered if other != group] + [group]
        while (
            len(self._remembered) > 1
            and sum(self.similarities[g].nbytes for g in self._remembered) > self._budget
        ):
            self.similarities[self._remembered.pop(0)].forget()

    def _usable(self, term: Term, known: Permutation, free: set[str]) -> bool:
        """Whether all other dimensions of a term stay, are known or are being assigned with it."""
        labels = [g for g in term.piece.labels if g is not None and g in self.of_group]
        once = term.piece.labels.count(term.piece.labels[term.dim]) == 1
        return once and all(g in known or g in free for g in labels)

    def _assign(self, similarity: np.ndarray) -> np.ndarray:
        """An assignment for each matrix of a stack, int32."""
        with self._timed("assignment"):
            matrices = similarity.reshape(-1, *similarity.shape[-2:])
            rows = np.stack([maximise_assignment(matrix) for matrix in matrices])
        self.stats["assignments"] += len(matrices)
        return rows.reshape(similarity.shape[:-1])

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stats[f"seconds_{phase}"] += time.perf_counter() - began
