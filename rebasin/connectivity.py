"""What it means that several networks are linearly connected modulo permutation, as matrices of barriers.

The definitions are those of arXiv 2404.06498, section 4 and appendices B and C. Each of them says which
networks share a permutation. Each has a function here, which takes the permutations, whatever method found
them, and returns the barriers of all pairs:

- weak (definition 4.1): every pair has a permutation of its own, `weak_barriers`;
- strong (definition 4.2): every network has one permutation for all of its pairs, `strong_barriers`;
- simultaneous (definition 4.3): a pair of sequences has one permutation at all times,
  `simultaneous_barriers`;
- the Entezari property (definition B.1): a network has one permutation that connects it with every other
  network as that one is, `entezari_barriers`.

`align_pairs` finds permutations for the first and `align_to_all` for the last. `match_to_reference`,
`merge_many`, `universe_matching` and `all_pairs_matching` find them for the second. `transitivity` and
`strong_transitivity` count what appendix C asks of such matrices.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from rebasin.arithmetic import average
from rebasin.barrier import BarrierCurve
from rebasin.errors import ConfigError, PermutationError
from rebasin.matching.method import Method
from rebasin.matching.registry import as_method
from rebasin.permutation import Permutation, compiled_permute
from rebasin.spec import PermutationSpec

__all__ = [
    "PathFn",
    "Transitivity",
    "align_pairs",
    "align_to_all",
    "entezari_barriers",
    "simultaneous_barriers",
    "strong_barriers",
    "strong_transitivity",
    "transitivity",
    "weak_barriers",
]

# (params_a, params_b) -> the curve of their path; such as ``lambda a, b: sweep(a, b, data)``.
PathFn: TypeAlias = Callable[[Any, Any], BarrierCurve]

# (i, j) -> the permutation of network j that aligns it with network i, for i < j.
PairwisePermutations: TypeAlias = Mapping[tuple[int, int], Permutation]


def align_pairs(
    spec: PermutationSpec,
    trees: Sequence[Any],
    method: Method | str = "weights",
    **needed: Any,
) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """Align every pair of networks by itself, as weak connectivity does.

    Args:
      spec: the symmetries of the networks.
      trees: the networks, two or more.
      method: a method that holds its options, or the name of one in `rebasin.METHODS`.
      **needed: the arguments that `Method.match` hands to the method: `key`, `data` and so on.

    Returns:
      For each pair (i, j) with i < j the permutation of network j that aligns it with network i, as
      `cycle_error` takes it.

    Raises:
      ConfigError: there are fewer than two networks, or an argument that the method needs is missing.
      RebasinError: whatever the method raises.
    """
    _check_count(trees, 2)
    method = as_method(method)
    return {
        (i, j): method.match(spec, trees[i], trees[j], **needed).permutation
        for i, j in itertools.combinations(range(len(trees)), 2)
    }


def align_to_all(
    spec: PermutationSpec, trees: Sequence[Any], method: Method | str = "weights", *, key: jax.Array
) -> list[dict[str, np.ndarray]]:
    """Align every network with all others as they are, as the Entezari property asks.

    Network i is matched with the mean of the others. In the objective of weight matching that is the best
    permutation for all of them together: Σ_j ⟨θ_j, P[θ_i]⟩ = ⟨Σ_j θ_j, P[θ_i]⟩.

    Args:
      spec: the symmetries of the networks.
      trees: the networks, two or more.
      method: a method that needs networks and a key alone, or its name.
      key: PRNG key of a method that draws at random.

    Raises:
      ConfigError: there are fewer than two networks.
      RebasinError: whatever the method raises.
    """
    _check_count(trees, 2)
    method = as_method(method)
    others = [[tree for j, tree in enumerate(trees) if j != i] for i in range(len(trees))]
    return [
        method.match(spec, average(rest), tree, key=key).permutation
        for rest, tree in zip(others, trees, strict=True)
    ]


def weak_barriers(
    spec: PermutationSpec, trees: Sequence[Any], pairwise: PairwisePermutations, path: PathFn
) -> dict[str, np.ndarray]:
    """Measure weak linear connectivity modulo permutation (definition 4.1).

    Args:
      spec: the symmetries of the networks.
      trees: the networks θ_0, …, θ_{k−1}.
      pairwise: maps (i, j) with i < j to the permutation Q of network j that aligns it with network i.
      path: measures the path between two networks.

    Returns:
      For each metric of the curves the symmetric matrix ``[k, k]`` of the barriers (Eq. 1) between θ_i and
      Q(i, j)[θ_j], with zeros on the diagonal.

    Raises:
      ConfigError: there are fewer than two networks.
      PermutationError: a pair is missing.
    """
    _check_count(trees, 2)
    _check_pairs(pairwise, len(trees))

    def measure(i: int, j: int) -> BarrierCurve:
        return path(trees[i], compiled_permute(spec, pairwise[i, j], trees[j]))

    return _symmetric(len(trees), measure)


def strong_barriers(
    spec: PermutationSpec, trees: Sequence[Any], permutations: Sequence[Permutation], path: PathFn
) -> dict[str, np.ndarray]:
    """Measure strong linear connectivity modulo permutation (definition 4.2).

    Strong connectivity implies weak connectivity: the barrier between Q_i[θ_i] and Q_j[θ_j] is that between
    θ_i and (Q_i⁻¹ Q_j)[θ_j], as permuting both networks alike changes no function on the path.

    Args:
      spec: the symmetries of the networks.
      trees: the networks θ_0, …, θ_{k−1}.
      permutations: the permutation Q_i of each network, such as ``merge_many(…).permutations``.
      path: measures the path between two networks.

    Returns:
      For each metric of the curves the symmetric matrix ``[k, k]`` of the barriers (Eq. 1) between Q_i[θ_i]
      and Q_j[θ_j], with zeros on the diagonal.

    Raises:
      ConfigError: there are fewer than two networks.
      PermutationError: there are fewer or more permutations than networks.
    """
    moved = _moved(spec, trees, permutations)
    return _symmetric(len(trees), lambda i, j: path(moved[i], moved[j]))


def simultaneous_barriers(
    spec: PermutationSpec, sequences: Sequence[Sequence[Any]], pairwise: PairwisePermutations, path: PathFn
) -> dict[str, np.ndarray]:
    """Measure simultaneous weak linear connectivity modulo permutation (definition 4.3).

    Args:
      spec: the symmetries of the networks.
      sequences: for each of k networks the trees at T times, such as a training trajectory.
      pairwise: maps (i, j) with i < j to the one permutation of sequence j that aligns it with sequence i.
      path: measures the path between two networks.

    Returns:
      For each metric of the curves the matrices of `weak_barriers` at every time, ``[T, k, k]``.

    Raises:
      ConfigError: there are fewer than two sequences, or they differ in length or are empty.
      PermutationError: a pair is missing.
    """
    _check_count(sequences, 2, "sequences")
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) > 1 or 0 in lengths:
        raise ConfigError(f"sequences must have one common length of at least 1, got {sorted(lengths)}")
    times = [weak_barriers(spec, trees, pairwise, path) for trees in zip(*sequences, strict=True)]
    return {metric: np.stack([matrices[metric] for matrices in times]) for metric in times[0]}


def entezari_barriers(
    spec: PermutationSpec, trees: Sequence[Any], permutations: Sequence[Permutation], path: PathFn
) -> dict[str, np.ndarray]:
    """Measure the Entezari property (definition B.1), which implies strong connectivity.

    Args:
      spec: the symmetries of the networks.
      trees: the networks θ_0, …, θ_{k−1}.
      permutations: the permutation Q_i of each network, such as those of `align_to_all`.
      path: measures the path between two networks.

    Returns:
      For each metric of the curves the matrix ``[k, k]`` of the barriers (Eq. 1) between Q_i[θ_i] and θ_j.
      It is not symmetric. Its diagonal, the barriers between Q_i[θ_i] and θ_i, belongs to the property.

    Raises:
      ConfigError: there are fewer than two networks.
      PermutationError: there are fewer or more permutations than networks.
    """
    moved = _moved(spec, trees, permutations)
    cells = itertools.product(range(len(trees)), repeat=2)
    return _matrices(len(trees), {(i, j): _barriers(path(moved[i], trees[j])) for i, j in cells})


class Transitivity(NamedTuple):
    """How often connectivity fails to be transitive (appendix C of arXiv 2404.06498).

    Attributes:
      chains: number of chains A ~ B ~ C of three networks, each counted once for its middle B.
      broken: number of those chains with A and C not connected.
      triplets: number of sets of three networks times three, the largest possible number of chains.
    """

    chains: int
    broken: int
    triplets: int


def transitivity(barriers: np.ndarray, threshold: float) -> Transitivity:
    """Count the triplets of networks with A ~ B and B ~ C, and those of them without A ~ C.

    Args:
      barriers: symmetric matrix ``[k, k]`` of barriers, k at least 3.
      threshold: two networks are connected where their barrier is at most this.

    Examples:
      >>> transitivity(np.array([[0, 1, 3], [1, 0, 1], [3, 1, 0]]), 2)
      Transitivity(chains=1, broken=1, triplets=3)
    """
    connected = np.asarray(barriers) <= threshold
    chains = broken = triplets = 0
    for middle in range(len(connected)):
        others = (i for i in range(len(connected)) if i != middle)
        for i, j in itertools.combinations(others, 2):
            triplets += 1
            if connected[i, middle] and connected[middle, j]:
                chains += 1
                broken += not connected[i, j]
    return Transitivity(chains, broken, triplets)


def strong_transitivity(weak: np.ndarray, strong: np.ndarray, threshold: float) -> dict[int, tuple[int, int]]:
    """Count the sets of networks for which k-wise strong transitivity (definition C.2) is found to hold.

    Args:
      weak: matrix ``[k, k]`` of `weak_barriers` in one metric.
      strong: matrix ``[k, k]`` of `strong_barriers` in the same metric.
      threshold: two networks are connected where their barrier is at most this.

    Returns:
      For each size s from 2 to k the number of sets of s networks of which all pairs are connected weakly,
      and the number of those sets of which all pairs are connected strongly as well.

    Examples:
      >>> strong_transitivity(np.zeros((3, 3)), np.array([[0, 0, 9], [0, 0, 0], [9, 0, 0]]), 1)
      {2: (3, 2), 3: (1, 0)}
    """
    weakly, strongly = (np.asarray(matrix) <= threshold for matrix in (weak, strong))
    counts = {}
    for size in range(2, len(weakly) + 1):
        sets = [np.ix_(s, s) for s in itertools.combinations(range(len(weakly)), size)]
        equivalent = [at for at in sets if weakly[at].all()]
        counts[size] = (len(equivalent), sum(bool(strongly[at].all()) for at in equivalent))
    return counts


def _moved(spec: PermutationSpec, trees: Sequence[Any], permutations: Sequence[Permutation]) -> list[Any]:
    _check_count(trees, 2)
    if len(permutations) != len(trees):
        raise PermutationError(
            f"wanted one permutation for each of {len(trees)} networks, got {len(permutations)}"
        )
    return [compiled_permute(spec, p, tree) for p, tree in zip(permutations, trees, strict=True)]


def _symmetric(count: int, measure: Callable[[int, int], BarrierCurve]) -> dict[str, np.ndarray]:
    found = {}
    for i, j in itertools.combinations(range(count), 2):
        # Alphas are spaced equally, so that the path from the other side has the same points.
        found[i, j] = found[j, i] = _barriers(measure(i, j))
    return _matrices(count, found)


def _barriers(curve: BarrierCurve) -> dict[str, float]:
    return {metric: curve.barrier(metric).value for metric in curve.examples}


def _matrices(count: int, found: Mapping[tuple[int, int], Mapping[str, float]]) -> dict[str, np.ndarray]:
    metrics = next(iter(found.values()))
    matrices = {metric: np.zeros((count, count)) for metric in metrics}
    for cell, barriers in found.items():
        for metric, value in barriers.items():
            matrices[metric][cell] = value
    return matrices


def _check_count(trees: Sequence[Any], least: int, what: str = "networks") -> None:
    if len(trees) < least:
        raise ConfigError(f"connectivity needs at least {least} {what}, got {len(trees)}")


def _check_pairs(pairwise: PairwisePermutations, count: int) -> None:
    missing = [pair for pair in itertools.combinations(range(count), 2) if pair not in pairwise]
    if missing:
        raise PermutationError(f"wanted a permutation for each pair of {count} networks, missing {missing}")
