"""Frank–Wolfe matching: all groups, and all networks, jointly.

The method is that of C2M3 (Crisostomi et al. 2024, arXiv 2405.17897). Every group's permutation is relaxed to
a doubly stochastic matrix (`rebasin.matching.soft`). A step takes the gradient of the objective in all of
them at once, finds the vertex that it points to by one linear assignment for each matrix, and goes towards
that vertex as far as the objective rises. The objective on that segment is a polynomial, so the best step is
found exactly. At the end the matrices are rounded to permutations.

Networks of a set are aligned through a *universe*, one order of units for all of them: P_i brings network i
into that order, and P_i and P_j together align j with i. So alignments are cycle-consistent by construction.
The published method moves all networks; here the universe has the units' order of a reference network, which
loses no alignment, since permuting all networks alike changes none of their products.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import cut, iter_blocks
from rebasin.errors import ConfigError
from rebasin.matching.many import UniverseResult
from rebasin.matching.method import check_at_least, check_networks
from rebasin.matching.result import MatchResult
from rebasin.matching.soft import (
    BlockMove,
    SoftPermutation,
    assign_matrices,
    block_move,
    harden,
    move_block,
    soften,
    uniform_soft,
)
from rebasin.permutation import Permutation, check_permutation, compiled_permute, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, is_weight, leaf_table

__all__ = ["Relaxation", "Start", "frank_wolfe_matching", "joint_objective", "universe_matching"]


_Softs = tuple[SoftPermutation, ...]  # of all networks but the first


class Relaxation:
    """The objective on soft permutations: its gradient, and itself along a segment.

    Attributes:
      degree: of the polynomial along a segment.
      scale: Σ_{i<j} ‖θ_i‖ ‖θ_j‖ over all weights, a bound on the objective.
    """

    def __init__(self, spec: PermutationSpec, trees: Sequence[Any], predicate: LeafPredicate) -> None:
        tables = [leaf_table(tree) for tree in trees]
        moves, arrays = [], []
        norms = np.zeros(len(trees))
        self.constant = 0.0  # what the leaves that never move add
        for path, axes in spec.leaves:
            if not predicate(path, tables[0][path]):
                continue
            leaves = [jnp.asarray(table[path]) for table in tables]
            norms += [_square(leaf) for leaf in leaves]
            for block in iter_blocks(axes, leaves[0].shape):
                move = block_move(spec, block.labels)
                pieces = tuple(cut(leaf, block) for leaf in leaves)
                if move.groups:
                    moves.append(move)
                    arrays.append(pieces)
                else:
                    self.constant += _pair_sum(pieces)
        self._moves, self._arrays = tuple(moves), tuple(arrays)
        roots = np.sqrt(norms)
        self.scale = float((roots.sum() ** 2 - norms.sum()) / 2)
        self.degree = (1 if len(trees) == 2 else 2) * max((len(move.groups) for move in moves), default=0)

    def gradient(self, softs: _Softs) -> list[dict[str, np.ndarray]]:
        """∂f/∂M of every network that moves, float64 from float32 products at highest precision."""
        gradients = _gradient(self._moves, _as(softs, np.float32), self._arrays)
        return [{g: np.asarray(x, np.float64) for g, x in one.items()} for one in jax.device_get(gradients)]

    def along(self, softs: _Softs, ends: _Softs) -> np.polynomial.Polynomial:
        """The polynomial t ↦ f(M + t(E − M)) on [0, 1], exact up to rounding in float64.

        A polynomial of degree d through its values at d + 1 Chebyshev–Lobatto points, both ends of the
        segment among them.
        """
        points = (1 - np.cos(np.pi * np.arange(self.degree + 1) / max(self.degree, 1))) / 2
        with jax.enable_x64(True):
            values = _values(self._moves, _as(softs, np.float64), _as(ends, np.float64), self._arrays, points)
            values = np.asarray(values) + self.constant
        return np.polynomial.Polynomial.fit(points, values, self.degree, domain=[0, 1])


def joint_objective(
    spec: PermutationSpec,
    permutations: Sequence[Permutation],
    trees: Sequence[Any],
    predicate: LeafPredicate,
) -> float:
    """Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ over all weights, in float64."""
    moved = [
        leaf_table(compiled_permute(spec, permutation, tree))
        for permutation, tree in zip(permutations, trees, strict=True)
    ]
    return sum(
        _pair_sum([table[path] for table in moved])
        for path, _ in spec.leaves
        if predicate(path, moved[0][path])
    )


def _pair_sum(arrays: Sequence[Any]) -> float:
    """Σ_{i<j} ⟨x_i, x_j⟩ in float64, pair by pair: a difference of squares would lose digits."""
    total, before = 0.0, np.asarray(arrays[0], np.float64)
    for array in arrays[1:]:
        array = np.asarray(array, np.float64)
        # Not `vdot`: BLAS wakes its threads for it, which costs milliseconds for a small leaf.
        total += float(np.sum(before * array))
        before = before + array
    return total


def _square(leaf: Any) -> float:
    return float(np.sum(np.square(np.asarray(leaf, np.float64))))


def _as(softs: _Softs, dtype: Any) -> _Softs:
    return tuple({group: np.asarray(m, dtype) for group, m in soft.items()} for soft in softs)


def _objective(
    moves: tuple[BlockMove, ...], softs: _Softs, arrays: tuple[tuple[jax.Array, ...], ...]
) -> jax.Array:
    total = jnp.zeros((), jax.tree.leaves(softs)[0].dtype)
    for move, (anchor, *pieces) in zip(moves, arrays, strict=True):
        before = anchor.astype(total.dtype)
        for piece, soft in zip(pieces, softs, strict=True):
            moved = move_block(move, soft, piece)
            total += jnp.vdot(before, moved, precision="highest")
            before = before + moved
    return total


_gradient = functools.partial(jax.jit, static_argnums=0)(jax.grad(_objective, argnums=1))


@functools.partial(jax.jit, static_argnums=0)
def _values(
    moves: tuple[BlockMove, ...],
    softs: _Softs,
    ends: _Softs,
    arrays: tuple[tuple[jax.Array, ...], ...],
    points: jax.Array,
) -> jax.Array:
    def at(t: jax.Array) -> jax.Array:
        return _objective(moves, jax.tree.map(lambda m, e: m + t * (e - m), softs, ends), arrays)

    return jax.lax.map(at, points)


Start = Literal["barycentre", "identity"]


def frank_wolfe_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    start: Start | Permutation = "barycentre",
    max_iterations: int = 100,
    tolerance: float = 1e-6,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """Finds a permutation of B that brings it close to A, moving all groups at once.

    The objective is that of `weight_matching`, ⟨A, P[B]⟩ over all weights. Nothing is drawn at random; from
    the barycentre of all permutations, the result does not depend on the order of B's units, but for ties.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      start: ``"barycentre"`` (every matrix 1/n; the result is at least as good as the identity),
        ``"identity"`` (the published start) or a permutation.
      max_iterations: limit on steps, at least 1.
      tolerance: the ascent ends where the Frank–Wolfe gap, or the gain of a step, is at most this share of
        ‖A‖‖B‖.
      predicate: ``(path, leaf) -> bool``, the leaves that count.

    Returns:
      The match. ``objective`` is that of the best permutation so far: the start, vertices that a step pointed
      to, and the rounded end. ``stats`` has the relaxed objective of every step (``relaxed``), the last gap
      (``gap``, in units of the objective), ``steps`` (how far each went), ``start`` and ``seconds``.

    Raises:
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      NonFiniteError: a weight is NaN or infinite.
      PermutationError: `start` is a permutation that does not fit.
      ConfigError: an option has a value that cannot work.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, 3.0]]), "v": np.array([[1.0], [0.0], [2.0]])}
      >>> b = {"w": np.array([[3.0, 1.0, 2.0]]), "v": np.array([[2.0], [1.0], [0.0]])}
      >>> frank_wolfe_matching(spec, a, b).permutation["P0"].tolist()
      [1, 2, 0]
    """
    trees = {"params_a": params_a, "params_b": params_b}
    given = [start] if isinstance(start, Mapping) else start
    ascent = _ascend(spec, trees, given, max_iterations, tolerance, predicate)
    return MatchResult(
        ascent.permutations[1], ascent.objective, ascent.num_iterations, ascent.converged, ascent.stats
    )


def universe_matching(
    spec: PermutationSpec,
    trees: Sequence[Any],
    *,
    reference: int = 0,
    start: Start | Sequence[Permutation] = "barycentre",
    max_iterations: int = 100,
    tolerance: float = 1e-6,
    predicate: LeafPredicate = is_weight,
) -> UniverseResult:
    """Aligns any number of networks through one universe.

    The objective is Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ over all weights; the distances between all pairs of aligned
    networks fall as it rises.

    Args:
      spec: the symmetries.
      trees: the networks, two or more, of equal leaves, shapes and dtypes.
      reference: the network whose order of units the universe has.
      start: as in `frank_wolfe_matching`; a sequence holds one permutation for each network, of which that of
        the reference must be the identity.
      max_iterations: limit on steps, at least 1.
      tolerance: as in `frank_wolfe_matching`, in units of Σ_{i<j} ‖θ_i‖‖θ_j‖.
      predicate: ``(path, leaf) -> bool``, the leaves that count.

    Returns:
      A permutation into the universe for each network, with the history as in `frank_wolfe_matching`.

    Raises:
      RebasinError: as `frank_wolfe_matching`.
    """
    if len(trees) < 2:
        raise ConfigError(f"a universe needs at least two networks, got {len(trees)}")
    if not 0 <= reference < len(trees):
        raise ConfigError(f"reference must be one of the networks 0 to {len(trees) - 1}, got {reference}")
    order = [reference, *(i for i in range(len(trees)) if i != reference)]
    if not isinstance(start, str):
        if len(start) != len(trees):
            raise ConfigError(
                f"start must hold a permutation for each of {len(trees)} networks, got {len(start)}"
            )
        identity = identity_permutation(spec, trees[reference])
        check_permutation(spec, trees[reference], start[reference])
        if any(not np.array_equal(row, start[reference][group]) for group, row in identity.items()):
            raise ConfigError(
                f"start: the permutation of the reference, network {reference}, must be the identity"
            )
        start = [start[i] for i in order[1:]]
    named = {f"network {i}": trees[i] for i in order}
    ascent = _ascend(spec, named, start, max_iterations, tolerance, predicate)
    permutations = [dict[str, np.ndarray]()] * len(trees)
    for i, permutation in zip(order, ascent.permutations, strict=True):
        permutations[i] = permutation
    stats = {**ascent.stats, "reference": reference}
    return UniverseResult(
        tuple(permutations), ascent.objective, ascent.num_iterations, ascent.converged, stats
    )


def _ascend(
    spec: PermutationSpec,
    trees: Mapping[str, Any],
    start: str | Sequence[Permutation],
    max_iterations: int,
    tolerance: float,
    predicate: LeafPredicate,
) -> UniverseResult:
    """Frank–Wolfe over all networks but the first."""
    began = time.perf_counter()
    check_at_least(1, max_iterations=max_iterations)
    check_at_least(0, tolerance=tolerance)
    check_networks(spec, trees, predicate)
    networks = list(trees.values())
    softs, permutations = _start(spec, networks, start)
    identity = identity_permutation(spec, networks[0])

    def value(permutations: Sequence[Permutation]) -> float:
        return joint_objective(spec, [identity, *permutations], networks, predicate)

    relaxation = Relaxation(spec, networks, predicate)
    small = tolerance * relaxation.scale
    best = value(permutations)
    objective, relaxed, steps = [best], [], []
    gap, converged = 0.0, relaxation.degree == 0
    while not converged and len(objective) <= max_iterations:
        ends, gap, along = _segment(relaxation, softs)
        step = _best_step(along)
        here, reached = float(along(0.0)), float(along(step))
        if float(along(1.0)) > best:
            best, permutations = _better(best, permutations, [harden(spec, end) for end in ends], value)
        objective.append(best)
        relaxed = relaxed or [here]
        converged = gap <= small or reached - here <= small
        if not converged:
            softs = [_towards(soft, end, step) for soft, end in zip(softs, ends, strict=True)]
            relaxed.append(reached)
            steps.append(step)
    if len(objective) > 1:
        objective[-1], permutations = _better(best, permutations, [harden(spec, s) for s in softs], value)
    stats = {
        "start": start if isinstance(start, str) else "given",
        "relaxed": np.array(relaxed),
        "steps": np.array(steps),
        "gap": gap,
        "seconds": time.perf_counter() - began,
    }
    result = (identity, *permutations)
    return UniverseResult(result, np.array(objective), len(objective) - 1, converged, stats)


def _segment(
    relaxation: Relaxation, softs: Sequence[SoftPermutation]
) -> tuple[list[dict[str, np.ndarray]], float, np.polynomial.Polynomial]:
    """Vertices that the gradient points to, the gap ⟨gradient, vertex − here⟩, the objective in between."""
    gradients = relaxation.gradient(tuple(softs))
    ends = [
        {group: assign_matrices(matrices, soft[group]) for group, matrices in gradient.items()}
        for gradient, soft in zip(gradients, softs, strict=True)
    ]
    gap = sum(
        float(np.sum(matrices * (end[group] - soft[group])))
        for gradient, soft, end in zip(gradients, softs, ends, strict=True)
        for group, matrices in gradient.items()
    )
    return ends, gap, relaxation.along(tuple(softs), tuple(ends))


def _start(
    spec: PermutationSpec, networks: Sequence[Any], start: str | Sequence[Permutation]
) -> tuple[list[SoftPermutation], list[dict[str, np.ndarray]]]:
    """Matrices to start from, and permutations that the result must not fall below."""
    first, *rest = networks
    if not isinstance(start, str):
        for permutation in start:
            check_permutation(spec, first, permutation)
        rows = [{g: np.asarray(row, np.int32) for g, row in p.items()} for p in start]
        return [soften(spec, permutation, first) for permutation in rows], rows
    identity = identity_permutation(spec, first)
    if start == "barycentre":
        return [uniform_soft(spec, first) for _ in rest], [identity for _ in rest]
    if start == "identity":
        return [soften(spec, identity, first) for _ in rest], [identity for _ in rest]
    raise ConfigError(f"unknown start {start!r}; known: 'barycentre', 'identity', or permutations")


def _towards(soft: SoftPermutation, end: SoftPermutation, step: float) -> dict[str, np.ndarray]:
    return {group: soft[group] + step * (end[group] - soft[group]) for group in soft}


def _best_step(along: np.polynomial.Polynomial) -> float:
    """Where a polynomial is largest on [0, 1]; the smallest such point on a tie."""
    roots = along.deriv().roots() if along.degree() > 0 else np.zeros(0)
    # A double root comes out of the companion matrix as a pair with a small imaginary part.
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-6 and 0 < r.real < 1]
    return max(sorted([0.0, *inside, 1.0]), key=lambda t: float(along(t)))


def _better(
    best: float, permutations: list[Any], candidate: list[Any], value: Any
) -> tuple[float, list[Any]]:
    reached = value(candidate)
    return (reached, candidate) if reached > best else (best, permutations)
