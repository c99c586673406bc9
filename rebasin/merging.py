"""Many networks into one: into a common order of units, averaged, and measured on the simplex between them.

`merge_many` and `match_to_reference` give a permutation for each network, as `universe_matching` does (C2M3);
`average` makes one network of the networks so aligned. `rebasin.landscape` measures all their averages.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError, PermutationError
from rebasin.matching.frank_wolfe import joint_objective
from rebasin.matching.many import UniverseResult
from rebasin.matching.method import check_at_least, check_networks
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, compose, fixed_points, identity_permutation, invert, permute
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, check_same_shapes, is_weight, map_leaves

__all__ = [
    "average",
    "cycle_error",
    "match_to_reference",
    "merge_many",
    "mix",
]


def merge_many(
    spec: PermutationSpec,
    trees: Sequence[Any],
    *,
    key: jax.Array,
    max_iterations: int = 100,
    predicate: LeafPredicate = is_weight,
) -> UniverseResult:
    """Aligns networks by matching each with the mean of the others.

    This is MergeMany of git-re-basin (arXiv 2209.04836, appendix). A sweep visits the networks in random
    order and gives each the permutation that weight matching, from its last one, finds between the mean of
    the others and it. That is a coordinate ascent in Σ_{i<j} ⟨P_i[θ_i], P_j[θ_j]⟩, which never falls. It ends
    when a sweep changes nothing. In the end all are permuted alike, which changes no product, so that network
    0 stays as it is.

    Args:
      spec: the symmetries.
      trees: the networks, two or more, of equal leaves, shapes and dtypes.
      key: PRNG key for the order of networks and for weight matching.
      max_iterations: limit on sweeps, at least 1.
      predicate: ``(path, leaf) -> bool``, the leaves that count.

    Returns:
      A permutation for each network, into the order of units of network 0. `average` of
      ``result.align(spec, trees)`` is the merged network.

    Raises:
      TreeMismatchError: two networks differ in leaves, shapes or dtypes.
      SpecMismatchError: they do not fit the spec.
      NonFiniteError: a weight is NaN or infinite.
      ConfigError: fewer than two networks, or no sweeps.
    """
    began = time.perf_counter()
    check_at_least(1, max_iterations=max_iterations)
    _check_many(spec, trees, predicate)
    permutations = [identity_permutation(spec, trees[0])] * len(trees)
    moved = list(trees)

    def value() -> float:
        return joint_objective(spec, permutations, trees, predicate)

    objective, converged = [value()], False
    while not converged and len(objective) <= max_iterations:
        sweep_key = jax.random.fold_in(key, len(objective))
        converged = True
        for i in map(int, np.asarray(jax.random.permutation(sweep_key, len(trees)))):
            mean = average([tree for j, tree in enumerate(moved) if j != i], predicate=predicate)
            start = permutations[i] if len(objective) > 1 else "depth"
            match_key = jax.random.fold_in(sweep_key, i)
            match = weight_matching(
                spec, mean, trees[i], key=match_key, start=start, restarts=0, predicate=predicate
            )
            if fixed_points(match.permutation, permutations[i]).total < 1:
                permutations[i], converged = match.permutation, False
                moved[i] = permute(spec, match.permutation, trees[i])
        objective.append(value())
    undo = invert(spec, permutations[0])
    rows = [jax.tree.map(np.asarray, compose(spec, permutation, undo)) for permutation in permutations]
    stats = {"seconds": time.perf_counter() - began}
    return UniverseResult(tuple(rows), np.array(objective), len(objective) - 1, converged, stats)


def match_to_reference(
    spec: PermutationSpec,
    trees: Sequence[Any],
    matcher: Callable[[PermutationSpec, Any, Any], MatchResult],
    *,
    reference: int = 0,
    predicate: LeafPredicate = is_weight,
) -> UniverseResult:
    """Aligns every network with one of them, by any method.

    Args:
      spec: the symmetries.
      trees: the networks, two or more, of equal leaves, shapes and dtypes.
      matcher: ``(spec, params_a, params_b) -> MatchResult``, for example
        ``functools.partial(weight_matching, key=key)``.
      reference: the network that stays.
      predicate: ``(path, leaf) -> bool``, the leaves that count in the objective reported.

    Returns:
      A permutation for each network, into the order of units of the reference. `objective` is Σ_{i<j}
      ⟨P_i[θ_i], P_j[θ_j]⟩ before and after, whatever the matcher's own.

    Raises:
      RebasinError: as `merge_many`, and what `matcher` raises.
    """
    began = time.perf_counter()
    _check_many(spec, trees, predicate)
    if not 0 <= reference < len(trees):
        raise ConfigError(f"reference must be one of the networks 0 to {len(trees) - 1}, got {reference}")
    identity = identity_permutation(spec, trees[0])
    matches = [
        None if i == reference else matcher(spec, trees[reference], tree) for i, tree in enumerate(trees)
    ]
    permutations = tuple(identity if m is None else m.permutation for m in matches)
    objective = [joint_objective(spec, p, trees, predicate) for p in ([identity] * len(trees), permutations)]
    stats = {"reference": reference, "seconds": time.perf_counter() - began}
    converged = all(m is None or m.converged for m in matches)
    return UniverseResult(permutations, np.array(objective), 1, converged, stats)


def cycle_error(spec: PermutationSpec, pairwise: Mapping[tuple[int, int], Permutation]) -> float:
    """How far alignments between pairs of networks are from agreeing with each other.

    For networks i, j, k, aligning k with j, that with i, and the result with k again should leave every unit
    of k where it was. The error is the share of units that it moves, the mean over all cycles of three
    networks in both directions. It is 0 for alignments through one universe, and near 1 where agreement is a
    matter of chance.

    Args:
      spec: the symmetries.
      pairwise: ``(i, j)`` to the permutation of network j that aligns it with network i, for all pairs of
        three networks or more in at least one direction; the other is then its inverse.

    Returns:
      A share in [0, 1].

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


