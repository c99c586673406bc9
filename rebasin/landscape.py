"""Loss and error beyond a path: on the simplex between several networks, and on the plane through three.

`build_simplex_sweep` evaluates weighted averages of networks, and its result tells their barriers.
`build_plane` lays a plane through three networks, in which distances are those between the networks, and
`build_plane_sweep` evaluates points of planes (arXiv 2404.06498, appendix I).
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from rebasin.arithmetic import mix
from rebasin.barrier import MetricsFn, build_evaluation, excess_over_chord, standard_error
from rebasin.batches import check_counts
from rebasin.errors import ConfigError
from rebasin.roles import RoleNames, check_roles, check_weight_dtypes, weight_leaves
from rebasin.trees import check_finite, conform, leaf_table

__all__ = [
    "Plane",
    "PlaneSurface",
    "Projection",
    "SimplexBarrier",
    "SimplexSurface",
    "build_plane",
    "build_plane_sweep",
    "build_simplex_sweep",
    "simplex_grid",
]

# Three networks whose triangle is flatter than this, height by longest side, count as lying on one line: the
# rounding of float32 weights alone would decide where the plane lies.
_FLAT = 1e-4


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
    evaluate = _build_mixture_evaluation(metrics_fn, batch_size, prepare, roles)

    def sweep(trees: Sequence[Any], data: Any) -> SimplexSurface:
        """Evaluate the simplex between networks; see `rebasin.build_simplex_sweep`."""
        grid = simplex_grid(len(trees), resolution)
        named = {f"network {i}": tree for i, tree in enumerate(trees)}
        return SimplexSurface(grid, evaluate(named, grid, data))

    return sweep


def _build_mixture_evaluation(
    metrics_fn: MetricsFn,
    batch_size: int | None,
    prepare: Callable[[Any, jax.Array], Any] | None,
    roles: RoleNames,
) -> Callable[[Mapping[str, Any], np.ndarray, Any], dict[str, np.ndarray]]:
    """Return `rebasin.barrier.build_evaluation` at points that are weights of the networks, of sum 1."""

    def combine(trees: Sequence[Any], weights: jax.Array) -> Any:
        return mix(trees, weights, weight_leaves(trees[0], roles))

    return build_evaluation(metrics_fn, combine, batch_size=batch_size, prepare=prepare, roles=roles)


class Projection(NamedTuple):
    """The point of a plane that is nearest to a network.

    Attributes:
      coordinates: coordinates of the point, float64 ``[2]``.
      distance: Euclidean distance of the network to the plane, over all weights.
    """

    coordinates: np.ndarray
    distance: float


class Plane(NamedTuple):
    """The plane through three networks, with coordinates in which distances are true.

    The Euclidean distance of two points of the plane is that of the two networks over all weights, so that a
    picture with equal scales on both axes is not distorted. The first network is the origin, the second lies
    on the positive first axis, and the third on the side of the positive second axis.

    Attributes:
      anchors: the three networks, by name.
      basis: the directions of both axes, orthonormal. Each is a mapping from the path name of a weight to an
        array of its shape.
      coordinates: coordinates of the anchors, float64 ``[3, 2]``.
    """

    anchors: dict[str, Any]
    basis: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    coordinates: np.ndarray

    def shares(self, points: ArrayLike) -> np.ndarray:
        """Return the weights of the anchors at points of the plane.

        A network of the plane is Σ wᵢθᵢ over the anchors θᵢ. The weights have the sum 1 and are negative
        outside the triangle. At an anchor they are exactly 1 and 0.

        Args:
          points: coordinates, ``[…, 2]``.

        Returns:
          Weights, float64 ``[…, 3]``.

        Examples:
          >>> corners = {"a": {"w": np.zeros(2)}, "b": {"w": np.array([2.0, 0])}, "c": {"w": np.ones(2)}}
          >>> build_plane(corners).shares([1.0, -1.0]).tolist()
          [1.0, 1.0, -1.0]
        """
        x, y = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        length, (across, height) = self.coordinates[1, 0], self.coordinates[2]
        third = y / height
        second = (x - across * third) / length
        return np.stack([1 - second - third, second, third], axis=-1)

    def project(self, params: Any) -> Projection:
        """Project a network onto the plane.

        Args:
          params: a network with the leaves and shapes of the anchors.

        Raises:
          TreeMismatchError: the network does not fit the anchors.
          NonFiniteError: a weight is NaN or infinite.

        Examples:
          >>> corners = {"a": {"w": np.zeros(3)}, "b": {"w": np.eye(3)[0]}, "c": {"w": np.eye(3)[1]}}
          >>> coordinates, distance = build_plane(corners).project({"w": np.array([2.0, 3.0, 4.0])})
          >>> coordinates.tolist(), distance
          ([2.0, 3.0], 4.0)
        """
        (name, origin), *_ = self.anchors.items()
        params = conform(origin, params, names=(name, "the network"))
        check_finite(params, "the network", leaves=self.basis[0].keys())
        offset = _difference(params, origin, self.basis[0])
        coordinates = np.array([_inner(offset, axis) for axis in self.basis])
        # The squares of a small distance and of large coordinates would cancel.
        rest = _without(_without(offset, self.basis[0]), self.basis[1])
        return Projection(coordinates, math.sqrt(_inner(rest, rest)))

    def grid(
        self, size: int, *, margin: float = 0.3, around: ArrayLike | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates of a rectangular grid around the anchors.

        Args:
          size: number of points along each axis, at least 2.
          margin: width of the border around the anchors, relative to the longer side of the rectangle.
          around: coordinates ``[n, 2]`` of further points that the rectangle holds, such as projections.

        Returns:
          First and second coordinates, float64 ``[size]`` each. ``np.stack(np.meshgrid(x, y), axis=-1)`` has
          the points, ``[size, size, 2]``, with one row for each y.

        Raises:
          ConfigError: `size` is below 2, or `margin` is negative.

        Examples:
          >>> corners = {"a": {"w": np.zeros(2)}, "b": {"w": np.eye(2)[0]}, "c": {"w": np.eye(2)[1]}}
          >>> [axis.tolist() for axis in build_plane(corners).grid(3, margin=0.5)]
          [[-0.5, 0.5, 1.5], [-0.5, 0.5, 1.5]]
        """
        check_counts(2, size=size)
        if not margin >= 0:
            raise ConfigError(f"margin must be at least 0, got {margin}")
        points = self.coordinates
        if around is not None:
            points = np.concatenate([points, np.asarray(around, np.float64).reshape(-1, 2)])
        low, high = points.min(axis=0), points.max(axis=0)
        border = margin * (high - low).max()
        x, y = (np.linspace(low[i] - border, high[i] + border, size) for i in (0, 1))
        return x, y


