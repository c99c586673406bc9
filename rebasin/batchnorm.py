"""New running statistics for networks with BatchNorm, as an interpolated network needs them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rebasin.batches import Batches, check_data, map_batches
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, is_weight, leaf_table, map_leaves

__all__ = ["build_norm_reset"]


def build_norm_reset(
    update: Callable[[Any, Any], Any],
    data: Any,
    *,
    batch_size: int = 1000,
    predicate: LeafPredicate = is_weight,
) -> Callable[..., Any]:
    """Makes the function that gives a network new running statistics, as of BatchNorm.

    The model's own training mode measures them. It is assumed to return, for each leaf of statistics,
    ``m · old + (1 − m) · measured`` with one m for the leaf; both are found by calling it with old values of
    zero and of one. Means over all batches replace the leaf. Where ``mean`` and ``var`` stand side by side,
    the variance of the batches' means is added to the mean of their variances.

    Args:
      update: ``(tree, batch) -> tree``, the tree with its statistics updated by a batch, in Flax
        ``lambda v, x: v | model.apply(v, x, train=True, mutable=["batch_stats"])[1]``.
      data: tree of arrays ``[n, …]``.
      batch_size: examples evaluated at once; a last, shorter batch is left out.
      predicate: ``(path, leaf) -> bool``, the leaves that are weights; floating leaves that are not, and that
        `update` changes, are replaced.

    Returns:
      ``reset(tree, alpha=None) -> tree``, for use by itself or as `build_sweep`'s ``prepare``, under ``jit``
      too. It raises TreeMismatchError if `update` returns another tree than it got. It is a
      `jax.tree_util.Partial` that holds the data: a function under ``jit`` that takes it as an argument takes
      them as arguments, while one that closes over it is compiled with a copy of them inside.

    Raises:
      ConfigError: an empty batch.
      DataError: the data are empty, or of different lengths.

    Examples:
      >>> tree = {"params": {}, "batch_stats": {"mean": jnp.zeros(2)}}
      >>> def update(tree, batch):
      ...     old = tree["batch_stats"]["mean"]
      ...     return {"params": {}, "batch_stats": {"mean": 0.9 * old + 0.1 * jnp.mean(batch, axis=0)}}
      >>> reset = build_norm_reset(update, jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      >>> reset(tree)["batch_stats"]["mean"].round(4).tolist()
      [2.0, 4.0]
    """
    check_data(data, batch_size)
    data = jax.tree.map(jnp.asarray, data)
    check_finite(data, "data")
    batches = Batches.of(data, batch_size)._replace(rest=0)

    def reset(data: Any, tree: Any, alpha: Any = None) -> Any:
        """The tree with new statistics; see `rebasin.build_norm_reset`."""
        del alpha
        names = [
            path
            for path, x in leaf_table(tree).items()
            if not predicate(path, x) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
        ]

        def filled(value: float) -> Any:
            return map_leaves(lambda path, x: jnp.full_like(x, value) if path in names else x, tree)

        def measure(batch: Any, _: None) -> dict[str, tuple[jax.Array, jax.Array]]:
            zero, one = (update(filled(value), batch) for value in (0.0, 1.0))
            check_same_shapes(tree, zero, names=("the tree", "what update returns"))
            found = leaf_table(zero), leaf_table(one)
            return {path: _measured(*(table[path] for table in found)) for path in names}

        return _with_statistics(tree, map_batches(measure, data, batches))

    return Partial(reset, data)


def _measured(zero: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a batch measured, and m, from the updates of zero and of one."""
    # The difference is most exact where what is added to both is least.
    at = jnp.argmin(jnp.abs(zero))
    momentum = one.reshape(-1)[at] - zero.reshape(-1)[at]
    return jnp.where(momentum == 1, 0, zero / jnp.where(momentum == 1, 1, 1 - momentum)), momentum


def _with_statistics(tree: Any, measured: dict[str, tuple[jax.Array, jax.Array]]) -> Any:
    """The tree with means over the batches; leaves that were not updated, with m = 1, stay."""

    def new(path: str, x: jax.Array) -> jax.Array:
        if path not in measured:
            return x
        values, momentum = measured[path]
        mean = jnp.mean(values, axis=0)
        parent, _, name = path.rpartition("/")
        sibling = f"{parent}/mean".strip("/")
        if name == "var" and sibling in measured:
            mean += jnp.var(measured[sibling][0], axis=0)
        return jnp.where(momentum[0] == 1, x, mean.astype(x.dtype))

    return map_leaves(new, tree)
