"""Averages of aligned networks.

`rebasin.matching.many` aligns several networks, and `rebasin.landscape` measures all their averages.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError
from rebasin.trees import LeafPredicate, check_same_shapes, is_weight, map_leaves, real_dtype

__all__ = ["average", "mix"]


def average(
    trees: Sequence[Any],
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    predicate: LeafPredicate = is_weight,
) -> Any:
    """Average networks, which should be aligned.

    Leaves that `predicate` leaves out (counters, running statistics) are not averaged. They are taken from
    the network with the largest weight, the first of several. The average of two networks with the weights α
    and 1 − α is `rebasin.interpolate`.

    Args:
      trees: networks of equal leaves, shapes and dtypes, at least one.
      weights: one number for each network, none negative; they are divided by their sum. By default all are
        equal.
      predicate: ``(path, leaf) -> bool``, the leaves to average.

    Returns:
      A tree with the structure, shapes and dtypes of the first network.

    Raises:
      TreeMismatchError: two networks differ in leaves, shapes or dtypes.
      ConfigError: there are no networks; or there is another number of weights, or weights are negative, not
        finite or all zero.

    Examples:
      >>> average([{"w": jnp.array(1.0)}, {"w": jnp.array(5.0)}], [3, 1])["w"].tolist()
      2.0
    """
    if not trees:
        raise ConfigError("an average needs at least one network, got none")
    for i, tree in enumerate(trees[1:], 1):
        check_same_shapes(trees[0], tree, names=("network 0", f"network {i}"))
    values = np.ones(len(trees)) if weights is None else np.asarray(weights, np.float64)
    if (
        values.shape != (len(trees),)
        or not np.isfinite(values).all()
        or (values < 0).any()
        or not values.any()
    ):
        raise ConfigError(
            f"weights must be {len(trees)} numbers, one for each network, none negative and not all zero; "
            f"got {values.tolist()}"
        )
    return mix(trees, values / values.sum(), predicate)


def mix(trees: Sequence[Any], weights: Any, predicate: LeafPredicate) -> Any:
    """Average networks without checking them; for use under ``jit``.

    Args:
      trees: networks of equal leaves, shapes and dtypes.
      weights: ``[k]`` with sum 1; it may be traced.
      predicate: ``(path, leaf) -> bool``, the leaves to average; the others are taken as `average` says.
    """
    weights = jnp.asarray(weights)

    def combine(path: str, *leaves: Any) -> Any:
        if predicate(path, leaves[0]):
            shares = weights.astype(real_dtype(leaves[0]))
            return sum(share * leaf for share, leaf in zip(shares, leaves, strict=True))
        return jnp.stack(leaves)[jnp.argmax(weights)]

    return map_leaves(combine, *trees)
