"""Paths between two networks: loss and error along them, and their barriers.

The path between networks A and B is the line αA + (1−α)B. `build_sweep` makes the function that evaluates it
at all alphas; its result is a `BarrierCurve`. `classification_metrics` makes the metrics of a classifier.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rebasin.arithmetic import interpolate
from rebasin.batches import (
    Batch,
    check_counts,
    check_data,
    default_batch_size,
    inputs_of,
    num_examples,
    to_batches,
)
from rebasin.compilation import compiler_options
from rebasin.errors import ConfigError, DataError, NonFiniteError, RebasinError, problem_list
from rebasin.roles import RoleNames, check_roles, check_weight_dtypes, weight_leaves
from rebasin.trees import check_finite, conform

__all__ = [
    "Barrier",
    "BarrierCurve",
    "Convention",
    "MetricsFn",
    "build_evaluation",
    "build_sweep",
    "classification_metrics",
    "excess_over_chord",
    "standard_error",
    "sweep",
]

# ``(params, batch) -> {name: [n]}``, one value for each example, for example {"loss": [n], "error": [n]}.
# With `prepare`, its result is the third argument.
MetricsFn: TypeAlias = Callable[..., Mapping[str, jax.Array]]

Convention = Literal["chord", "endpoint_mean", "midpoint"]


def classification_metrics(apply_fn: Callable[..., jax.Array]) -> MetricsFn:
    """Make the metrics of a classifier: softmax cross entropy and 0–1 error of each example.

    Args:
      apply_fn: ``(params, *inputs) -> logits``, the network; the logits have shape ``[n, classes]``.

    Returns:
      ``metrics_fn(params, batch, *extra) -> {"loss": [n], "error": [n]}``. `batch` is a `rebasin.Batch` whose
      labels are integers ``[n]`` from 0 to the number of classes less 1. The network is called as
      ``apply_fn(params, *inputs, *extra)``, where `extra` is what the ``prepare`` of a sweep returned, if the
      sweep has one. Raises DataError, while it is traced, where labels are missing, or where labels or logits
      have a wrong shape or dtype.

    Examples:
      >>> metrics_fn = classification_metrics(lambda params, x: x @ params["w"])
      >>> batch = Batch(jnp.array([[0.0, 0.0], [9.0, 0.0]]), labels=jnp.array([0, 1]))
      >>> metrics = metrics_fn({"w": jnp.eye(2)}, batch)
      >>> [f"{loss:.4f}" for loss in metrics["loss"]], metrics["error"].tolist()
      (['0.6931', '9.0001'], [0.0, 1.0])
    """

    def metrics_fn(params: Any, batch: Batch, *extra: Any) -> dict[str, jax.Array]:
        labels = _integer_labels(batch)
        logits = apply_fn(params, *inputs_of(batch), *extra)
        _check_logits(logits, len(labels))
        logits = jnp.asarray(logits)
        # Half precision has too few digits for the difference of two numbers of nearly equal size.
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        # `logsumexp` subtracts the largest logit first, so that no exponential overflows.
        label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - label_logits
        return {"loss": loss, "error": (jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32)}

    return metrics_fn


def _integer_labels(batch: Any) -> jax.Array:
    """Return the labels of a batch; raise `DataError` if they are missing, or not integers of shape [n]."""
    if not isinstance(batch, Batch) or batch.labels is None:
        got = "a Batch without labels" if isinstance(batch, Batch) else f"a {type(batch).__name__}"
        raise DataError(f"classification metrics need labels: wanted Batch(inputs, labels), got {got}")
    labels = jnp.asarray(batch.labels)
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise DataError(
            f"classification metrics need integer labels of shape [n], "
            f"got a {labels.dtype} array of shape {labels.shape}"
        )
    return labels


def _check_logits(logits: Any, n: int) -> None:
    """Raise `DataError` unless `logits` is a floating array of shape [n, classes]."""
    is_array = hasattr(logits, "shape") and hasattr(logits, "dtype")
    good = is_array and len(logits.shape) == 2 and logits.shape[0] == n
    if not good or not jnp.issubdtype(logits.dtype, jnp.floating):
        got = f"a {logits.dtype} array of shape {logits.shape}" if is_array else f"a {type(logits).__name__}"
        raise DataError(
            f"classification metrics need logits of shape [n, classes], a floating array of shape "
            f"({n}, classes) for a batch of {n}; apply_fn returned {got}"
        )


class Barrier(NamedTuple):
    """The height of a barrier.

    Attributes:
      value: height of the barrier in the unit of the metric (nats for cross entropy, a fraction for 0–1
        error).
      standard_error: standard error of `value` over the examples. It is paired, because the networks at the
        ends were measured on the same examples.
      alpha: weight of A at the point of the path where the barrier stands.
    """

    value: float
    standard_error: float
    alpha: float


class BarrierCurve(NamedTuple):
    """Values of every metric along the path αA + (1−α)B between two networks, for each example.

    Attributes:
      alphas: weights of A, ``[k]``, from 0 (network B) to 1 (network A).
      examples: values of each metric, ``[k, n]``.
    """

    alphas: np.ndarray
    examples: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, np.ndarray]:
        """Mean of each metric over the examples, float64 ``[k]``."""
        return {name: values.mean(axis=1, dtype=np.float64) for name, values in self.examples.items()}

    @property
    def standard_errors(self) -> dict[str, np.ndarray]:
        """Standard error of each of `means`, float64 ``[k]``; NaN for a single example."""
        return {name: standard_error(values) for name, values in self.examples.items()}

    @property
    def loss(self) -> np.ndarray:
        """Mean loss, float64 ``[k]``."""
        return self.means["loss"]

    @property
    def error(self) -> np.ndarray:
        """Mean 0–1 error, float64 ``[k]``."""
        return self.means["error"]

    @property
    def loss_barrier(self) -> Barrier:
        """The loss barrier of Eq. 1; see `barrier`."""
        return self.barrier("loss")

    @property
    def error_barrier(self) -> Barrier:
        """The error barrier of Eq. 1; see `barrier`."""
        return self.barrier("error")

    def barrier(self, metric: str, *, convention: Convention = "chord") -> Barrier:
        """Return the height of the barrier in one metric.

        Args:
          metric: a name in `examples`.
          convention: ``"chord"`` is Eq. 1 of arXiv 2404.06498, max over α of ℓ(αA + (1−α)B) − αℓ(A) −
            (1−α)ℓ(B); never negative, since the ends belong to the curve. ``"endpoint_mean"`` is max over α
            of ℓ(αA + (1−α)B) − ½(ℓ(A) + ℓ(B)). ``"midpoint"`` is the height above the chord at α = ½ alone,
            which may be negative and needs an odd number of alphas.

        Returns:
          The height, its standard error over the examples, and its α.

        Raises:
          ConfigError: the metric or the convention is unknown, or no α is ½.
          NonFiniteError: a value of the metric is NaN or infinite.

        Examples:
          >>> losses = np.array([[1.0, 3.0], [6.0, 6.0], [1.0, 1.0]])
          >>> BarrierCurve(np.array([0.0, 0.5, 1.0]), {"loss": losses}).loss_barrier
          Barrier(value=4.5, standard_error=0.5, alpha=0.5)
        """
        if metric not in self.examples:
            raise ConfigError(f"no metric {metric!r} in this curve; it has {sorted(self.examples)}")
        values = np.asarray(self.examples[metric], np.float64)
        wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if wrong.size:
            at = ", ".join(f"{self.alphas[i]:.3g}" for i in wrong)
            raise NonFiniteError(f"{metric!r} is not finite at alpha {at}: there is no barrier to tell")
        ends = values[[-1, 0]]
        if convention not in ("chord", "endpoint_mean", "midpoint"):
            raise ConfigError(
                f"unknown convention {convention!r}; known: 'chord', 'endpoint_mean', 'midpoint'"
            )
        if convention == "endpoint_mean":
            excess = values - 0.5 * (ends[0] + ends[1])
        else:
            alphas = np.asarray(self.alphas, np.float64)
            excess = excess_over_chord(values, np.stack([alphas, 1 - alphas], axis=1), ends)
        at = int(excess.mean(axis=1).argmax())
        if convention == "midpoint":
            at = len(self.alphas) // 2
            if self.alphas[at] != 0.5:
                raise ConfigError(f"the midpoint needs an odd number of alphas, got {len(self.alphas)}")
        return Barrier(
            float(excess[at].mean()), float(standard_error(excess[at : at + 1])[0]), float(self.alphas[at])
        )


def excess_over_chord(values: np.ndarray, weights: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return how far averages of networks lie above what the networks are on average.

    Args:
      values: values of a metric at m averages of k networks, float64 ``[m, n]`` for n examples.
      weights: weights of the networks in each average, ``[m, k]``. A path has k = 2 and weights (α, 1 − α).
      ends: values of the metric at the networks themselves, float64 ``[k, n]``.

    Returns:
      ℓ(Σ wᵢθᵢ) − Σ wᵢ ℓ(θᵢ) for each example, float64 ``[m, n]``.

    Examples:
      >>> excess_over_chord(np.array([[5.0]]), np.array([[0.25, 0.75]]), np.array([[4.0], [0.0]])).tolist()
      [[4.0]]
    """
    # One product at a time rather than a matrix product, whose rounding depends on the shapes.
    return values - sum(weights[:, i, None] * end for i, end in enumerate(ends))


def standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the last axis, float64; NaN for a single example.

    Args:
      values: array ``[…, n]``.

    Examples:
      >>> standard_error(np.array([[1.0, 3.0], [2.0, 2.0]])).tolist()
      [1.0, 0.0]
    """
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.nan)
    return values.std(axis=-1, ddof=1, dtype=np.float64) / math.sqrt(n)


def build_sweep(
    metrics_fn: MetricsFn,
    *,
    num_alphas: int = 25,
    batch_size: int | None = None,
    prepare: Callable[[Any, jax.Array], Any] | None = None,
    roles: RoleNames = None,
) -> Callable[..., BarrierCurve]:
    """Make the function that evaluates the path between two networks; build it once and call it often.

    The whole sweep is one compiled program: a loop over alphas around a loop over batches, over data that
    stay on the device. It is compiled once for networks and data of one shape, whatever their values.

    Args:
      metrics_fn: ``(params, batch) -> {name: [n]}``, one value for each example.
      num_alphas: number of equally spaced points on the path, both ends included; 25 in the paper.
      batch_size: number of examples evaluated at once, by default `default_batch_size`: 500 on a CPU and
        2,000 on an accelerator. The last batch is filled up with copies of the first example, whose values
        are dropped.
      prepare: ``(params, alpha) -> extra``, called once at each point. `metrics_fn` gets its result as third
        argument. REPAIR and the statistics of BatchNorm need it. Bind arrays to it by
        `jax.tree_util.Partial`, as `build_repair` and `build_norm_reset` do: they are then arguments of the
        compiled program, while arrays of a closure are copied into it.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find. Weights are averaged, and
        `rebasin.interpolate` says what happens to the others.

    Returns:
      ``sweep(params_a, params_b, data, ends=None) -> BarrierCurve``. `data` is a `rebasin.Batch`, or another
      tree of arrays ``[n, …]`` with one common n. `ends` is a curve on the same data between networks that
      compute the same functions as A and B, for example before a permutation: the values at both ends are
      taken from it, and only the points between them are evaluated. Raises TreeMismatchError where A and B
      differ in shape, NonFiniteError where a weight is NaN or infinite, DataError where the data are empty
      or of different lengths, and ConfigError where `ends` has other metrics or another number of examples.

    Raises:
      ConfigError: there are fewer than two alphas, or `batch_size` is below 1.

    Examples:
      >>> sweep = build_sweep(lambda params, batch: {"loss": (params["w"] - batch) ** 2}, num_alphas=3)
      >>> sweep({"w": jnp.ones(())}, {"w": -jnp.ones(())}, jnp.zeros((4,))).loss.tolist()
      [1.0, 0.0, 1.0]
    """
    check_counts(2, num_alphas=num_alphas)  # both ends of the path, at least
    # Made on the host in float64, alphas are exact at both ends and in the middle.
    alphas = np.linspace(0.0, 1.0, num_alphas)

    def combine(trees: Sequence[Any], alpha: jax.Array) -> Any:
        params_a, params_b = trees
        return interpolate(params_a, params_b, alpha, roles=roles)

    evaluate = build_evaluation(metrics_fn, combine, batch_size=batch_size, prepare=prepare, roles=roles)

    def sweep(params_a: Any, params_b: Any, data: Any, ends: BarrierCurve | None = None) -> BarrierCurve:
        """Evaluate the path between two networks; see `rebasin.build_sweep`."""
        trees = {"params_a": params_a, "params_b": params_b}
        if ends is None or num_alphas == 2:
            return BarrierCurve(alphas, evaluate(trees, alphas, data))
        return BarrierCurve(alphas, _join_ends(evaluate(trees, alphas[1:-1], data), ends))

    return sweep


def build_evaluation(
    metrics_fn: MetricsFn,
    combine: Callable[[Sequence[Any], jax.Array], Any],
    *,
    batch_size: int | None,
    prepare: Callable[[Any, jax.Array], Any] | None,
    roles: RoleNames,
) -> Callable[[Mapping[str, Any], np.ndarray, Any], dict[str, np.ndarray]]:
    """Make the function that evaluates mixtures of networks on data, in one compiled program.

    Args:
      metrics_fn: ``(params, batch) -> {name: [n]}``, one value for each example.
      combine: ``(trees, point) -> params``, the mixture of networks at a point.
      batch_size: number of examples evaluated at once, `None` for `default_batch_size`.
      prepare: ``(params, point) -> extra``, called once at each point; `metrics_fn` gets its result as third
        argument.
      roles: roles of leaves that would not be found; weights must be finite.

    Returns:
      ``evaluate(trees, points, data) -> {name: [m, n]}``. `trees` are the networks by the names that messages
      call them. `points` is an array ``[m, …]``: alphas ``[m]`` on a path, or weights ``[m, k]`` of k
      networks. Raises TreeMismatchError, NonFiniteError and DataError, as `build_sweep` says.

    Raises:
      ConfigError: `batch_size` is below 1.
    """
    size = default_batch_size() if batch_size is None else batch_size
    check_counts(1, batch_size=size)
    roles = check_roles(roles)
    if prepare is not None and not isinstance(prepare, Partial):
        prepare = Partial(prepare)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def compiled(
        trees: tuple[Any, ...], points: jax.Array, data: Any, prepare: Partial | None
    ) -> Mapping[str, jax.Array]:
        n, batches = num_examples(data), to_batches(data, size)

        def at(point: jax.Array) -> Mapping[str, jax.Array]:
            params = combine(trees, point)
            extra = () if prepare is None else (prepare(params, point),)

            def measure(batch: Any) -> Mapping[str, jax.Array]:
                return _per_example(metrics_fn(params, batch, *extra), num_examples(batch))

            values = jax.lax.map(measure, batches)
            return jax.tree.map(lambda x: x.reshape(-1)[:n], values)

        # `vmap` over points would turn convolutions into grouped ones, nine times slower on the CPU.
        return jax.lax.map(at, points)

    def evaluate(trees: Mapping[str, Any], points: np.ndarray, data: Any) -> dict[str, np.ndarray]:
        (first, reference), *rest = trees.items()
        conformed = (reference, *(conform(reference, tree, names=(first, name)) for name, tree in rest))
        weights = weight_leaves(reference, roles)
        check_weight_dtypes(reference, weights, first)
        for name, tree in zip(trees, conformed, strict=True):
            check_finite(tree, name, leaves=weights)
        check_data(data)
        try:
            values = compiled(conformed, jnp.asarray(points), data, prepare)
        except RebasinError:
            raise
        except (TypeError, ValueError) as error:  # from the user's function, while it is traced
            raise DataError(f"metrics_fn cannot be evaluated on these networks and data: {error}") from error
        return dict(jax.device_get(values))

    return evaluate


def _per_example(values: Any, size: int) -> Mapping[str, jax.Array]:
    """Return what a `metrics_fn` returned for a batch, or raise DataError unless it is one value an example.

    A mean over the batch would count the copies that fill up the last batch, and an array of another shape
    would be cut to the wrong values; neither can be seen in the result.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"metrics_fn must return a dictionary of arrays [n], got {type(values).__name__}")
    wrong = [
        f"{name!r} has shape {jnp.shape(value)}"
        for name, value in values.items()
        if jnp.shape(value) != (size,)
    ]
    if wrong:
        raise DataError(problem_list(f"metrics_fn must return one value for each of {size} examples:", wrong))
    return values