def average(
    trees: Sequence[Any],
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    predicate: LeafPredicate = is_weight,
) -> Any:
    """The average of networks, which should be aligned.

    Leaves that `predicate` leaves out (counters, running statistics) are not averaged: they are those of the
    network with the largest weight, the first of several. With two networks and weights α and 1 − α it is
    `rebasin.interpolate`.

    Args:
      trees: networks of equal leaves, shapes and dtypes, at least one.
      weights: one for each network, not negative; they are divided by their sum. By default all are equal.
      predicate: ``(path, leaf) -> bool``, the leaves to average.

    Returns:
      A tree like the first.

    Raises:
      TreeMismatchError: two networks differ in leaves, shapes or dtypes.
      ConfigError: no networks, or weights of another number, negative, not finite or all zero.

    Examples:
      >>> average([{"w": jnp.array(1.0)}, {"w": jnp.array(5.0)}], [3, 1])["w"].tolist()
      2.0
    """
    if not trees:
        raise ConfigError("an average needs at least one network, got none")
    for i, tree in enumerate(trees[1:], 1):
        check_same_shapes(trees[0], tree, names=("network 0", f"network {i}"))
    values = np.ones(len(trees)) if weights is None else np.asarray(weights, np.float64)
    if (
        values.shape != (len(trees),)
        or not np.isfinite(values).all()
        or (values < 0).any()
        or not values.any()
    ):
        raise ConfigError(
            f"weights must be {len(trees)} numbers, one for each network, none negative and not all zero; "
            f"got {values.tolist()}"
        )
    return mix(trees, values / values.sum(), predicate)


def mix(trees: Sequence[Any], weights: Any, predicate: LeafPredicate) -> Any:
    """`average` without its checks; `weights`, ``[k]`` of sum 1, may be traced."""
    weights = jnp.asarray(weights)

    def combine(path: str, *leaves: Any) -> Any:
        if predicate(path, leaves[0]):
            shares = weights.astype(jnp.result_type(leaves[0]))
            return sum(share * leaf for share, leaf in zip(shares, leaves, strict=True))
        return jnp.stack(leaves)[jnp.argmax(weights)]

    return map_leaves(combine, *trees)


def _check_many(spec: PermutationSpec, trees: Sequence[Any], predicate: LeafPredicate) -> None:
    if len(trees) < 2:
        raise ConfigError(f"merging needs at least two networks, got {len(trees)}")
    check_networks(spec, {f"network {i}": tree for i, tree in enumerate(trees)}, predicate)
