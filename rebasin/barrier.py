"""Loss and error along the segment between two networks, and its barrier."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rebasin.batches import Batch, check_batch_size, check_data, inputs_of, num_examples, to_batches
from rebasin.compilation import compiler_options
from rebasin.errors import ConfigError
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, interpolate, is_weight, leaf_table

__all__ = [
    "Barrier",
    "BarrierCurve",
    "Convention",
    "MetricsFn",
    "build_sweep",
    "classification_metrics",
    "sweep",
]

# (params, batch) -> per-example values, for example {"loss": [n], "error": [n]}; with `prepare`, its result
# third.
MetricsFn: TypeAlias = Callable[..., Mapping[str, jax.Array]]

Convention = Literal["chord", "endpoint_mean", "midpoint"]


class Barrier(NamedTuple):
    """The height of a barrier.

    Attributes:
      value: in the unit of the metric (nats for cross entropy, a fraction for 0–1 error).
      standard_error: of `value` over the examples, at the α of the maximum, paired: the endpoints were
        measured on the same examples.
      alpha: where on the segment the barrier stands; 1 is network A.
    """

    value: float
    standard_error: float
    alpha: float


class BarrierCurve(NamedTuple):
    """Per-example values of every metric along the segment αA + (1−α)B.

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
        return {name: _standard_error(values) for name, values in self.examples.items()}

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
        """The barrier of Eq. 1 in 0–1 error; see `barrier`."""
        return self.barrier("error")

    def barrier(self, metric: str, *, convention: Convention = "chord") -> Barrier:
        """The height of the barrier in one metric.

        Args:
          metric: a name in `examples`.
          convention: ``"chord"`` is Eq. 1 of arXiv 2404.06498, max over α of ℓ(αA + (1−α)B) − αℓ(A) −
            (1−α)ℓ(B); never negative, since the ends belong to the curve. ``"endpoint_mean"`` is max over α
            of ℓ(αA + (1−α)B) − ½(ℓ(A) + ℓ(B)). ``"midpoint"`` is the chord's height at α = ½ alone, which may
            be negative and needs an odd number of alphas.

        Returns:
          The barrier with its standard error over the examples and its α.

        Raises:
          ConfigError: unknown metric or convention, or no α = ½.

        Examples:
          >>> losses = np.array([[1.0, 3.0], [6.0, 6.0], [1.0, 1.0]])
          >>> BarrierCurve(np.array([0.0, 0.5, 1.0]), {"loss": losses}).loss_barrier
          Barrier(value=4.5, standard_error=0.5, alpha=0.5)
        """
        if metric not in self.examples:
            raise ConfigError(f"no metric {metric!r} in this curve; it has {sorted(self.examples)}")
        values = np.asarray(self.examples[metric], np.float64)
        alphas = np.asarray(self.alphas, np.float64)[:, None]
        chord = alphas * values[-1] + (1 - alphas) * values[0]
        if convention == "chord":
            excess = values - chord
            at = int(excess.mean(axis=1).argmax())
        elif convention == "endpoint_mean":
            excess = values - 0.5 * (values[-1] + values[0])
            at = int(excess.mean(axis=1).argmax())
        elif convention == "midpoint":
            excess, at = values - chord, len(alphas) // 2
            if alphas[at, 0] != 0.5:
                raise ConfigError(f"the midpoint needs an odd number of alphas, got {len(alphas)}")
        else:
            raise ConfigError(
                f"unknown convention {convention!r}; known: 'chord', 'endpoint_mean', 'midpoint'"
            )
        return Barrier(
            float(excess[at].mean()), float(_standard_error(excess[at : at + 1])[0]), float(self.alphas[at])
        )


def _standard_error(values: np.ndarray) -> np.ndarray:
    n = values.shape[1]
    if n < 2:
        return np.full(len(values), np.nan)
    return values.std(axis=1, ddof=1, dtype=np.float64) / math.sqrt(n)


def classification_metrics(apply_fn: Callable[..., jax.Array]) -> MetricsFn:
    """Build the function that measures a classifier: cross entropy and 0–1 error of each example.

    Args:
      apply_fn: ``(params, *inputs) -> logits``, of shape [n, classes].

    Returns:
      ``metrics_fn(params, batch, *extra) -> {"loss": [n], "error": [n]}`` for a `rebasin.batches.Batch` with
      integer labels [n]. The loss is the softmax cross entropy in nats. `extra` is passed on to `apply_fn`
      after the inputs.

    Examples:
      >>> metrics_fn = classification_metrics(lambda params, x: x * params)
      >>> batch = Batch(jnp.array([[0.0, 0.0], [0.0, 9.0]]), labels=jnp.array([0, 0]))
      >>> {name: [round(float(x), 3) for x in values] for name, values in metrics_fn(1.0, batch).items()}
      {'loss': [0.693, 9.0], 'error': [0.0, 1.0]}
    """

    def metrics_fn(params: Any, batch: Batch, *extra: Any) -> dict[str, jax.Array]:
        logits = apply_fn(params, *inputs_of(batch), *extra)
        labels = jnp.asarray(batch.labels)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        error = (jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32)
        return {"loss": jax.nn.logsumexp(logits, axis=-1) - chosen, "error": error}

    return metrics_fn


