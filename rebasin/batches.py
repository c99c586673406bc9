"""Data as trees of ``[n, …]`` arrays: checked, and cut into batches of one shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError, DataError, problem_list
from rebasin.trees import leaf_table

__all__ = ["check_batch_size", "check_data", "num_examples", "to_batches"]


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
