"""Aligning several networks: one permutation for each, into a common order of units.

`universe_matching` aligns all networks at once (C2M3), `merge_many` aligns each in turn with the mean of the
others (git-re-basin), and `match_to_reference` aligns each with one of them, by any method. `cycle_error`
measures how far alignments of pairs are from agreeing with each other.

A common order of units is called a *universe* in C2M3. P_i brings network i into that order, and P_i and P_j
together align network j with network i. So alignments through a universe are cycle-consistent by
construction. The published method moves all networks. Here the universe has the units' order of a reference
network. No alignment is lost by that, since permuting all networks alike changes none of their products.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rebasin.arithmetic import average, widen_weights
from rebasin.batches import check_counts
from rebasin.errors import ConfigError, PermutationError
from rebasin.matching.frank_wolfe import FrankWolfeMatching, FrankWolfeStart, joint_ascent, joint_objective
from rebasin.matching.method import Method, build_method, check_networks
from rebasin.matching.registry import as_method
from rebasin.matching.result import same_permutation
from rebasin.matching.weights import weight_matching
from rebasin.permutation import (
    Permutation,
    check_permutation,
    compiled_permute,
    compose,
    fixed_points,
    identity_permutation,
    invert,
    permute,
)
from rebasin.roles import RoleNames
from rebasin.spec import PermutationSpec

__all__ = ["UniverseResult", "cycle_error", "match_to_reference", "merge_many", "universe_matching"]


@dataclasses.dataclass(frozen=True, eq=False)
class UniverseResult:
    """A permutation for each of several networks, and how the method arrived at them.

    Attributes:
      permutations: one permutation for each network; ``permute(spec, permutations[i], trees[i])`` brings
        network i into the common order.
      objective: Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ at the start and after each iteration, float64
        ``[num_iterations + 1]``.
      num_iterations: number of iterations made; each method's documentation says what one iteration is.
      converged: whether the last iteration changed nothing, as opposed to reaching the limit.
      stats: counts, seconds and choices made, for the reader; two results may differ in them and be equal.
    """

    permutations: tuple[dict[str, np.ndarray], ...]
    objective: np.ndarray
    num_iterations: int
    converged: bool
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)

    def align(self, spec: PermutationSpec, trees: Sequence[Any]) -> list[Any]:
        """Bring every network into the common order."""
        return [permute(spec, p, tree) for p, tree in zip(self.permutations, trees, strict=True)]

    def pairwise(self, spec: PermutationSpec, i: int, j: int) -> dict[str, jax.Array]:
        """Return the permutation of network j that aligns it with network i in network i's own order."""
        return compose(spec, self.permutations[j], invert(spec, self.permutations[i]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UniverseResult):
            return NotImplemented
        return (
            len(self.permutations) == len(other.permutations)
            and all(map(same_permutation, self.permutations, other.permutations))
            and np.array_equal(self.objective, other.objective)
            and (self.num_iterations, self.converged) == (other.num_iterations, other.converged)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays


# `stats` is dropped from the pytree: as metadata, the timings of two equal results would give them different
# tree structures.
jax.tree_util.register_dataclass(
    UniverseResult,
    data_fields=["permutations", "objective", "num_iterations", "converged"],
    meta_fields=[],
    drop_fields=["stats"],
)


def universe_matching(
    spec: PermutationSpec,
    trees: Sequence[Any],
    *,
    reference: int = 0,
    start: FrankWolfeStart | Sequence[Permutation] = "barycentre",
    **options: Any,
) -> UniverseResult:
    """Align any number of networks through one universe, all at once, by Frank–Wolfe.

    The objective is Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩ over all weights. As it rises, the sum of the squared
    distances between all pairs of aligned networks falls.

    Args:
      spec: the symmetries of the networks.
      trees: the networks, two or more, of equal leaves, shapes and dtypes.
      reference: index of the network whose order of units the universe has.
      start: ``"barycentre"`` or ``"identity"`` as in `FrankWolfeMatching`; or one permutation for each
        network, of which that of the reference must be the identity.
      **options: the other fields of `FrankWolfeMatching`, which documents them.

    Returns:
      A permutation into the universe for each network, with the history and ``stats`` as in
      `frank_wolfe_matching`.

    Raises:
      ConfigError: there are fewer than two networks, `reference` is none of them, an option has a value that
        cannot work, or `start` holds too few permutations or moves the reference.
      RebasinError: as `frank_wolfe_matching`.
    """
    if len(trees) < 2:
        raise ConfigError(f"a universe needs at least two networks, got {len(trees)}")
    _check_reference(reference, trees)
    order = [reference, *(i for i in range(len(trees)) if i != reference)]
    given = None
    if isinstance(start, str):
        options["start"] = start
    else:
        given = _others(spec, trees, reference, start)
    networks = {f"network {i}": trees[i] for i in order}
    ascent = joint_ascent(spec, networks, build_method(FrankWolfeMatching, options), start=given)
    found = dict(zip(order, ascent.permutations, strict=True))
    return UniverseResult(
        tuple(found[i] for i in range(len(trees))),
        ascent.objective,
        ascent.num_iterations,
        ascent.converged,
        {**ascent.stats, "reference": reference},
    )


def _others(
    spec: PermutationSpec, trees: Sequence[Any], reference: int, start: Sequence[Permutation]
) -> list[Permutation]:
    """Check a start for each network, and return those of all networks but the reference."""
    if len(start) != len(trees):
        raise ConfigError(
            f"start must hold a permutation for each of {len(trees)} networks, got {len(start)}"
        )
    check_permutation(spec, trees[reference], start[reference])
    if not same_permutation(identity_permutation(spec, trees[reference]), start[reference]):
        raise ConfigError(
            f"start: the permutation of the reference, network {reference}, must be the identity"
        )
    return [permutation for i, permutation in enumerate(start) if i != reference]


def merge_many(
    spec: PermutationSpec,
    trees: Sequence[Any],
    *,
    key: jax.Array,
    max_iterations: int = 100,
    roles: RoleNames = None,
) -> UniverseResult:
    """Align networks by matching each with the mean of the others.

    This is MergeMany of git-re-basin (arXiv 2209.04836, appendix). One iteration visits the networks in
    random order. Weight matching, started from the network's last permutation, matches each with the mean of
    the others. That is a coordinate ascent in Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩, which never falls. The ascent
    ends when an iteration changes nothing. Then all networks are permuted alike, which changes no product, so
    that network 0 stays as it is.

    Args:
      spec: the symmetries of the networks.
      trees: the networks, two or more, of equal leaves, shapes and dtypes.
      key: PRNG key for the order of the networks and for weight matching.
      max_iterations: limit on the number of iterations, at least 1.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find; only weights count.

    Returns:
      A permutation for each network, into the order of units of network 0. `rebasin.average` of
      ``result.align(spec, trees)`` is the merged network.

    Raises:
      TreeMismatchError: two networks differ in leaves, shapes or dtypes.
      SpecMismatchError: the networks do not fit the spec.
      NonFiniteError: a weight is NaN or infinite.
      ConfigError: there are fewer than two networks, or `max_iterations` is below 1.
    """
    began = time.perf_counter()
    check_counts(1, max_iterations=max_iterations)
    trees, weights = _check_many(spec, trees, roles)
    permutations = [identity_permutation(spec, trees[0])] * len(trees)
    moved = list(trees)
    objective, converged = [joint_objective(spec, permutations, trees, weights)], False
    while not converged and len(objective) <= max_iterations:
        iteration_key = jax.random.fold_in(key, len(objective))
        converged = True
        for i in map(int, np.asarray(jax.random.permutation(iteration_key, len(trees)))):
            mean = average([tree for j, tree in enumerate(moved) if j != i], roles=roles)
            start = permutations[i] if len(objective) > 1 else "depth"
            match_key = jax.random.fold_in(iteration_key, i)
            match = weight_matching(
                spec, mean, trees[i], key=match_key, start=start, restarts=0, roles=roles or ()
            )
            if not same_permutation(match.permutation, permutations[i]):
                permutations[i], converged = match.permutation, False
                moved[i] = compiled_permute(spec, match.permutation, trees[i])
        objective.append(joint_objective(spec, permutations, trees, weights))
    undo = invert(spec, permutations[0])
    rows = [jax.tree.map(np.asarray, compose(spec, permutation, undo)) for permutation in permutations]
    stats = {"seconds": time.perf_counter() - began}
    return UniverseResult(tuple(rows), np.array(objective), len(objective) - 1, converged, stats)


def match_to_reference(
    spec: PermutationSpec,
    trees: Sequence[Any],
    method: Method | str = "weights",
    *,
    reference: int = 0,
    key: jax.Array | None = None,
    apply_fn: Callable[..., Any] | None = None,
    metrics_fn: Callable[..., Mapping[str, jax.Array]] | None = None,
    data: Any = None,
    roles: RoleNames = None,
) -> UniverseResult:
    """Align every network with one of them, by any method.

    Args:
      spec: the symmetries of the networks.
      trees: the networks, two or more, of equal leaves, shapes and dtypes.
      method: a method that holds its options, or the name of one in `rebasin.METHODS`.
      reference: index of the network that stays.
      key: PRNG key of a method that draws at random; every network is matched with this key.
      apply_fn: as in `Method.match`, for a method that needs it.
      metrics_fn: as in `Method.match`, for a method that needs it.
      data: as in `Method.match`, for a method that needs them.
      roles: as in `merge_many`; weights count in the reported objective.

    Returns:
      A permutation for each network, into the order of units of the reference. `objective` is Σ_{i<j}
      ⟨P_i[θ_i], P_j[θ_j]⟩ before and after, whatever the method's own objective is. `converged` says whether
      every match converged.

    Raises:
      ConfigError: there are fewer than two networks, `reference` is none of them, or an argument that the
        method needs is missing.
      RebasinError: as `merge_many`, and whatever the method raises.
    """
    began = time.perf_counter()
    method = as_method(method)
    trees, weights = _check_many(spec, trees, roles)
    _check_reference(reference, trees)
    identity = identity_permutation(spec, trees[0])
    needed = {"key": key, "apply_fn": apply_fn, "metrics_fn": metrics_fn, "data": data}
    matches = {
        i: method.match(spec, trees[reference], tree, **needed)
        for i, tree in enumerate(trees)
        if i != reference
    }
    permutations = [matches[i].permutation if i in matches else identity for i in range(len(trees))]
    objective = [joint_objective(spec, p, trees, weights) for p in ([identity] * len(trees), permutations)]
    stats = {"reference": reference, "seconds": time.perf_counter() - began}
    converged = all(match.converged for match in matches.values())
    return UniverseResult(tuple(permutations), np.array(objective), 1, converged, stats)


def cycle_error(spec: PermutationSpec, pairwise: Mapping[tuple[int, int], Permutation]) -> float:
    """Measure how far alignments of pairs of networks are from agreeing with each other.

    Aligning network k with j, the result with i, and the result with k again should leave every unit of k in
    place. The error is the fraction of units that it moves, averaged over all triangles of networks in both
    directions. It is 0 for alignments through one universe, and near 1 for alignments that agree only by
    chance.

    Args:
      spec: the symmetries of the networks.
      pairwise: maps ``(i, j)`` to the permutation of network j that aligns it with network i. There must be
        at least three networks, and each pair in at least one direction; the other direction is the inverse.

    Returns:
      A fraction in [0, 1].

    Raises:
      PermutationError: a pair is missing, or there are fewer than three networks.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> stay, swap = {"P0": np.array([0, 1, 2])}, {"P0": np.array([1, 0, 2])}
      >>> round(cycle_error(spec, {(0, 1): stay, (1, 2): stay, (0, 2): swap}), 3)
      0.667
    """
    networks = sorted({i for pair in pairwise for i in pair})
    pairs = itertools.combinations(networks, 2)
    missing = [pair for pair in pairs if pair not in pairwise and pair[::-1] not in pairwise]
    if len(networks) < 3 or missing:
        raise PermutationError(
            f"cycles need all pairs of at least three networks; got networks {networks}, missing {missing}"
        )

    def aligned(i: int, j: int) -> Permutation:
        return pairwise[i, j] if (i, j) in pairwise else invert(spec, pairwise[j, i])

    errors = []
    for i, j, k in itertools.combinations(networks, 3):
        for first, second, last in ((i, j, k), (k, j, i)):
            back = compose(spec, aligned(second, last), aligned(first, second))
            errors.append(1 - fixed_points(compose(spec, back, aligned(last, first))).total)
    return float(np.mean(errors))


def _check_reference(reference: int, trees: Sequence[Any]) -> None:
    if not 0 <= reference < len(trees):
        raise ConfigError(f"reference must be one of the networks 0 to {len(trees) - 1}, got {reference}")


def _check_many(
    spec: PermutationSpec, trees: Sequence[Any], roles: RoleNames
) -> tuple[list[Any], frozenset[str]]:
    """Check the networks; return them with float32 weights at least, and the path names of their weights."""
    if len(trees) < 2:
        raise ConfigError(f"merging needs at least two networks, got {len(trees)}")
    checked = check_networks(spec, {f"network {i}": tree for i, tree in enumerate(trees)}, roles)
    return [widen_weights(tree, checked.weights) for tree in checked.trees], checked.weights