def build_sweep(
    metrics_fn: MetricsFn,
    *,
    num_alphas: int = 25,
    batch_size: int = 500,
    prepare: Callable[[Any, jax.Array], Any] | None = None,
    predicate: LeafPredicate = is_weight,
) -> Callable[..., BarrierCurve]:
    """Makes the function that measures a segment; build it once and call it often.

    The whole sweep is one compiled program: a loop over alphas around a loop over batches, over data that
    stays on the device. It is compiled once for a shape of networks and data, whatever their values.

    Args:
      metrics_fn: ``(params, batch) -> {name: [n]}``, one value per example.
      num_alphas: equally spaced points on the segment, both ends included; 25 in the paper.
      batch_size: examples evaluated at once. The last batch is filled up with copies of the first example,
        whose values are dropped.
      prepare: ``(params, alpha) -> extra`` is called once per point, and its result passed to `metrics_fn` as
        third argument: for REPAIR, or for statistics of BatchNorm. Arrays that it needs are best bound to it
        by `jax.tree_util.Partial`, as `build_repair` and `build_norm_reset` do: they are then arguments of
        the compiled program, where those of a closure are copied into it.
      predicate: the leaves that are averaged; `trees.interpolate` tells what happens to the others.

    Returns:
      ``measure(params_a, params_b, data, ends=None) -> BarrierCurve``, where `data` is a tree of arrays
      ``[n, …]`` with one common n. `ends` is a curve on the same data between networks that compute the same
      functions as A and B, for example before a permutation: its values at both ends are taken, and only
      what lies between is evaluated. It raises TreeMismatchError where A and B differ in shape,
      NonFiniteError where a weight is NaN or infinite, DataError where the data are empty or of different
      lengths, ConfigError where `ends` is a curve of other metrics or of another number of examples.

    Raises:
      ConfigError: fewer than two alphas, or an empty batch.

    Examples:
      >>> measure = build_sweep(lambda params, batch: {"loss": (params["w"] - batch) ** 2}, num_alphas=3)
      >>> measure({"w": jnp.ones(())}, {"w": -jnp.ones(())}, jnp.zeros((4,))).loss.tolist()
      [1.0, 0.0, 1.0]
    """
    if num_alphas < 2:
        raise ConfigError(
            f"a sweep needs both ends of the segment: num_alphas must be at least 2, got {num_alphas}"
        )
    check_batch_size(batch_size)
    # In float64 on the host and exact at both ends and at the middle.
    alphas = np.linspace(0.0, 1.0, num_alphas)

    if prepare is not None and not isinstance(prepare, Partial):
        prepare = Partial(prepare)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def evaluate(
        params_a: Any, params_b: Any, data: Any, alphas: Any, prepare: Partial | None
    ) -> Mapping[str, jax.Array]:
        n, batches = num_examples(data), to_batches(data, batch_size)

        def at(alpha: jax.Array) -> Mapping[str, jax.Array]:
            params = interpolate(params_a, params_b, alpha, predicate=predicate)
            extra = () if prepare is None else (prepare(params, alpha),)
            values = jax.lax.map(lambda batch: metrics_fn(params, batch, *extra), batches)
            return jax.tree.map(lambda x: x.reshape(-1)[:n], values)

        # `vmap` over alphas would turn convolutions into grouped ones, nine times slower on the CPU.
        return jax.lax.map(at, alphas)

    def measure(params_a: Any, params_b: Any, data: Any, ends: BarrierCurve | None = None) -> BarrierCurve:
        """Measures the segment between two networks; see `rebasin.build_sweep`."""
        check_same_shapes(params_a, params_b)
        for tree, name in ((params_a, "params_a"), (params_b, "params_b")):
            check_finite({p: leaf for p, leaf in leaf_table(tree).items() if predicate(p, leaf)}, name)
        check_data(data, user="a barrier")
        if ends is None or num_alphas == 2:
            between = evaluate(params_a, params_b, data, jnp.asarray(alphas), prepare)
            return BarrierCurve(alphas, dict(jax.device_get(between)))
        between = jax.device_get(evaluate(params_a, params_b, data, jnp.asarray(alphas[1:-1]), prepare))
        return BarrierCurve(alphas, _join_ends(between, ends))

    return measure


def _join_ends(between: Mapping[str, np.ndarray], ends: BarrierCurve) -> dict[str, np.ndarray]:
    """Values between two networks, with those at both ends from another curve."""
    wanted = {name: values.shape[1] for name, values in between.items()}
    given = {name: values.shape[1] for name, values in ends.examples.items()}
    if wanted != given:
        raise ConfigError(f"ends: wanted metrics and numbers of examples {wanted}, got {given}")
    return {
        name: np.concatenate([ends.examples[name][:1], values, ends.examples[name][-1:]])
        for name, values in between.items()
    }


def sweep(params_a: Any, params_b: Any, data: Any, metrics_fn: MetricsFn, **options: Any) -> BarrierCurve:
    """Builds a sweep and calls it once; every call compiles anew, so build it yourself for more than one.

    Args:
      params_a: tree of A.
      params_b: tree of B.
      data: tree of arrays ``[n, …]``.
      metrics_fn: as in `build_sweep`.
      **options: passed to `build_sweep`.

    Returns:
      The curve.
    """
    return build_sweep(metrics_fn, **options)(params_a, params_b, data)
