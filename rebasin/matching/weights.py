"""Weight matching: coordinate ascent over groups by linear assignment.

Algorithm 1 of arXiv 2404.06498 ("Greedy-SOBLAP"; arXiv 2209.04836, algorithm 1), on any spec. The objective
is the inner product ⟨A, P[B]⟩ over all weights, each counted once, so that ‖A − P[B]‖² = ‖A‖² + ‖B‖² −
2·objective.
"""

import functools
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.assignment import maximise_assignment
from rebasin.blocks import Block, cut, iter_blocks
from rebasin.errors import ConfigError, SpecError
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation, check_permutation, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, is_weight, leaf_table

__all__ = ["Start", "weight_matching"]

Start = Literal["depth", "identity"]


def weight_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    key: jax.Array,
    start: Start | Permutation = "depth",
    max_sweeps: int = 100,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """Finds a permutation of B that brings it close to A in Euclidean distance.

    One sweep visits the groups in random order. For group g, with all others fixed, the objective is linear,
    ⟨A, P[B]⟩ = tr(G Pᵀ) + const with G the inner products between units of A and B, and a linear assignment
    solves it exactly. A group whose neighbours have not changed since its last assignment is not solved
    again; sweeps end when none is left. A new permutation is taken only for a gain above the rounding of G,
    so the objective never falls.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      key: PRNG key for the order of groups.
      start: ``"depth"`` makes a first pass over the groups in the order of the network, in which each is
        assigned by those leaves alone whose other axes are already known; if the result is below the identity
        in the objective, the ascent starts at the identity after all. ``"identity"`` is the paper's start. A
        permutation is taken as it is.
      max_sweeps: limit on sweeps, at least 1.
      predicate: ``(path, leaf) -> bool``, the leaves that count; by default floating leaves that are neither
        running statistics nor optimiser state.

    Returns:
      The match; ``stats`` has ``start``, ``assignments``, ``seconds``, and ``seconds_similarity`` and
      ``seconds_assignment`` of them.

    Raises:
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes, as networks of different widths do.
      NonFiniteError: a weight is NaN or infinite.
      PermutationError: `start` is a permutation that does not fit.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": jnp.array([[1.0, 2.0, 3.0]]), "v": jnp.array([[1.0], [0.0], [2.0]])}
      >>> b = {"w": jnp.array([[3.0, 1.0, 2.0]]), "v": jnp.array([[2.0], [1.0], [0.0]])}
      >>> match = weight_matching(spec, a, b, key=jax.random.key(0))
      >>> match.permutation["P0"].tolist(), match.objective.tolist()
      ([1, 2, 0], [19.0, 19.0])
    """
    began = time.perf_counter()
    if max_sweeps < 1:
        raise ConfigError(f"max_sweeps must be at least 1, got {max_sweeps}")
    if spec.indexed:
        raise SpecError(
            f"weight matching has no rule for indexed groups yet: {[group for group, _ in spec.indexed]}"
        )
    check_same_shapes(params_a, params_b)
    for tree, name in ((params_a, "params_a"), (params_b, "params_b")):
        spec.group_sizes(tree, name=name)
        check_finite({p: leaf for p, leaf in leaf_table(tree).items() if predicate(p, leaf)}, name)

    ascent = _Ascent(spec, params_a, params_b, predicate)
    chosen = _choose_start(spec, params_a, ascent, start)
    objective = [ascent.objective]
    converged = False
    while not converged and len(objective) <= max_sweeps:
        order = jax.random.permutation(jax.random.fold_in(key, len(objective)), len(spec.groups))
        for group in (spec.groups[i] for i in np.asarray(order)):
            ascent.improve(group)
        objective.append(ascent.objective)
        converged = not ascent.stale
    stats = {"start": chosen, "seconds": time.perf_counter() - began, **ascent.stats}
    return MatchResult(ascent.permutation, np.array(objective), len(objective) - 1, converged, stats)


def _choose_start(spec: PermutationSpec, params_a: Any, ascent: "_Ascent", start: Start | Permutation) -> str:
    """Puts the ascent at its start and says which it was."""
    if isinstance(start, Mapping):
        check_permutation(spec, params_a, start)
        ascent.restart({group: np.asarray(row, np.int32) for group, row in start.items()})
        return "given"
    identity = identity_permutation(spec, params_a)
    ascent.restart(identity)
    if start == "identity":
        return "identity"
    if start != "depth":
        raise ConfigError(f"unknown start {start!r}; known: 'depth', 'identity', or a permutation")
    floor = ascent.objective
    ascent.restart(ascent.depth_pass(identity))
    if ascent.objective >= floor:
        return "depth"
    ascent.restart(identity)
    return "identity"


class _Piece(NamedTuple):
    """The same block of A and of B, with the group of each dimension."""

    a: jax.Array
    b: jax.Array
    labels: tuple[str | None, ...]
    resolution: float  # rounding of an inner product of the two, relative to their norms


