"""Alignment as optimal transport between the neurons of two layers.

After arXiv 2310.19103. The neurons of a layer are points: the rows of its weight ``[n, d]``, one for each
unit. The layer is seen as the measure that gives each of its neurons the mass 1/n. The squared Wasserstein-2
distance of two layers is the least mean of squared distances between neurons that are paired. Where both have
equally many neurons, the best pairing is the assignment that matching solves. Otherwise masses are split, and
the plan is a soft map from the units of one layer to those of the other (OTFusion, arXiv 1910.05653).

The distance between neurons is Euclidean, or that of a second moment Σ of what enters the layer:
‖w − v‖²_Σ = (w − v)ᵀ Σ (w − v) = E[(w·x − v·x)²], how differently two neurons act on their inputs x.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg, optimize, sparse, stats

from rebasin.dimensions import as_matrix, as_moment, symmetric_root
from rebasin.errors import ConfigError, RebasinError
from rebasin.matching.assignment import maximise_assignment

__all__ = [
    "DependenceTest",
    "PowerLaw",
    "TransportPlan",
    "dependence_test",
    "fit_decay",
    "gaussian_wasserstein",
    "transport_neurons",
    "wasserstein_rate",
]


class TransportPlan(NamedTuple):
    """How the neurons of layer B are carried to those of layer A.

    Attributes:
      mass: mass that unit i of A gets from unit j of B, ``[n, m]``; rows sum to 1/n and columns to 1/m.
      cost: squared Wasserstein-2 distance.
    """

    mass: np.ndarray
    cost: float

    @property
    def distance(self) -> float:
        """Wasserstein-2 distance of the two layers."""
        return math.sqrt(self.cost)

    @property
    def permutation(self) -> np.ndarray | None:
        """The unit of B that takes place i, ``[n]``, as in `rebasin.permute`; `None` for different counts."""
        return np.argmax(self.mass, axis=1) if self.mass.shape[0] == self.mass.shape[1] else None

    @property
    def producing(self) -> np.ndarray:
        """Matrix ``[n, m]`` for the weights that lead into the units: each new unit is a mean of units of B.

        For weights ``W_B [m, d]``, and for biases ``[m]``, the new ones are ``producing @ W_B``.
        """
        return self.mass * self.mass.shape[0]

    @property
    def consuming(self) -> np.ndarray:
        """Matrix ``[n, m]`` for the weights that lead away: their sum over the new units is kept.

        For the weights ``V_B [m, k]`` of the next layer, the new ones are ``consuming @ V_B``. Where every
        new unit is a copy of one of B's, the network computes what it did.
        """
        return self.mass * self.mass.shape[1]


def transport_neurons(
    neurons_a: ArrayLike, neurons_b: ArrayLike, *, second_moment: ArrayLike | None = None
) -> TransportPlan:
    """Find the cheapest plan that carries the neurons of layer B to those of layer A.

    The result is exact. For equal counts it is the assignment that matching solves (SciPy's
    Jonker–Volgenant), for different counts the linear program with SciPy's HiGHS, of n·m variables.

    Args:
      neurons_a: weights of A, ``[n, d]``, one row for each unit.
      neurons_b: weights of B, ``[m, d]``.
      second_moment: Σ of what enters the layer, ``[d, d]``; `None` for the Euclidean distance.

    Returns:
      The plan and its cost.

    Raises:
      RebasinError: arrays do not have these shapes, or Σ is not symmetric positive semidefinite.
      NonFiniteError: a number is NaN or infinite.

    Examples:
      >>> plan = transport_neurons([[0.0], [2.0]], [[2.0], [1.0]])
      >>> plan.permutation.tolist(), plan.cost
      ([1, 0], 0.5)
      >>> transport_neurons([[0.0], [2.0]], [[1.0]]).producing.tolist()
      [[1.0], [1.0]]
    """
    a, b = as_matrix(neurons_a, "neurons_a"), as_matrix(neurons_b, "neurons_b")
    if a.shape[1] != b.shape[1]:
        raise RebasinError(f"neurons_b: wanted neurons of dimension {a.shape[1]} as in A, got {b.shape[1]}")
    if second_moment is not None:
        root = symmetric_root(as_moment(second_moment, "second_moment", a.shape[1]))
        a, b = a @ root, b @ root
    costs = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0)
    n, m = costs.shape
    if n == m:
        rows = maximise_assignment(-costs)
        mass = np.zeros((n, n))
        mass[np.arange(n), rows] = 1 / n
    else:
        mass = _solve_program(costs)
    # Of the differences themselves: rounding would spoil small distances in the expanded form above.
    i, j = np.nonzero(mass)
    return TransportPlan(mass, float((mass[i, j] * ((a[i] - b[j]) ** 2).sum(1)).sum()))


def _solve_program(costs: np.ndarray) -> np.ndarray:
    """Solve the transport between uniform masses as a linear program; return the masses."""
    n, m = costs.shape
    rows = sparse.kron(sparse.eye_array(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye_array(m))
    masses = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    found = optimize.linprog(
        costs.ravel(), A_eq=sparse.vstack([rows, columns], format="csr"), b_eq=masses, method="highs"
    )
    assert found.status == 0, found.message  # the program is bounded, and the product of masses is feasible
    return np.maximum(found.x, 0.0).reshape(n, m)


def gaussian_wasserstein(
    mean_a: ArrayLike, moment_a: ArrayLike, mean_b: ArrayLike, moment_b: ArrayLike
) -> float:
    """Return the Wasserstein-2 distance of two Gaussians in closed form.

    Its square is ‖μ_A − μ_B‖² + tr(Σ_A + Σ_B − 2 (Σ_A^½ Σ_B Σ_A^½)^½).

    Args:
      mean_a: mean of A, ``[d]``.
      moment_a: covariance of A, ``[d, d]``.
      mean_b: mean of B, ``[d]``.
      moment_b: covariance of B, ``[d, d]``.

    Examples:
      >>> gaussian_wasserstein([0.0], [[1.0]], [3.0], [[25.0]])
      5.0
    """
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    a, b = (
        as_moment(x, name, difference.size) for x, name in ((moment_a, "moment_a"), (moment_b, "moment_b"))
    )
    root = symmetric_root(a)
    cross = linalg.eigvalsh(root @ b @ root)
    shapes = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return math.sqrt(difference @ difference + max(shapes, 0.0))


class PowerLaw(NamedTuple):
    """A fitted decay ``distance = scale · count^-exponent``.

    Attributes:
      exponent: the exponent.
      standard_error: standard error of the exponent; NaN for two counts.
      scale: the distance at a count of one.
    """

    exponent: float
    standard_error: float
    scale: float


def fit_decay(counts: ArrayLike, distances: ArrayLike) -> PowerLaw:
    """Fit a power law to distances by least squares of logarithms.

    Args:
      counts: numbers of neurons, at least two different ones.
      distances: distance for each of them, positive.

    Raises:
      RebasinError: there are fewer than two different counts, or a number is not positive.

    Examples:
      >>> round(fit_decay([1, 4, 16], [2.0, 1.0, 0.5]).exponent, 6)
      0.5
    """
    counts, distances = (np.asarray(x, np.float64) for x in (counts, distances))
    if counts.shape != distances.shape or len(np.unique(counts)) < 2:
        raise RebasinError(f"wanted a distance for each of at least two counts, got {counts} and {distances}")
    if not (np.all(counts > 0) and np.all(distances > 0) and np.isfinite(distances).all()):
        raise RebasinError(f"wanted positive counts and distances, got {counts} and {distances}")
    fit: Any = stats.linregress(np.log(counts), np.log(distances))
    error = float(fit.stderr) if len(counts) > 2 else math.nan
    return PowerLaw(-float(fit.slope), error, math.exp(float(fit.intercept)))


def wasserstein_rate(dimension: float) -> float:
    """Return the exponent r of the general rate W₂ = O(n^-r) for n independent samples in a dimension.

    It is 1 / max(dimension, 4), up to a logarithm at 4, for distributions with enough moments (Fournier and
    Guillin 2015, theorem 1, for the expected squared distance). In fewer than four dimensions distributions
    with a density decay faster.

    Examples:
      >>> wasserstein_rate(8), wasserstein_rate(2)
      (0.125, 0.25)
    """
    return 1 / max(dimension, 4.0)


class DependenceTest(NamedTuple):
    """A permutation test of whether the neurons of a layer are independent.

    Attributes:
      statistic: mean squared cosine of two different neurons of one network.
      null: the same for shuffled networks, ``[permutations]``.
    """

    statistic: float
    null: np.ndarray

    @property
    def p_value(self) -> float:
        """Probability of a statistic at least as far from the mean of `null`, on either side."""
        far = np.abs(self.null - self.null.mean()) >= abs(self.statistic - self.null.mean()) * (1 - 1e-9)
        return float((1 + far.sum()) / (1 + len(self.null)))

    @property
    def z_score(self) -> float:
        """Standard deviations of `null` by which the statistic exceeds its mean; negative for repulsion."""
        spread = self.null.std()
        return float((self.statistic - self.null.mean()) / spread) if spread else 0.0


def dependence_test(
    layers: Sequence[ArrayLike], *, num_permutations: int = 999, seed: int = 0
) -> DependenceTest:
    """Test whether the neurons of one layer are independent, given that layer of several networks.

    If all neurons of all networks are independent and of one distribution, it does not matter which network a
    neuron is from, so neurons are shuffled between the networks. The statistic is the mean of cos²(w_i, w_j)
    over pairs of different neurons within a network: it is lower than in shuffled networks where the neurons
    of a network share out directions between them, and higher where they gather. The test is exact.

    It needs weights that mean the same in all networks, so it is for layers that read the data. It cannot
    tell dependence from a difference in distribution between the networks.

    Args:
      layers: weight of the layer for each of at least two networks trained alike, ``[n, d]`` each.
      num_permutations: number of shufflings; the least p-value is 1 / (1 + that).
      seed: seed of the shufflings.

    Raises:
      RebasinError: there are fewer than two networks, a layer has fewer than two neurons, or shapes differ.
      NonFiniteError: a weight is NaN or infinite.

    Examples:
      >>> alike = [np.tile([[1.0, 0.0]], (3, 1)), np.tile([[0.0, 1.0]], (3, 1))]
      >>> dependence_test(alike).statistic
      1.0
    """
    networks = [as_matrix(layer, f"layers.{i}") for i, layer in enumerate(layers)]
    shapes = [list(layer.shape) for layer in networks]
    if len(networks) < 2 or any(shape != shapes[0] or shape[0] < 2 for shape in shapes):
        raise RebasinError(
            "wanted a layer of at least two neurons for each of at least two networks, of one shape; "
            f"got {shapes}"
        )
    if num_permutations < 1:
        raise ConfigError(f"num_permutations: wanted at least 1, got {num_permutations}")
    rows = np.concatenate(networks)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    # A neuron without weights has no direction, and counts as orthogonal to all.
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    squares = (rows @ rows.T) ** 2
    np.fill_diagonal(squares, 0.0)
    count, size = len(networks), shapes[0][0]

    def statistic(order: np.ndarray) -> float:
        members = np.zeros((len(rows), count))
        members[order, np.repeat(np.arange(count), size)] = 1.0
        return float((members * (squares @ members)).sum() / (count * size * (size - 1)))

    rng = np.random.default_rng(seed)
    null = np.array([statistic(rng.permutation(len(rows))) for _ in range(num_permutations)])
    return DependenceTest(statistic(np.arange(len(rows))), null)
