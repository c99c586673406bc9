"""The loss of a network over data, for methods that learn a permutation by it."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.batches import check_batch_size, check_data, num_examples, to_batches
from rebasin.errors import DataError
from rebasin.trees import LeafPredicate, leaf_table, map_leaves

__all__ = ["LossFn", "check_loss", "iter_batches", "mean_loss", "weights_of", "with_weights"]

LossFn: TypeAlias = Callable[[Any, Any], jax.Array]  # (params, batch) -> one loss for each example, [n]


def check_loss(loss_fn: LossFn, params: Any, data: Any, batch_size: int, *, user: str) -> None:
    """Checks data, batch size and what `loss_fn` returns, before anything is computed.

    Raises:
      DataError: data are empty or of different lengths, or `loss_fn` does not return one floating number for
        each example.
      ConfigError: `batch_size` is below 1.
    """
    check_data(data, user=user)
    check_batch_size(batch_size)
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