class _Ascent:
    """One coordinate ascent: the current permutation, its objective, and what has to be solved."""

    def __init__(self, spec: PermutationSpec, params_a: Any, params_b: Any, predicate: LeafPredicate) -> None:
        a, b = leaf_table(params_a), leaf_table(params_b)
        self.pieces: list[_Piece] = []
        self.constant = 0.0  # the part of the objective in which nothing moves
        for path, axes in spec.leaves:
            if not predicate(path, a[path]):
                continue
            for block in iter_blocks(axes, np.shape(a[path])):
                piece = _piece(a[path], b[path], block)
                if any(piece.labels):
                    self.pieces.append(piece)
                else:
                    self.constant += _inner_product(piece.a, piece.b)
        self.of_group = {g: [p for p in self.pieces if g in p.labels] for g in spec.groups}
        self.neighbours = {
            g: {label for piece in pieces for label in piece.labels if label is not None}
            for g, pieces in self.of_group.items()
        }
        # A gain below the rounding of the similarities it was computed from is not a gain.
        self.resolution = {
            group: sum(piece.resolution for piece in pieces) for group, pieces in self.of_group.items()
        }
        self.stats = {"assignments": 0, "seconds_similarity": 0.0, "seconds_assignment": 0.0}

    def restart(self, permutation: dict[str, np.ndarray]) -> None:
        """Starts from a permutation, with every group to be solved."""
        self.permutation = dict(permutation)
        self.stale = {group for group, pieces in self.of_group.items() if pieces}
        self.objective = self.constant + sum(self._value(piece, self.permutation) for piece in self.pieces)

    def improve(self, group: str) -> None:
        """Solves one group with all others fixed, if any neighbour changed since it was last solved."""
        if group not in self.stale:
            return
        self.stale.discard(group)
        similarity = self._similarity(group, self.of_group[group], self.permutation)
        old, new = self.permutation[group], self._assign(similarity)
        units = np.arange(len(old))
        gain = float((similarity[units, new] - similarity[units, old]).sum())
        twice = [piece for piece in self.of_group[group] if piece.labels.count(group) > 1]
        if twice:
            # Where a leaf carries the group on two axes the objective is quadratic and the assignment solved
            # its linearisation, so the gain is that of the objective itself.
            moved = self.permutation | {group: new}
            once = [piece for piece in self.of_group[group] if piece.labels.count(group) == 1]
            linear = self._similarity(group, once, self.permutation) if once else np.zeros_like(similarity)
            gain = float((linear[units, new] - linear[units, old]).sum())
            gain += sum(self._value(piece, moved) - self._value(piece, self.permutation) for piece in twice)
        if gain > self.resolution[group]:
            self.permutation[group] = new
            self.objective += gain
            self.stale |= self.neighbours[group] - ({group} if not twice else set())

    def depth_pass(self, fallback: Permutation) -> dict[str, np.ndarray]:
        """A permutation found group by group in order of depth, each from what is already known.

        Only those pieces count whose other dimensions stay or belong to groups already assigned; a group
        without any is left as in `fallback`.
        """
        known: dict[str, np.ndarray] = {}
        for group, pieces in self.of_group.items():
            usable = [p for p in pieces if all(g is None or g == group or g in known for g in p.labels)]
            usable = [p for p in usable if p.labels.count(group) == 1]
            if usable:
                known[group] = self._assign(self._similarity(group, usable, known))
            else:
                known[group] = fallback[group]
        return known

    def _similarity(self, group: str, pieces: list[_Piece], permutation: Permutation) -> np.ndarray:
        """Inner products between units of A and of B, float64 [n, n], over all that `group` moves."""
        began = time.perf_counter()
        terms = []
        for piece in pieces:
            rows = tuple(None if label is None else permutation.get(label) for label in piece.labels)
            for dim in (d for d, label in enumerate(piece.labels) if label == group):
                others = tuple(None if d == dim else row for d, row in enumerate(rows))
                terms.append(_gram(piece.a, piece.b, others, dim))
        total = sum(np.asarray(term, np.float64) for term in terms)
        self.stats["seconds_similarity"] += time.perf_counter() - began
        return np.asarray(total)

    def _assign(self, similarity: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        row = maximise_assignment(similarity)
        self.stats["assignments"] += 1
        self.stats["seconds_assignment"] += time.perf_counter() - began
        return row

    def _value(self, piece: _Piece, permutation: Permutation) -> float:
        """⟨A, P[B]⟩ over one piece, in float64."""
        b = np.asarray(piece.b)
        for dim, label in enumerate(piece.labels):
            if label is not None and label in permutation:
                b = np.take(b, permutation[label], axis=dim)
        return _inner_product(piece.a, b)


def _piece(a: Any, b: Any, block: Block) -> _Piece:
    """One block of both networks, in float32 at least."""
    dtype = jnp.promote_types(jnp.result_type(a), jnp.float32)
    a, b = (cut(leaf, block).astype(dtype) for leaf in (a, b))
    norms = math.sqrt(_inner_product(a, a) * _inner_product(b, b))
    return _Piece(a, b, block.labels, float(jnp.finfo(dtype).eps) * norms)


@functools.partial(jax.jit, static_argnums=3)
def _gram(a: jax.Array, b: jax.Array, rows: tuple[jax.Array | None, ...], dim: int) -> jax.Array:
    """⟨A's unit i, B's unit j⟩ along dimension `dim`, with B's other dimensions permuted by `rows`.

    Compiled once for a shape, whichever leaf it comes from.
    """
    for d, row in enumerate(rows):
        if row is not None:
            b = jnp.take(b, row, axis=d)
    others = [d for d in range(a.ndim) if d != dim]
    return jnp.tensordot(a, b, axes=(others, others), precision="highest")


def _inner_product(a: Any, b: Any) -> float:
    # Not `vdot`: BLAS wakes its threads for it, which costs milliseconds for a small leaf on a busy machine.
    return float(np.sum(np.multiply(a, b, dtype=np.float64)))