class PlaneSurface(NamedTuple):
    """Values of every metric at points of a plane, for each example.

    Attributes:
      points: coordinates of the points, ``[…, 2]``.
      examples: values of each metric, ``[…, n]``.
    """

    points: np.ndarray
    examples: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, np.ndarray]:
        """Mean of each metric over the examples, float64 ``[…]``."""
        return {name: values.mean(axis=-1, dtype=np.float64) for name, values in self.examples.items()}


def build_plane(anchors: Mapping[str, Any], *, roles: RoleNames = None) -> Plane:
    """Lay a plane through three networks.

    Args:
      anchors: three trees of equal leaves, shapes and dtypes, by the names that messages call them.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find. The plane is one of weights.

    Returns:
      The plane, with coordinates as `Plane` says.

    Raises:
      ConfigError: there are not three networks, or two of them are equal or all lie on one line, so that no
        one plane goes through them.
      TreeMismatchError: networks differ in leaves, shapes or dtypes, or a weight holds integers.
      NonFiniteError: a weight is NaN or infinite.

    Examples:
      >>> plane = build_plane(
      ...     {"a": {"w": np.ones(2)}, "b": {"w": np.array([4.0, 5.0])}, "c": {"w": np.array([1.0, 2.0])}}
      ... )
      >>> plane.coordinates.round(3).tolist()
      [[0.0, 0.0], [5.0, 0.0], [0.8, 0.6]]
    """
    if len(anchors) != 3:
        raise ConfigError(f"a plane goes through three networks, got {len(anchors)}: {list(anchors)}")
    (first, origin), *others = anchors.items()
    trees = {first: origin, **{n: conform(origin, tree, names=(first, n)) for n, tree in others}}
    weights = weight_leaves(origin, check_roles(roles))
    check_weight_dtypes(origin, weights, first)
    for name, tree in trees.items():
        check_finite(tree, name, leaves=weights)
    _, second, third = trees.values()
    along, aside = (_difference(tree, origin, weights) for tree in (second, third))
    length = math.sqrt(_inner(along, along))
    side = math.sqrt(_inner(aside, aside))
    if not length or not side:
        equal = (first, others[0][0] if not length else others[1][0])
        raise ConfigError(_no_plane(trees, f"{equal[0]} and {equal[1]} are equal"))
    axis = _scaled(along, 1 / length)
    # Once more, since one subtraction leaves a rounding error that is not orthogonal.
    upright = _without(_without(aside, axis), axis)
    height = math.sqrt(_inner(upright, upright))
    between = math.sqrt(sum(float(np.sum(np.abs(along[path] - aside[path]) ** 2)) for path in weights))
    if not between:
        raise ConfigError(_no_plane(trees, f"{others[0][0]} and {others[1][0]} are equal"))
    if height < _FLAT * max(length, side, between):
        raise ConfigError(
            _no_plane(
                trees,
                f"they lie on one line ({others[1][0]} is {height:.3g} away from the line through {first} "
                f"and {others[0][0]}, which are {length:.3g} apart)",
            )
        )
    coordinates = np.array([[0.0, 0.0], [length, 0.0], [_inner(aside, axis), height]])
    return Plane(trees, (axis, _scaled(upright, 1 / height)), coordinates)


