"""Data as trees of ``[n, …]`` arrays: checked, and cut into batches of one shape."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.errors import ConfigError, DataError, problem_list
from rebasin.trees import leaf_table

__all__ = [
    "Batch",
    "Batches",
    "Sum",
    "batch_shapes",
    "check_batch_size",
    "check_data",
    "check_examples",
    "inputs_of",
    "map_batches",
    "num_examples",
    "sum_batches",
    "to_batches",
]


def check_data(data: Any, *, user: str) -> None:
    """Raises `DataError` unless `data` is a tree of arrays ``[n, …]`` with one common n of at least 1.

    Args:
      data: the tree.
      user: what needs the data, for the message.
    """
    lengths = {path: np.shape(leaf)[0] if np.ndim(leaf) else None for path, leaf in leaf_table(data).items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        problems = [
            f"{path or 'data'}: {'scalar' if n is None else f'{n} examples'}" for path, n in lengths.items()
        ]
        raise DataError(
            problem_list("data must be arrays [n, …] with one common n:", problems or ["no arrays"])
        )
    if 0 in lengths.values():
        raise DataError(f"data hold no examples: {user} needs at least one")


def check_batch_size(batch_size: int) -> None:
    """Raises `ConfigError` for an empty batch."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")


def num_examples(data: Any) -> int:
    """The common n of data that `check_data` accepts."""
    return np.shape(jax.tree.leaves(data)[0])[0]


def to_batches(data: Any, batch_size: int) -> Any:
    """Every array ``[n, …]`` as ``[ceil(n / size), size, …]``, with size the smaller of `batch_size` and n.

    Copies of the first example fill the last batch: real data rather than zeros, so that nothing can be NaN
    that would not be NaN anyway. Whoever evaluates them drops their values.

    Examples:
      >>> to_batches(jnp.arange(5), 2).tolist()
      [[0, 1], [2, 3], [4, 0]]
    """
    size = min(batch_size, num_examples(data))

    def cut(x: jax.Array) -> jax.Array:
        missing = -x.shape[0] % size
        filled = jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)]) if missing else x
        return filled.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(cut, data)


class Batch(NamedTuple):
    """Examples of a dataset: what a network takes, and what it should answer.

    Attributes:
      inputs: an array ``[n, …]``, or a tuple of arrays that the network takes one by one.
      labels: an array ``[n, …]``, or `None` where only the inputs matter.
    """

    inputs: Any
    labels: Any = None


def inputs_of(data: Any) -> tuple[Any, ...]:
    """Return the arguments that a network takes after its parameters.

    Args:
      data: a `Batch`, whose labels are ignored, or the inputs themselves: one tree of arrays ``[n, …]``, or a
        tuple of such trees, which the network takes one by one.

    Examples:
      >>> inputs_of(Batch(1, labels=2)), inputs_of((1, 2)), inputs_of(1)
      ((1,), (1, 2), (1,))
    """
    inputs = data.inputs if isinstance(data, Batch) else data
    return inputs if isinstance(inputs, tuple) else (inputs,)


class Sum(NamedTuple):
    """A running sum of Kahan's: `total` and what rounding has added to it too much, trees of equal shapes."""

    total: Any
    excess: Any

    def add(self, values: Any) -> "Sum":
        """The sum with one more term."""

        def one(total: jax.Array, excess: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            corrected = value - excess
            new = total + corrected
            return new, (new - total) - corrected

        pairs = jax.tree.map(one, self.total, self.excess, values)
        return Sum(*(jax.tree.map(lambda _, pair, i=i: pair[i], self.total, pairs) for i in range(2)))

    def value(self) -> Any:
        """The sum on the host, in float64."""
        return jax.tree.map(
            lambda total, excess: np.asarray(total, np.float64) - np.asarray(excess, np.float64), *self
        )


class Batches(NamedTuple):
    """How a split falls into batches: `count` whole ones of `size`, and one of `rest` examples if not 0.

    The last batch is short rather than filled up: a sum must not count what was filled in, and no mask would
    tell it apart in a value whose first axis is not that of the examples.
    """

    size: int
    count: int
    rest: int

    @classmethod
    def of(cls, data: Any, batch_size: int) -> "Batches":
        """The batches of a split."""
        n = np.shape(jax.tree.leaves(data)[0])[0]
        size = min(batch_size, n)
        return cls(size, n // size, n % size)

    @property
    def sizes(self) -> np.ndarray:
        """Number of examples of each batch."""
        return np.array([self.size] * self.count + [self.rest] * (self.rest > 0))


def batch_shapes(data: Any, size: int) -> Any:
    """Shapes of a batch of `size` examples."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *np.shape(x)[1:]), jnp.result_type(x)), data)


def sum_batches(function: Callable[[Any], Any], data: Any, batches: Batches) -> Sum:
    """The sum of ``function(batch)`` over the batches of a split, for use under ``jit``.

    Args:
      function: a batch to a tree of floating arrays whose shapes do not depend on the number of examples.
      data: tree of arrays ``[n, …]``.
      batches: how to cut it.

    Returns:
      The sum. Its memory does not depend on the number of batches.
    """
    shapes = jax.eval_shape(function, batch_shapes(data, batches.size))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(i: jax.Array, total: Sum) -> Sum:
        return total.add(function(_take(data, i * batches.size, batches.size)))

    total = lax.fori_loop(0, batches.count, step, Sum(zeros, zeros))
    if batches.rest:
        total = total.add(function(_take(data, batches.count * batches.size, batches.rest)))
    return total


def map_batches(
    function: Callable[[Any, Any], Any], data: Any, batches: Batches, *, extras: Any = None
) -> Any:
    """``function(batch, extra)`` of every batch, stacked along a first axis, for use under ``jit``.

    Args:
      function: to a tree of arrays whose shapes do not depend on the number of examples.
      data: tree of arrays ``[n, …]``.
      batches: how to cut it.
      extras: tree of arrays ``[number of batches, …]``, of which each batch gets its own; or `None`.

    Returns:
      A tree of arrays ``[number of batches, …]``.
    """

    def step(_: None, i: jax.Array) -> tuple[None, Any]:
        extra = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), extras)
        return None, function(_take(data, i * batches.size, batches.size), extra)

    _, results = lax.scan(step, None, jnp.arange(batches.count))
    if batches.rest:
        extra = jax.tree.map(lambda x: x[batches.count], extras)
        last = function(_take(data, batches.count * batches.size, batches.rest), extra)
        results = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), results, last)
    return results


def _take(data: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(jnp.asarray(x), start, size), data)


def check_examples(data: Any, batch_size: int) -> None:
    """Raises `DataError` unless `data` is a tree of arrays ``[n, …]`` with one common n above zero.

    A batch size below one is a ConfigError.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    lengths = {path: np.shape(leaf)[0] if np.ndim(leaf) else None for path, leaf in leaf_table(data).items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        problems = [
            f"{path or 'data'}: {'scalar' if n is None else f'{n} examples'}" for path, n in lengths.items()
        ]
        raise DataError(
            problem_list("data must be arrays [n, …] with one common n:", problems or ["no arrays"])
        )
    if 0 in lengths.values():
        raise DataError("data hold no examples: statistics need at least one")
