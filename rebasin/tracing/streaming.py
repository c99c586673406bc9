"""Sums over a whole split in one compiled program, batch by batch, in compensated float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.errors import ConfigError, DataError, problem_list
from rebasin.trees import leaf_table

__all__ = ["Batches", "Sum", "batch_shapes", "check_examples", "map_batches", "sum_batches"]


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
