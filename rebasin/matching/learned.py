"""What the methods share that learn a permutation by gradient descent on a loss."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.barrier import MetricsFn
from rebasin.batches import batch_shapes, check_data, num_examples, to_batches
from rebasin.errors import DataError, NonFiniteError, RebasinError
from rebasin.matching.result import MatchResult, same_permutation
from rebasin.permutation import Permutation
from rebasin.trees import leaf_table, map_leaves

__all__ = [
    "LossHistory",
    "check_metrics",
    "check_step",
    "import_optax",
    "iter_batches",
    "mean_loss",
    "weights_of",
    "with_weights",
]


def check_metrics(metrics_fn: MetricsFn, params: Any, data: Any, batch_size: int) -> None:
    """Check data, batch size and what `metrics_fn` returns, before anything is computed.

    Args:
      metrics_fn: ``(params, batch) -> {"loss": [n], …}``.
      params: a tree that `metrics_fn` takes.
      data: tree of arrays ``[n, …]``.
      batch_size: number of examples of a batch.

    Raises:
      DataError: the data are empty or of different lengths, or `metrics_fn` does not return a mapping whose
        "loss" is one floating number for each example.
      ConfigError: `batch_size` is below 1.
    """
    check_data(data, batch_size)
    size = min(batch_size, num_examples(data))
    try:
        metrics = jax.eval_shape(metrics_fn, params, batch_shapes(data, size))
    except RebasinError:
        raise
    except (TypeError, ValueError) as error:  # from the user's function, while it is traced
        raise DataError(f"metrics_fn cannot be evaluated on these networks and data: {error}") from error
    if not isinstance(metrics, Mapping) or "loss" not in metrics:
        got = f"the keys {list(metrics)}" if isinstance(metrics, Mapping) else _describe(metrics)
        raise DataError(f'metrics_fn must return a dictionary with the key "loss"; got {got}')
    losses = metrics["loss"]
    is_floating = isinstance(losses, jax.ShapeDtypeStruct) and jnp.issubdtype(losses.dtype, jnp.floating)
    if not is_floating or losses.shape != (size,):
        raise DataError(
            f'metrics_fn must return one "loss" for each example, a floating array of shape ({size},) '
            f"for a batch of {size}; got {_describe(losses)}"
        )


def _describe(value: Any) -> str:
    """Return what kind of value a function returned, for a message."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"


@functools.partial(jax.jit, static_argnames=("metrics_fn", "batch_size"))
def mean_loss(params: Any, data: Any, *, metrics_fn: MetricsFn, batch_size: int) -> jax.Array:
    """Return the mean loss over all data, computed batch by batch in one compiled program."""
    losses = jax.lax.map(lambda batch: metrics_fn(params, batch)["loss"], to_batches(data, batch_size))
    return jnp.mean(losses.reshape(-1)[: num_examples(data)])


def iter_batches(key: jax.Array, data: Any, batch_size: int) -> Iterator[Any]:
    """Yield shuffled batches of equal size without end.

    Each epoch is a new shuffle of all data. Examples at its end that do not fill a whole batch are left out,
    since a batch of another size would be compiled separately.
    """
    n = num_examples(data)
    size = min(batch_size, n)
    epoch = 0
    while True:
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), n))
        for first in range(0, n - size + 1, size):
            chosen = order[first : first + size]
            yield jax.tree.map(lambda x, chosen=chosen: x[chosen], data)
        epoch += 1


def weights_of(tree: Any, weights: Collection[str]) -> dict[str, Any]:
    """Return the leaves of the path names `weights`, by path name."""
    return {path: leaf for path, leaf in leaf_table(tree).items() if path in weights}


def with_weights(tree: Any, weights: Mapping[str, Any]) -> Any:
    """Return the tree with the leaves in `weights`, given by path name, in place of its own."""
    return map_leaves(lambda path, leaf: weights.get(path, leaf), tree)


@dataclasses.dataclass(frozen=True)
class LossHistory:
    """The losses of the permutations that a method has reached, and the best of these permutations.

    A history is never changed: `begin` makes the first one, and `after_step` returns the next.

    Attributes:
      current: the permutation reached last, int32 rows.
      best: the permutation with the least loss; the first of several.
      losses: the loss at the start and after each step.
      evaluations: how often the loss was computed; it is not computed again for an unchanged permutation.
      converged: whether the last step left the permutation unchanged; true before the first step.
    """

    current: dict[str, np.ndarray]
    best: dict[str, np.ndarray]
    losses: tuple[float, ...]
    evaluations: int
    converged: bool

    @classmethod
    def begin(cls, start: Permutation, loss: Callable[[Permutation], float]) -> "LossHistory":
        """Make the history that holds nothing but the start.

        Raises:
          NonFiniteError: the loss of the start is NaN or infinite.
        """
        rows = _int32_rows(start)
        return cls(rows, rows, (_finite(loss(rows)),), 1, True)

    def after_step(self, permutation: Permutation, loss: Callable[[Permutation], float]) -> "LossHistory":
        """Return the history with one more step, which ended at `permutation`.

        Raises:
          NonFiniteError: the loss of the permutation is NaN or infinite.
        """
        rows = _int32_rows(permutation)
        if same_permutation(rows, self.current):
            return LossHistory(
                self.current, self.best, (*self.losses, self.losses[-1]), self.evaluations, True
            )
        value = _finite(loss(rows))
        best = rows if value < min(self.losses) else self.best
        return LossHistory(rows, best, (*self.losses, value), self.evaluations + 1, False)

    @property
    def objective(self) -> float:
        """The best objective so far: minus the least loss."""
        return -min(self.losses)

    def result(self, stats: Mapping[str, Any]) -> MatchResult:
        """Return the match: the best permutation, and the best objective so far after each step.

        ``losses`` and ``evaluations`` are added to `stats`.
        """
        losses = np.array(self.losses)
        objective = np.maximum.accumulate(-losses)
        stats = {**stats, "losses": losses, "evaluations": self.evaluations}
        return MatchResult(self.best, objective, len(losses) - 1, self.converged, stats)


def _int32_rows(permutation: Permutation) -> dict[str, np.ndarray]:
    return {group: np.asarray(row, np.int32) for group, row in permutation.items()}


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss between the networks is {loss}: nothing can be learned from it")
    return loss


def check_step(step: int, gradient: Mapping[str, Any], loss: Any) -> None:
    """Raise `NonFiniteError` if the loss of a step, or any array of its gradient, is not finite."""
    if not math.isfinite(float(loss)):
        raise NonFiniteError(f"step {step}: the loss is {float(loss)}")
    wrong = [name for name, values in gradient.items() if not np.isfinite(values).all()]
    if wrong:
        raise NonFiniteError(f"step {step}: the gradient is not finite in {wrong}")


def import_optax(user: str) -> Any:
    """Import Optax, which only the methods that learn need, and return it.

    Args:
      user: name of the function that needs Optax, for the message.

    Raises:
      RebasinError: Optax is not installed.
    """
    try:
        import optax
    except ImportError as error:
        raise RebasinError(
            f"{user} needs Optax, which is not installed: pip install 'rebasin-jax[sinkhorn]', or optax alone"
        ) from error
    return optax