def _join_ends(between: Mapping[str, np.ndarray], ends: BarrierCurve) -> dict[str, np.ndarray]:
    """Put the ends of another curve around the values that lie between them."""
    wanted = {name: values.shape[1] for name, values in between.items()}
    given = {name: values.shape[1] for name, values in ends.examples.items()}
    if wanted != given:
        raise ConfigError(f"ends: wanted metrics and numbers of examples {wanted}, got {given}")
    return {
        name: np.concatenate([ends.examples[name][:1], values, ends.examples[name][-1:]])
        for name, values in between.items()
    }


def sweep(params_a: Any, params_b: Any, data: Any, metrics_fn: MetricsFn, **options: Any) -> BarrierCurve:
    """Evaluate the path between two networks once.

    Every call compiles anew. For more than one path, use `build_sweep` and call its result.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      data: a `rebasin.Batch`, or another tree of arrays ``[n, …]`` with one common n.
      metrics_fn: ``(params, batch) -> {name: [n]}``, one value for each example.
      **options: options of `build_sweep`.

    Returns:
      The curve.

    Raises:
      RebasinError: as `build_sweep` and its result.

    Examples:
      >>> a, b = {"w": jnp.ones(())}, {"w": -jnp.ones(())}
      >>> metrics_fn = lambda params, batch: {"loss": (params["w"] - batch) ** 2}
      >>> sweep(a, b, jnp.zeros(4), metrics_fn, num_alphas=3).loss.tolist()
      [1.0, 0.0, 1.0]
    """
    return build_sweep(metrics_fn, **options)(params_a, params_b, data)
