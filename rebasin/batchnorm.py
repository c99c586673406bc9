"""New running statistics for networks with BatchNorm, which interpolated networks need."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rebasin.batches import Batches, check_data, inputs_of, map_batches
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, is_weight, leaf_table, map_leaves

__all__ = ["build_norm_reset"]


def build_norm_reset(
    update_fn: Callable[..., Any],
    data: Any,
    *,
    batch_size: int = 1000,
    predicate: LeafPredicate = is_weight,
) -> Callable[..., Any]:
    """Build a function that gives a network new running statistics, such as those of BatchNorm.

    The training mode of the model itself measures them. It is assumed to return, for each leaf of statistics,
    ``m · old + (1 − m) · measured`` with one m for the whole leaf. Both are found by calling it with old
    values of zero and of one. The mean of what was measured over all batches replaces the leaf. Where
    ``mean`` and ``var`` stand side by side, the variance of the batches' means is added to the mean of their
    variances.

    Args:
      update_fn: ``(params, *inputs) -> params``, the tree with its statistics updated by a batch; in Flax
        ``lambda v, x: v | model.apply(v, x, train=True, mutable=["batch_stats"])[1]``.
      data: a `rebasin.Batch`, whose labels are ignored, or its inputs alone, arrays ``[n, …]`` with one
        common n.
      batch_size: number of examples that are evaluated at once; a last, shorter batch is left out.
      predicate: ``(path, leaf) -> bool``, the leaves that are weights. Floating leaves that are not weights,
        and that `update_fn` changes, are replaced.

    Returns:
      ``reset(params, alpha=None) -> params``, for use by itself or as the ``prepare`` that `build_sweep`
      takes; it runs under ``jit``. It raises TreeMismatchError if `update_fn` returns another tree than it
      got. It is a `jax.tree_util.Partial` that holds the data, so it can be an argument of a function under
      ``jit``; a function that closes over it is compiled with a copy of the data inside.

    Raises:
      ConfigError: a batch would be empty.
      DataError: the data are empty, or of different lengths.
      NonFiniteError: an input is NaN or infinite.

    Examples:
      >>> params = {"w": {}, "batch_stats": {"mean": jnp.zeros(2)}}
      >>> def update_fn(params, x):
      ...     old = params["batch_stats"]["mean"]
      ...     return {"w": {}, "batch_stats": {"mean": 0.9 * old + 0.1 * jnp.mean(x, axis=0)}}
      >>> reset = build_norm_reset(update_fn, jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      >>> reset(params)["batch_stats"]["mean"].round(4).tolist()
      [2.0, 4.0]
    """
    check_data(data, batch_size)
    inputs = jax.tree.map(jnp.asarray, inputs_of(data))
    check_finite(inputs, "data")
    batches = Batches.of(inputs, batch_size)._replace(rest=0)

    def reset(inputs: tuple[Any, ...], params: Any, alpha: Any = None) -> Any:
        """Return the tree with new statistics; see `rebasin.build_norm_reset`."""
        del alpha
        paths = [
            path
            for path, x in leaf_table(params).items()
            if not predicate(path, x) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
        ]

        def filled(value: float) -> Any:
            return map_leaves(lambda path, x: jnp.full_like(x, value) if path in paths else x, params)

        def measure(batch: tuple[Any, ...], _: None) -> dict[str, tuple[jax.Array, jax.Array]]:
            zero, one = (update_fn(filled(value), *batch) for value in (0.0, 1.0))
            check_same_shapes(params, zero, names=("the tree", "what update_fn returns"))
            from_zero, from_one = leaf_table(zero), leaf_table(one)
            return {path: _measured(from_zero[path], from_one[path]) for path in paths}

        return _with_statistics(params, map_batches(measure, inputs, batches))

    return Partial(reset, inputs)


def _measured(zero: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what a batch measured, and m, from the updates of zero and of one."""
    # The difference is most exact where the value that was added to both is smallest.
    at = jnp.argmin(jnp.abs(zero))
    momentum = one.reshape(-1)[at] - zero.reshape(-1)[at]
    return jnp.where(momentum == 1, 0, zero / jnp.where(momentum == 1, 1, 1 - momentum)), momentum


def _with_statistics(params: Any, measured: dict[str, tuple[jax.Array, jax.Array]]) -> Any:
    """Replace statistics by their means over the batches; leaves that were not updated, with m = 1, stay."""

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

    return map_leaves(new, params)