def _no_plane(trees: Mapping[str, Any], reason: str) -> str:
    return f"no one plane goes through {', '.join(trees)}: {reason}"


def _difference(tree: Any, origin: Any, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Return the difference of two networks in some leaves, in float64 or complex128."""
    ours, theirs = leaf_table(tree), leaf_table(origin)
    paths = sorted(paths)  # sums then have one order, and one rounding

    def wide(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)

    return {path: wide(ours[path]) - wide(theirs[path]) for path in paths}


def _inner(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Return the inner product of two directions; complex numbers count with the real part."""
    return sum(float(np.vdot(second[path], values).real) for path, values in first.items())


def _scaled(direction: Mapping[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    return {path: factor * values for path, values in direction.items()}


def _without(direction: Mapping[str, np.ndarray], axis: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what is left of a direction without its part along an axis of length 1."""
    part = _inner(direction, axis)
    return {path: values - part * axis[path] for path, values in direction.items()}


def build_plane_sweep(
    metrics_fn: MetricsFn,
    *,
    batch_size: int | None = None,
    prepare: Callable[[Any, jax.Array], Any] | None = None,
    roles: RoleNames = None,
) -> Callable[[Plane, ArrayLike, Any], PlaneSurface]:
    """Make the function that evaluates points of a plane; build it once and call it often.

    As `rebasin.build_sweep`, it is one compiled program for networks, data and numbers of points of one
    shape, whichever the plane.

    Args:
      metrics_fn: ``(params, batch) -> {name: [n]}``, one value for each example.
      batch_size: number of examples evaluated at once, by default `default_batch_size`.
      prepare: ``(params, shares) -> extra``, called once at each point, where `shares` are the weights of the
        anchors. `metrics_fn` gets its result as third argument. REPAIR and the statistics of BatchNorm need
        it.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find; as for `build_plane`.

    Returns:
      ``sweep(plane, points, data) -> PlaneSurface``. `points` are coordinates ``[…, 2]``, such as those of
      `Plane.grid`. `data` is a `rebasin.Batch`, or another tree of arrays ``[n, …]`` with one common n.
      Raises ConfigError for coordinates that are not finite or no pairs, and DataError where the data are
      empty or of different lengths.

    Raises:
      ConfigError: `batch_size` is below 1.

    Examples:
      >>> corners = {"a": {"w": np.zeros(2)}, "b": {"w": np.eye(2)[0]}, "c": {"w": np.eye(2)[1]}}
      >>> sweep = build_plane_sweep(lambda p, batch: {"loss": p["w"].sum() - batch})
      >>> sweep(build_plane(corners), [[2.0, 1.0], [0.0, -1.0]], np.zeros(4)).means["loss"].tolist()
      [3.0, -1.0]
    """
    evaluate = _build_mixture_evaluation(metrics_fn, batch_size, prepare, roles)

    def sweep(plane: Plane, points: ArrayLike, data: Any) -> PlaneSurface:
        """Evaluate points of a plane; see `rebasin.build_plane_sweep`."""
        points = np.asarray(points, np.float64)
        if points.ndim < 1 or points.shape[-1] != 2 or not np.isfinite(points).all():
            raise ConfigError(
                f"points must be finite coordinates of shape [..., 2], got an array of shape {points.shape}"
            )
        examples = evaluate(plane.anchors, plane.shares(points.reshape(-1, 2)), data)
        shape = points.shape[:-1]
        return PlaneSurface(points, {n: v.reshape(*shape, v.shape[-1]) for n, v in examples.items()})

    return sweep
