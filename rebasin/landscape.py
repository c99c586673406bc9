"""Loss and error on the simplex between several aligned networks, and the barrier of their average."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.barrier import MetricsFn
from rebasin.batches import check_batch_size, check_data, num_examples, to_batches
from rebasin.errors import ConfigError
from rebasin.merging import mix
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, is_weight, leaf_table

__all__ = ["SimplexBarrier", "SimplexSurface", "build_simplex_sweep", "simplex_grid"]


class SimplexBarrier(NamedTuple):
    """How far one average of networks lies above what its networks are on average.

    Attributes:
      value: in the unit of the metric (nats for cross entropy, a fraction for 0–1 error).
      standard_error: of `value` over the examples, paired; NaN for a single example.
      weights: of the networks, where the barrier stands, ``[k]``.
    """

    value: float
    standard_error: float
    weights: np.ndarray


class SimplexSurface(NamedTuple):
    """Per-example values of every metric at weighted averages of k networks.

    Attributes:
      weights: of the networks at each point, ``[m, k]``; the first k points are the networks themselves, the
        last is their uniform average.
      examples: values of each metric, ``[m, n]``.
    """

    weights: np.ndarray
    examples: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, np.ndarray]:
        """Mean of each metric over the examples, float64 ``[m]``."""
        return {name: values.mean(axis=1, dtype=np.float64) for name, values in self.examples.items()}

    def barrier(self, metric: str) -> SimplexBarrier:
        """The highest point above the networks: max over w of ℓ(Σ wᵢθᵢ) − Σ wᵢ ℓ(θᵢ), never negative.

        On an edge of the simplex this is Eq. 1 of arXiv 2404.06498.

        Raises:
          ConfigError: unknown metric.
        """
        excess = self._excess(metric)
        return self._at(excess, int(excess.mean(axis=1).argmax()))

    def average_barrier(self, metric: str) -> SimplexBarrier:
        """That of the uniform average alone, ℓ(mean of θᵢ) − mean of ℓ(θᵢ); it may be negative.

        Raises:
          ConfigError: unknown metric.
        """
        excess = self._excess(metric)
        return self._at(excess, len(excess) - 1)

    def _excess(self, metric: str) -> np.ndarray:
        if metric not in self.examples:
            raise ConfigError(f"no metric {metric!r} on this surface; it has {sorted(self.examples)}")
        values = np.asarray(self.examples[metric], np.float64)
        return values - self.weights @ values[: self.weights.shape[1]]

    def _at(self, excess: np.ndarray, point: int) -> SimplexBarrier:
        n = excess.shape[1]
        error = float(excess[point].std(ddof=1)) / n**0.5 if n > 1 else float("nan")
        return SimplexBarrier(float(excess[point].mean()), error, self.weights[point])


def simplex_grid(num_networks: int, resolution: int) -> np.ndarray:
    """All weights that are multiples of 1/resolution, float64 ``[m, k]``, and the uniform ones.

    The corners of the simplex come first, in order, and the uniform weights last.

    Raises:
      ConfigError: fewer than two networks, or a resolution below 1.

    Examples:
      >>> simplex_grid(2, 2).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    """
    if num_networks < 2 or resolution < 1:
        raise ConfigError(
            f"a grid needs at least two networks and a resolution of at least 1, "
            f"got {num_networks} networks and a resolution of {resolution}"
        )
    # Bars between stars: where k − 1 bars stand among resolution + k − 1 places.
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
    batch_size: int = 500,
    prepare: Callable[[Any, jax.Array], Any] | None = None,
    predicate: LeafPredicate = is_weight,
) -> Callable[[Sequence[Any], Any], SimplexSurface]:
    """Makes the function that measures the simplex of networks; build it once and call it often.

    One compiled program for a shape of networks and data, as `rebasin.build_sweep`.

    Args:
      metrics_fn: ``(params, batch) -> {name: [n]}``, one value per example.
      resolution: of the grid, see `simplex_grid`.
      batch_size: examples evaluated at once.
      prepare: ``(params, weights) -> extra`` is called once per point, and its result passed to `metrics_fn`
        as third argument: for REPAIR, or for statistics of BatchNorm.
      predicate: the leaves that are averaged; `rebasin.average` tells what happens to the others.

    Returns:
      ``measure(trees, data) -> SimplexSurface``, where `data` is a tree of arrays ``[n, …]`` with one common
      n. It raises TreeMismatchError where networks differ in shape, NonFiniteError where a weight is NaN or
      infinite, DataError where the data are empty or of different lengths, ConfigError for fewer than two
      networks.

    Raises:
      ConfigError: a resolution or a batch size below 1.

    Examples:
      >>> measure = build_simplex_sweep(lambda p, batch: {"loss": (p["w"] - batch) ** 2}, resolution=1)
      >>> surface = measure([{"w": jnp.ones(())}, {"w": -jnp.ones(())}], jnp.zeros((4,)))
      >>> surface.means["loss"].tolist(), surface.average_barrier("loss").value
      ([1.0, 1.0, 0.0], -1.0)
    """
    check_batch_size(batch_size)
    simplex_grid(2, resolution)  # an impossible resolution is an error here

    @jax.jit
    def evaluate(trees: tuple[Any, ...], data: Any, grid: jax.Array) -> Mapping[str, jax.Array]:
        n, batches = num_examples(data), to_batches(data, batch_size)

        def at(weights: jax.Array) -> Mapping[str, jax.Array]:
            params = mix(trees, weights, predicate)
            extra = () if prepare is None else (prepare(params, weights),)
            values = jax.lax.map(lambda batch: metrics_fn(params, batch, *extra), batches)
            return jax.tree.map(lambda x: x.reshape(-1)[:n], values)

        return jax.lax.map(at, grid)

    def measure(trees: Sequence[Any], data: Any) -> SimplexSurface:
        """Measures the simplex of networks; see `rebasin.build_simplex_sweep`."""
        grid = simplex_grid(len(trees), resolution)
        for i, tree in enumerate(trees):
            check_same_shapes(trees[0], tree, names=("network 0", f"network {i}"))
            check_finite({p: x for p, x in leaf_table(tree).items() if predicate(p, x)}, f"network {i}")
        check_data(data, user="a simplex")
        return SimplexSurface(grid, dict(jax.device_get(evaluate(tuple(trees), data, jnp.asarray(grid)))))

    return measure
