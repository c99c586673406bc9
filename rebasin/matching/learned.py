"""The loss of a network over data, for methods that learn a permutation by it."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.batches import check_data, num_examples, to_batches
from rebasin.errors import DataError, NonFiniteError, RebasinError
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation
from rebasin.trees import LeafPredicate, leaf_table, map_leaves

__all__ = [
    "LossFn",
    "Search",
    "check_loss",
    "check_step",
    "import_optax",
    "iter_batches",
    "mean_loss",
    "weights_of",
    "with_weights",
]


LossFn: TypeAlias = Callable[[Any, Any], jax.Array]  # (params, batch) -> one loss for each example, [n]


def check_loss(loss_fn: LossFn, params: Any, data: Any, batch_size: int, *, user: str) -> None:
    """Checks data, batch size and what `loss_fn` returns, before anything is computed.

    Raises:
      DataError: data are empty or of different lengths, or `loss_fn` does not return one floating number for
        each example.
      ConfigError: `batch_size` is below 1.
    """
    check_data(data, batch_size)
    size = min(batch_size, num_examples(data))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *np.shape(x)[1:]), jnp.result_type(x)), data)
    losses = jax.eval_shape(loss_fn, params, batch)
    is_array = isinstance(losses, jax.ShapeDtypeStruct)
    if not is_array or losses.shape != (size,) or not jnp.issubdtype(losses.dtype, jnp.floating):
        got = f"{losses.dtype} array of shape {losses.shape}" if is_array else f"a {type(losses).__name__}"
        raise DataError(
            f"loss_fn must return one loss for each example, a floating array of shape ({size},) "
            f"for a batch of {size}; got {got}"
        )


@functools.partial(jax.jit, static_argnames=("loss_fn", "batch_size"))
def mean_loss(params: Any, data: Any, *, loss_fn: LossFn, batch_size: int) -> jax.Array:
    """Mean of `loss_fn` over all data, batch by batch in one compiled pass."""
    losses = jax.lax.map(lambda batch: loss_fn(params, batch), to_batches(data, batch_size))
    return jnp.mean(losses.reshape(-1)[: num_examples(data)])


def iter_batches(key: jax.Array, data: Any, batch_size: int) -> Iterator[Any]:
    """Shuffled batches without end, of equal size; what does not fill a last batch sits an epoch out."""
    n = num_examples(data)
    size = min(batch_size, n)
    epoch = 0
    while True:
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), n))
        for first in range(0, n - size + 1, size):
            chosen = order[first : first + size]
            yield jax.tree.map(lambda x, chosen=chosen: x[chosen], data)
        epoch += 1


def weights_of(tree: Any, predicate: LeafPredicate) -> dict[str, Any]:
    """The leaves that count, by path."""
    return {path: leaf for path, leaf in leaf_table(tree).items() if predicate(path, leaf)}


def with_weights(tree: Any, weights: Mapping[str, Any]) -> Any:
    """The tree with some of its leaves, by path, in place of its own."""
    return map_leaves(lambda path, leaf: weights.get(path, leaf), tree)


class Search:
    """Keeps the best of all permutations that a method meets, by their loss.

    Attributes:
      current: the permutation offered last, int32 rows.
    """

    def __init__(self, loss: Callable[[Permutation], float], start: Permutation) -> None:
        self._loss = loss
        self.current = _rows(start)
        value = self._evaluate(self.current)
        self._best, self._best_loss = self.current, value
        self._losses, self._objective, self._evaluations = [value], [-value], 1
        self._unchanged = True

    def offer(self, permutation: Permutation) -> None:
        """Takes the permutation that a step ended at."""
        rows = _rows(permutation)
        self._unchanged = all(np.array_equal(row, self.current[group]) for group, row in rows.items())
        value = self._losses[-1]
        if not self._unchanged:
            self.current, value = rows, self._evaluate(rows)
            self._evaluations += 1
        if value < self._best_loss:
            self._best, self._best_loss = rows, value
        self._losses.append(value)
        self._objective.append(-self._best_loss)

    def result(self, stats: Mapping[str, Any]) -> MatchResult:
        """The match, with ``losses`` and ``evaluations`` added to `stats`."""
        stats = {**stats, "losses": np.array(self._losses), "evaluations": self._evaluations}
        num_iterations = len(self._objective) - 1
        return MatchResult(self._best, np.array(self._objective), num_iterations, self._unchanged, stats)

    def _evaluate(self, permutation: Permutation) -> float:
        value = self._loss(permutation)
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss between the networks is {value}: nothing can be learned from it")
        return value


def check_step(step: int, gradient: Mapping[str, Any], loss: Any) -> None:
    """Raises `NonFiniteError` if the loss of a step, or its gradient in any array, is not finite."""
    if not math.isfinite(float(loss)):
        raise NonFiniteError(f"step {step}: the loss is {float(loss)}")
    wrong = [name for name, values in gradient.items() if not np.isfinite(values).all()]
    if wrong:
        raise NonFiniteError(f"step {step}: the gradient is not finite in {wrong}")


def import_optax(user: str) -> Any:
    """Optax, which only methods that learn need."""
    try:
        import optax
    except ImportError as error:
        raise RebasinError(
            f"{user} needs Optax, which is not installed: pip install 'rebasin-jax[sinkhorn]', or optax alone"
        ) from error
    return optax


def _rows(permutation: Permutation) -> dict[str, np.ndarray]:
    return {group: np.asarray(row, np.int32) for group, row in permutation.items()}
