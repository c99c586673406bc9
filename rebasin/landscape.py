"""The simplex between several networks: loss and error at their weighted averages, and their barriers."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rebasin.arithmetic import mix
from rebasin.barrier import MetricsFn, build_evaluation, excess_over_chord, standard_error
from rebasin.batches import check_counts
from rebasin.errors import ConfigError
from rebasin.roles import RoleNames, weight_leaves

__all__ = ["SimplexBarrier", "SimplexSurface", "build_simplex_sweep", "simplex_grid"]


class SimplexBarrier(NamedTuple):
    """The height of an average of networks above what the networks are on average.

    Attributes:
      value: height of the barrier in the unit of the metric (nats for cross entropy, a fraction for 0–1
        error).
      standard_error: standard error of `value` over the examples, paired; NaN for a single example.
      weights: weights of the networks at the point where the barrier stands, ``[k]``.
    """

    value: float
    standard_error: float
    weights: np.ndarray


class SimplexSurface(NamedTuple):
    """Values of every metric at weighted averages of k networks, for each example.

    Attributes:
      weights: weights of the networks at each point, ``[m, k]``. The first k points are the networks
        themselves, and the last is their uniform average.
      examples: values of each metric, ``[m, n]``.
    """

    weights: np.ndarray
    examples: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, np.ndarray]:
        """Mean of each metric over the examples, float64 ``[m]``."""
        return {name: values.mean(axis=1, dtype=np.float64) for name, values in self.examples.items()}

    def barrier(self, metric: str) -> SimplexBarrier:
        """Return the highest barrier on the simplex, max over w of ℓ(Σ wᵢθᵢ) − Σ wᵢ ℓ(θᵢ).

        It is never negative, since the networks themselves are among the points. On an edge of the simplex it
        is Eq. 1 of arXiv 2404.06498.

        Args:
          metric: a name in `examples`.

        Raises:
          ConfigError: the metric is unknown.

        Examples:
          >>> weights = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
          >>> losses = np.array([[1.0], [2.0], [4.0]])
          >>> SimplexSurface(weights, {"loss": losses}).barrier("loss").value
          2.5
        """
        excess = self._excess(metric)
        return self._at(excess, int(excess.mean(axis=1).argmax()))

    def average_barrier(self, metric: str) -> SimplexBarrier:
        """Return the barrier at the uniform average, ℓ(mean of θᵢ) − mean of ℓ(θᵢ), which may be negative.

        Args:
          metric: a name in `examples`.

        Raises:
          ConfigError: the metric is unknown.

        Examples:
          >>> weights = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
          >>> losses = np.array([[3.0], [2.0], [2.0]])
          >>> SimplexSurface(weights, {"loss": losses}).average_barrier("loss").value
          -0.5
        """
        excess = self._excess(metric)
        return self._at(excess, len(excess) - 1)

    def _excess(self, metric: str) -> np.ndarray:
        if metric not in self.examples:
            raise ConfigError(f"no metric {metric!r} on this surface; it has {sorted(self.examples)}")
        values = np.asarray(self.examples[metric], np.float64)
        return excess_over_chord(values, self.weights, values[: self.weights.shape[1]])

    def _at(self, excess: np.ndarray, point: int) -> SimplexBarrier:
        return SimplexBarrier(
            float(excess[point].mean()), float(standard_error(excess[point])), self.weights[point]
        )


def simplex_grid(num_networks: int, resolution: int) -> np.ndarray:
    """Return all weights that are multiples of 1/resolution, and the uniform weights.

    Args:
      num_networks: number of networks k, at least 2.
      resolution: number of steps along an edge of the simplex, at least 1.

    Returns:
      Weights of sum 1, float64 ``[m, k]``. The corners of the simplex come first, in the order of the
      networks, and the uniform weights last.

    Raises:
      ConfigError: there are fewer than two networks, or `resolution` is below 1.

    Examples:
      >>> simplex_grid(2, 2).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    """
    check_counts(2, num_networks=num_networks)
    check_counts(1, resolution=resolution)
    # Stars and bars: k − 1 bars stand among resolution + k − 1 places, the other places hold stars, and the
    # numbers of stars between the bars, divided by the resolution, are the weights of one point.
    places = resolution + num_networks - 1
    bars = np.array(list(itertools.combinations(range(places), num_networks - 1)))
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, places)))
    counts = np.diff(edges, axis=1) - 1
    inside = counts[(counts.max(axis=1) < resolution) & (np.ptp(counts, axis=1) > 0)]
    uniform = np.full((1, num_networks), 1 / num_networks)
    return np.concatenate([np.eye(num_networks), inside / resolution, uniform])


def build_simplex_sweep(
    metrics_fn: MetricsFn,
    *,
    resolution: int = 4,
    batch_size: int | None = None,
    prepare: Callable[[Any, jax.Array], Any] | None = None,
    roles: RoleNames = None,
) -> Callable[[Sequence[Any], Any], SimplexSurface]:
    """Make the function that evaluates the simplex between networks; build it once and call it often.

    As `rebasin.build_sweep`, it is one compiled program for networks and data of one shape.

    Args:
      metrics_fn: ``(params, batch) -> {name: [n]}``, one value for each example.
      resolution: number of steps along an edge of the simplex; see `simplex_grid`.
      batch_size: number of examples evaluated at once, by default `default_batch_size`.
      prepare: ``(params, weights) -> extra``, called once at each point. `metrics_fn` gets its result as
        third argument. REPAIR and the statistics of BatchNorm need it.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find. Weights are averaged, and
        `rebasin.average` says what happens to the others.

    Returns:
      ``sweep(trees, data) -> SimplexSurface``. `data` is a `rebasin.Batch`, or another tree of arrays
      ``[n, …]`` with one common n. Raises TreeMismatchError where networks differ in shape, NonFiniteError
      where a weight is NaN or infinite, DataError where the data are empty or of different lengths, and
      ConfigError for fewer than two networks.

    Raises:
      ConfigError: `resolution` or `batch_size` is below 1.

    Examples:
      >>> sweep = build_simplex_sweep(lambda p, batch: {"loss": (p["w"] - batch) ** 2}, resolution=1)
      >>> surface = sweep([{"w": jax.numpy.ones(())}, {"w": -jax.numpy.ones(())}], jax.numpy.zeros((4,)))
      >>> surface.means["loss"].tolist(), surface.average_barrier("loss").value
      ([1.0, 1.0, 0.0], -1.0)
    """
    simplex_grid(2, resolution)  # raises the error of an impossible resolution now, not at the first call

    def combine(trees: Sequence[Any], weights: jax.Array) -> Any:
        return mix(trees, weights, weight_leaves(trees[0], roles))

    evaluate = build_evaluation(metrics_fn, combine, batch_size=batch_size, prepare=prepare, roles=roles)

    def sweep(trees: Sequence[Any], data: Any) -> SimplexSurface:
        """Evaluate the simplex between networks; see `rebasin.build_simplex_sweep`."""
        grid = simplex_grid(len(trees), resolution)
        named = {f"network {i}": tree for i, tree in enumerate(trees)}
        return SimplexSurface(grid, evaluate(named, grid, data))

    return sweep
