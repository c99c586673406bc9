"""Frank–Wolfe matching: all groups, and all networks of a set, are aligned at once.

The method is that of C2M3 (Crisostomi et al. 2024, arXiv 2405.17897). Every group's permutation is relaxed to
a doubly stochastic matrix (`rebasin.matching.soft`). For networks θ_0, …, θ_{k−1}, of which θ_0 stays, the
relaxed objective is

    f(M) = Σ_{i<j} ⟨M_i[θ_i], M_j[θ_j]⟩ over all weights, with M_0 the identity.

One iteration takes the gradient of f in all matrices at once, finds the vertex that it points to by one
linear assignment for each matrix, and moves towards that vertex as far as the objective rises. Between the
matrices and the vertex, f is a polynomial in the step size. Its degree is at most the number of matrices that
meet in one block of a leaf, and twice that for products of two networks that both move. So the best step is
found exactly. At the end the matrices are rounded to permutations.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.arithmetic import widen_weights
from rebasin.axis import cut, iter_blocks
from rebasin.batches import check_counts
from rebasin.matching.method import Method, build_method, check_at_least, check_networks, check_start
from rebasin.matching.progress import ProgressFn, Reporter
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
from rebasin.roles import weight_leaves
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, real_parts

__all__ = [
    "FrankWolfeMatching",
    "FrankWolfeStart",
    "JointAscent",
    "Relaxation",
    "best_step",
    "frank_wolfe_matching",
    "joint_ascent",
    "joint_objective",
]

FrankWolfeStart: TypeAlias = Literal["barycentre", "identity"]

_Softs: TypeAlias = tuple[SoftPermutation, ...]  # one for each network but the first


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FrankWolfeMatching(Method):
    """Frank–Wolfe matching with its options.

    The objective is that of `weight_matching`, ⟨A, P[B]⟩ over all weights. Nothing is drawn at random. From
    the barycentre of all permutations, the aligned network does not depend on the order of B's units, except
    for ties.

    A value whose `start` is a permutation can be neither hashed nor compared, since it holds arrays.

    Attributes:
      start: ``"barycentre"`` (every entry of every matrix is 1/n; the result is at least as good as the
        identity), ``"identity"`` (the published start), or a permutation.
      max_iterations: limit on the number of iterations, at least 1.
      tolerance: the ascent ends when the Frank–Wolfe gap, or the gain of an iteration, is at most this
        fraction of ‖A‖‖B‖ (of Σ_{i<j} ‖θ_i‖‖θ_j‖ for several networks).
      roles: as in `Method`; only weights count.

    Raises:
      ConfigError: an option has a value that cannot work.
    """

    name = "frank_wolfe"
    objective = "⟨A, P[B]⟩"

    start: FrankWolfeStart | Permutation = "barycentre"
    max_iterations: int = 100
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.start, get_args(FrankWolfeStart))
        check_counts(1, max_iterations=self.max_iterations)
        check_at_least(0, tolerance=self.tolerance)

    def _match(self, spec: PermutationSpec, params_a: Any, params_b: Any, report: Reporter) -> MatchResult:
        ascent = joint_ascent(spec, {"params_a": params_a, "params_b": params_b}, self, report=report)
        return MatchResult(
            ascent.permutations[1], ascent.objective, ascent.num_iterations, ascent.converged, ascent.stats
        )


def frank_wolfe_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find a permutation of B that brings it close to A, with all groups moving at once.

    Args:
      spec: the symmetries of the networks.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      progress: called after each iteration and at the end, as in `Method.match`.
      **options: fields of `FrankWolfeMatching`, which documents them.

    Returns:
      The match. ``objective`` is the best so far of the permutations reached: the start, each vertex that the
      gradient pointed to, and the rounded end. ``stats`` holds the relaxed objective at the start and after
      each iteration (``relaxed``), the last Frank–Wolfe gap (``gap``, in units of the objective), the step
      sizes (``steps``), ``start`` and ``seconds``.

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
    return build_method(FrankWolfeMatching, options).match(spec, params_a, params_b, progress=progress)


class JointAscent(NamedTuple):
    """Permutations of several networks that Frank–Wolfe found, in the order of the networks.

    Attributes:
      permutations: one permutation for each network; that of the first network is the identity.
      objective: Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩, the best so far at the start and after each iteration, float64
        ``[num_iterations + 1]``.
      converged: whether the ascent ended before the limit on iterations.
      stats: as `frank_wolfe_matching` returns it.
    """

    permutations: tuple[dict[str, np.ndarray], ...]
    objective: np.ndarray
    converged: bool
    stats: dict[str, Any]

    @property
    def num_iterations(self) -> int:
        """Number of iterations made."""
        return len(self.objective) - 1


def joint_ascent(
    spec: PermutationSpec,
    networks: Mapping[str, Any],
    options: FrankWolfeMatching,
    *,
    start: Sequence[Permutation] | None = None,
    report: Reporter | None = None,
) -> JointAscent:
    """Maximise Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ over the permutations of all networks but the first.

    Args:
      spec: the symmetries of the networks.
      networks: the tree of each network, by the name that messages call it.
      options: the start, the limits and the leaves that count.
      start: a permutation to start from for each network but the first, in place of that in `options`.
      report: told of every iteration.

    Raises:
      RebasinError: as `frank_wolfe_matching`.
    """
    began = time.perf_counter()
    checked = check_networks(spec, networks, options.roles)
    weights = checked.weights
    trees = [widen_weights(tree, weights) for tree in checked.trees]
    if start is None and isinstance(options.start, Mapping):
        start = [options.start for _ in trees[1:]]
    softs, permutations = _starting_point(spec, trees, options.start, start)
    identity = identity_permutation(spec, trees[0])

    def value(permutations: Sequence[Permutation]) -> float:
        return joint_objective(spec, [identity, *permutations], trees, weights)

    relaxation = Relaxation(spec, trees, weights)
    report = report or Reporter(options.name)
    found = _ascend(spec, relaxation, softs, permutations, value, options, report)
    stats = {
        **found.stats,
        "start": "given" if start is not None else options.start,
        "seconds": time.perf_counter() - began,
    }
    return JointAscent((identity, *found.permutations), found.objective, found.converged, stats)


def _ascend(
    spec: PermutationSpec,
    relaxation: "Relaxation",
    softs: list[SoftPermutation],
    permutations: list[dict[str, np.ndarray]],
    value: Callable[[Sequence[Permutation]], float],
    options: FrankWolfeMatching,
    report: Reporter,
) -> JointAscent:
    """Iterate from given matrices, and return the best permutations of the networks that move.

    Args:
      spec: the symmetries of the networks.
      relaxation: the relaxed objective.
      softs: the matrices to start from, for each network that moves.
      permutations: the permutations that the result must not fall below.
      value: the objective of permutations.
      options: the limits.
      report: told of every iteration.
    """
    small = options.tolerance * relaxation.scale
    best = value(permutations)
    objective, relaxed, steps = [best], [], []
    gap, converged = 0.0, relaxation.degree == 0
    while not converged and len(objective) <= options.max_iterations:
        ends, gap = _vertices(relaxation, softs)
        along = relaxation.along(tuple(softs), tuple(ends))
        step = best_step(along)
        here, reached = float(along(0.0)), float(along(step))
        if float(along(1.0)) > best:
            best, permutations = _better(best, permutations, [harden(spec, end) for end in ends], value)
        objective.append(best)
        report("ascent", len(objective) - 1, options.max_iterations, best)
        relaxed = relaxed or [here]
        converged = gap <= small or reached - here <= small
        if not converged:
            softs = [_towards(soft, end, step) for soft, end in zip(softs, ends, strict=True)]
            relaxed.append(reached)
            steps.append(step)
    if len(objective) > 1:
        objective[-1], permutations = _better(best, permutations, [harden(spec, s) for s in softs], value)
    stats = {"relaxed": np.array(relaxed), "steps": np.array(steps), "gap": gap}
    return JointAscent(tuple(permutations), np.array(objective), converged, stats)


def _starting_point(
    spec: PermutationSpec, trees: Sequence[Any], name: Any, given: Sequence[Permutation] | None
) -> tuple[list[SoftPermutation], list[dict[str, np.ndarray]]]:
    """Return the matrices to start from, and the permutations that the result must not fall below."""
    first, *rest = trees
    if given is not None:
        for permutation in given:
            check_permutation(spec, first, permutation)
        rows = [{g: np.asarray(row, np.int32) for g, row in p.items()} for p in given]
        return [soften(spec, permutation, first) for permutation in rows], rows
    identity = identity_permutation(spec, first)
    soft = uniform_soft(spec, first) if name == "barycentre" else soften(spec, identity, first)
    return [soft for _ in rest], [identity for _ in rest]


def _vertices(
    relaxation: "Relaxation", softs: Sequence[SoftPermutation]
) -> tuple[list[dict[str, np.ndarray]], float]:
    """Return the vertices that the gradient points to, and the gap ⟨gradient, vertices − matrices⟩."""
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
    return ends, gap


def _towards(soft: SoftPermutation, end: SoftPermutation, step: float) -> dict[str, np.ndarray]:
    return {group: soft[group] + step * (end[group] - soft[group]) for group in soft}


def _better(
    best: float,
    permutations: list[Any],
    candidate: list[Any],
    value: Callable[[Sequence[Permutation]], float],
) -> tuple[float, list[Any]]:
    """Return the better of the best permutations so far and a candidate, with its objective."""
    reached = value(candidate)
    return (reached, candidate) if reached > best else (best, permutations)


def best_step(along: np.polynomial.Polynomial) -> float:
    """Return the step in [0, 1] at which a polynomial is largest, the smallest such step on a tie.

    Examples:
      >>> round(best_step(np.polynomial.Polynomial([0, 1, -1], domain=[0, 1], window=[0, 1])), 6)
      0.5
    """
    roots = along.deriv().roots() if along.degree() > 0 else np.zeros(0)
    # A double root comes out of the companion matrix as a pair with a small imaginary part.
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-6 and 0 < r.real < 1]
    return max(sorted([0.0, *inside, 1.0]), key=lambda t: float(along(t)))


class Relaxation:
    """The objective on soft permutations: its gradient, and its values between two soft permutations.

    Attributes:
      constant: the part of the objective that comes from blocks of leaves that never move.
      degree: degree of the polynomial that `along` returns.
      scale: Σ_{i<j} ‖θ_i‖ ‖θ_j‖ over all weights, an upper bound of the objective.
    """

    def __init__(self, spec: PermutationSpec, trees: Sequence[Any], weights: Collection[str]) -> None:
        tables = [leaf_table(tree) for tree in trees]
        moves, arrays = [], []
        norms = np.zeros(len(trees))
        self.constant = 0.0
        for path, axes in spec.leaves:
            if path not in weights:
                continue
            leaves = [jnp.asarray(table[path]) for table in tables]
            norms += [float(np.sum(np.square(_on_host(leaf)))) for leaf in leaves]
            for block in iter_blocks(axes, leaves[0].shape):
                pieces = tuple(real_parts(cut(leaf, block)) for leaf in leaves)
                move = block_move(spec, (*block.labels, *[None] * (pieces[0].ndim - len(block.shape))))
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
        """Compute ∂f/∂M for every network that moves.

        The products are float32 at the highest precision; the result is float64.
        """
        gradients = _gradient(self._moves, _as_dtype(softs, np.float32), self._arrays)
        return [{g: np.asarray(x, np.float64) for g, x in one.items()} for one in jax.device_get(gradients)]

    def along(self, softs: _Softs, ends: _Softs) -> np.polynomial.Polynomial:
        """Return the polynomial t ↦ f(M + t(E − M)) on [0, 1], exact up to rounding in float64.

        A polynomial of degree d is determined by its values at d + 1 points. These are the Chebyshev–Lobatto
        points, which include 0 and 1.

        Args:
          softs: the matrices M, for each network that moves.
          ends: the matrices E, for each network that moves.
        """
        points = (1 - np.cos(np.pi * np.arange(self.degree + 1) / max(self.degree, 1))) / 2
        wide_softs, wide_ends = _as_dtype(softs, np.float64), _as_dtype(ends, np.float64)
        with jax.enable_x64(True):
            values = np.asarray(_values(self._moves, wide_softs, wide_ends, self._arrays, points))
        return np.polynomial.Polynomial.fit(points, values + self.constant, self.degree, domain=[0, 1])


def joint_objective(
    spec: PermutationSpec,
    permutations: Sequence[Permutation],
    trees: Sequence[Any],
    weights: Collection[str] | None = None,
) -> float:
    """Compute Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ over the leaves that count, in float64.

    Args:
      spec: the symmetries of the networks.
      permutations: one permutation for each network.
      trees: the tree of each network.
      weights: path names of the leaves that count; by default the weights of the first network.
    """
    counted = weight_leaves(trees[0]) if weights is None else weights
    moved = [
        leaf_table(compiled_permute(spec, permutation, tree))
        for permutation, tree in zip(permutations, trees, strict=True)
    ]
    return sum(_pair_sum([table[path] for table in moved]) for path, _ in spec.leaves if path in counted)


def _pair_sum(arrays: Sequence[Any]) -> float:
    """Compute Σ_{i<j} Re⟨x_i, x_j⟩ in float64.

    The sum is taken pair by pair: half of the difference of ‖Σ x_i‖² and Σ ‖x_i‖² would lose digits.
    """
    total, before = 0.0, _on_host(arrays[0])
    for array in map(_on_host, arrays[1:]):
        # Not `vdot`: BLAS wakes its threads for it, which costs milliseconds for a small leaf.
        total += float(np.sum(before * array))
        before = before + array
    return total


def _on_host(array: Any) -> np.ndarray:
    """Return an array in float64, a complex one as its real and imaginary parts."""
    return np.asarray(real_parts(np.asarray(array)), np.float64)


def _as_dtype(softs: _Softs, dtype: Any) -> _Softs:
    return tuple({group: np.asarray(m, dtype) for group, m in soft.items()} for soft in softs)


def _relaxed_objective(
    moves: tuple[BlockMove, ...], softs: _Softs, arrays: tuple[tuple[jax.Array, ...], ...]
) -> jax.Array:
    """Compute f without its constant part, in the dtype of the matrices."""
    total = jnp.zeros((), jax.tree.leaves(softs)[0].dtype)
    for move, (anchor, *pieces) in zip(moves, arrays, strict=True):
        before = anchor.astype(total.dtype)
        for piece, soft in zip(pieces, softs, strict=True):
            moved = move_block(move, soft, piece)
            total += jnp.vdot(before, moved, precision="highest")
            before = before + moved
    return total


_gradient = functools.partial(jax.jit, static_argnums=0)(jax.grad(_relaxed_objective, argnums=1))


@functools.partial(jax.jit, static_argnums=0)
def _values(
    moves: tuple[BlockMove, ...],
    softs: _Softs,
    ends: _Softs,
    arrays: tuple[tuple[jax.Array, ...], ...],
    points: jax.Array,
) -> jax.Array:
    """Compute f without its constant part at each of `points` between two sets of matrices."""

    def at(t: jax.Array) -> jax.Array:
        return _relaxed_objective(moves, jax.tree.map(lambda m, e: m + t * (e - m), softs, ends), arrays)

    return jax.lax.map(at, points)
