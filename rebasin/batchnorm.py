"""New running statistics for networks with BatchNorm, which interpolated networks need."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rebasin.batches import Batches, check_data, inputs_of, map_batches
from rebasin.errors import ConfigError, problem_list
from rebasin.roles import RoleNames, leaf_roles
from rebasin.trees import check_finite, conform, leaf_table, map_leaves

__all__ = ["build_norm_reset"]

# Errors of the check on an update, as a share of the values, in units of rounding errors of the leaf's dtype.
_ROUNDINGS = 1000


def build_norm_reset(
    params: Any,
    update_fn: Callable[..., Any],
    data: Any,
    *,
    batch_size: int = 1000,
    roles: RoleNames = None,
) -> Callable[..., Any]:
    """Build a function that gives a network new running statistics, such as those of BatchNorm.

    The training mode of the model itself measures them. Each leaf of statistics must be a moving average of
    its own: ``update_fn`` must set it to ``m · old + (1 − m) · measured``, with one m for the whole leaf, at
    least 0 and below 1. This is checked on the first batch, by updates of three different sets of old values.
    Debiased averages (Haiku's), power iterations (spectral normalisation) and statistics that are measured
    through other running statistics have another form, and are refused.

    The mean of what was measured over all batches replaces the leaf. Where the leaf of a mean and that of a
    variance stand side by side (``mean`` and ``var``, ``running_mean`` and ``running_var``), the variance of
    the batches' means is added to the mean of their variances.

    Args:
      params: tree of a network of the kind that the function will be called with; its values do not matter.
      update_fn: ``(params, *inputs) -> params``, the tree with its statistics updated by a batch; in Flax
        ``lambda v, x: v | model.apply(v, x, train=True, mutable=["batch_stats"])[1]``.
      data: a `rebasin.Batch`, whose labels are ignored, or its inputs alone, arrays ``[n, …]`` with one
        common n.
      batch_size: number of examples that are evaluated at once; a last, shorter batch is left out.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find. Statistics that `update_fn`
        changes are replaced.

    Returns:
      ``reset(params, alpha=None) -> params``, for use by itself or as the ``prepare`` that `build_sweep`
      takes; it runs under ``jit``. It is a `jax.tree_util.Partial` that holds the data, so it can be an
      argument of a function under ``jit``; a function that closes over it is compiled with a copy of the data
      inside.

    Raises:
      ConfigError: a batch would be empty; no leaf is a statistic that `update_fn` changes; or one changes in
        another way than by a moving average.
      DataError: the data are empty, or of different lengths.
      NonFiniteError: an input is NaN or infinite.
      TreeMismatchError: `update_fn` returns another tree than it got.

    Examples:
      >>> params = {"w": jnp.ones(2), "batch_stats": {"mean": jnp.zeros(2)}}
      >>> def update_fn(params, x):
      ...     old = params["batch_stats"]["mean"]
      ...     return params | {"batch_stats": {"mean": 0.9 * old + 0.1 * jnp.mean(x, axis=0)}}
      >>> reset = build_norm_reset(params, update_fn, jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      >>> reset(params)["batch_stats"]["mean"].round(4).tolist()
      [2.0, 4.0]
    """
    check_data(data, batch_size)
    inputs = jax.tree.map(jnp.asarray, inputs_of(data))
    check_finite(inputs, "data")
    batches = Batches.of(inputs, batch_size)._replace(rest=0)
    first = jax.tree.map(lambda x: x[: batches.size], inputs)
    momenta = _find_momenta(params, update_fn, first, roles)
    # A momentum may depend on a counter, as in an average over all batches so far. So these stay as they
    # were.
    found = leaf_roles(params, roles)
    held = {path: x for path, x in leaf_table(params).items() if found[path] == "counter"}

    def reset(inputs: tuple[Any, ...], held: Mapping[str, Any], params: Any, alpha: Any = None) -> Any:
        """Return the tree with new statistics; see `rebasin.build_norm_reset`."""
        del alpha

        def start(path: str, x: Any) -> Any:
            return jnp.zeros_like(x) if path in momenta else held.get(path, x)

        def measure(batch: tuple[Any, ...], _: None) -> dict[str, jax.Array]:
            # The tree is made here, as Flax NNX only lets variables be updated where they were made.
            updated = leaf_table(update_fn(map_leaves(start, params), *batch))
            return {path: updated[path] / (1 - m) for path, m in momenta.items()}

        return _with_statistics(params, map_batches(measure, inputs, batches))

    return Partial(reset, inputs, held)


def _find_momenta(
    params: Any, update_fn: Callable[..., Any], batch: tuple[Any, ...], roles: RoleNames
) -> dict[str, float]:
    """Return the momentum of each statistic that is updated, after checking that all are moving averages."""
    found, table = leaf_roles(params, roles), leaf_table(params)
    statistics = [
        path
        for path, leaf in table.items()
        if found[path] == "statistic" and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]

    def updated(values: Mapping[str, float]) -> dict[str, np.ndarray]:
        filled = map_leaves(lambda path, x: jnp.full_like(x, values[path]) if path in values else x, params)
        new = conform(params, update_fn(filled, *batch), names=("params", "what update_fn returns"))
        return {path: np.asarray(x, np.float64) for path, x in leaf_table(new).items() if path in values}

    zero, one = (updated(dict.fromkeys(statistics, value)) for value in (0.0, 1.0))
    # Values of their own, so that a statistic that is computed from another one, or not linearly, shows
    # itself.
    own = {path: 2.0 + i / (1 + len(statistics)) for i, path in enumerate(statistics)}
    third = updated(own)
    momenta, problems = {}, []
    for path in statistics:
        # The difference is most exact where the value that was added to both is smallest.
        at = np.unravel_index(np.argmin(np.abs(zero[path])), zero[path].shape)
        momentum = float(one[path][at] - zero[path][at])
        tolerance = _ROUNDINGS * float(jnp.finfo(table[path].dtype).eps)
        error = np.abs(third[path] - (zero[path] + momentum * own[path]))
        fits = (error <= tolerance * (1 + np.abs(zero[path]))).all()  # false for NaN
        if fits and momentum == 1 and not zero[path].any():
            continue  # not updated
        if fits and -tolerance <= momentum < 1 - tolerance:
            momenta[path] = momentum
        else:
            problems.append(path)
    if problems:
        headline = (
            "update_fn does not set these statistics to m · old + (1 − m) · measured, as a moving average "
            "does, so nothing tells their new values; roles= names those that are to stay as constants:"
        )
        raise ConfigError(problem_list(headline, problems))
    if not momenta:
        others = ", ".join(statistics) or "none"
        raise ConfigError(
            f"there is nothing to reset: update_fn changes no statistic of the tree (statistics: {others}); "
            "roles= says which leaves are statistics, and update_fn must run the model in its training mode"
        )
    return momenta


def _with_statistics(params: Any, measured: Mapping[str, jax.Array]) -> Any:
    """Replace statistics by their means over the batches, ``[batches, …]`` of each leaf."""

    def new(path: str, x: jax.Array) -> jax.Array:
        if path not in measured:
            return x
        mean = jnp.mean(measured[path], axis=0)
        sibling = _mean_beside(path)
        if sibling is not None and sibling in measured and measured[sibling].shape == measured[path].shape:
            mean += jnp.var(measured[sibling], axis=0)
        return mean.astype(x.dtype)

    return map_leaves(new, params)


def _mean_beside(path: str) -> str | None:
    """Return the path name of the mean that belongs to a variance.

    Examples:
      >>> [_mean_beside(path) for path in ("bn/var", "bn1.running_var", "bn/moving_variance", "bn/var/value")]
      ['bn/mean', 'bn1.running_mean', 'bn/moving_mean', 'bn/mean/value']
    """
    found = re.fullmatch(r"(.*(?:^|[/._]))var(?:iance)?((?:/value)?)", path)
    return None if found is None else f"{found[1]}mean{found[2]}"
