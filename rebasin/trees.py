"""Path-named leaves of pytrees, and the checks that public functions make on the trees they are given."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import NonFiniteError, SpecError, TreeMismatchError, problem_list

__all__ = [
    "LeafPredicate",
    "check_finite",
    "check_same_shapes",
    "distance",
    "inner_product",
    "interpolate",
    "is_below",
    "is_weight",
    "leaf_table",
    "map_leaves",
    "path_name",
    "state_leaves",
]

LeafPredicate = Callable[[str, Any], bool]

# Collections of Flax (and names of common wrappers) whose leaves are estimates or bookkeeping, not weights:
# the distance between two networks is not measured there, and averaging an optimiser's moments means nothing.
_STATE_COLLECTIONS = frozenset({"batch_stats", "opt_state", "cache", "intermediates"})


def path_name(path: tuple[Any, ...]) -> str:
    """Key path as text, for example ``"params/Dense_0/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_table(tree: Any) -> dict[str, Any]:
    """Leaves by path name, in the order of the tree.

    Args:
      tree: any pytree of arrays, or of anything with a shape.

    Returns:
      A dict from path name to leaf.

    Raises:
      SpecError: two leaves have the same path name (keys that contain ``/``, or an int key beside its text).

    Examples:
      >>> leaf_table({"Dense_0": {"kernel": 1, "bias": 2}})
      {'Dense_0/bias': 2, 'Dense_0/kernel': 1}
    """
    table: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in table:
            raise SpecError(f"two leaves of the tree are both named {name!r}; rename one of their keys")
        table[name] = leaf
    return table


def map_leaves(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `jax.tree.map`, with the path name of each leaf as first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def is_weight(path: str, leaf: Any) -> bool:
    """Whether a leaf is a weight: floating, and neither running statistics nor optimiser state.

    This is the default leaf predicate of matching and interpolation.

    Examples:
      >>> [is_weight(path, jnp.zeros(3)) for path in ("params/Dense_0/kernel", "batch_stats/Norm_0/mean")]
      [True, False]
    """
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and _STATE_COLLECTIONS.isdisjoint(
        path.split("/")
    )


def interpolate(params_a: Any, params_b: Any, alpha: Any, *, predicate: LeafPredicate = is_weight) -> Any:
    """The network αA + (1−α)B.

    Leaves that `predicate` leaves out (counters, running statistics) are not averaged: they are taken whole
    from the nearer network, A from α = ½ on, so that both ends of the segment are exactly the networks given.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      alpha: weight of A, a scalar in [0, 1].
      predicate: ``(path, leaf) -> bool``, the leaves to average.

    Returns:
      A tree like `params_a`.

    Examples:
      >>> interpolate({"w": jnp.array([4.0])}, {"w": jnp.array([0.0])}, 0.25)["w"].tolist()
      [1.0]
    """

    def mix(path: str, a: Any, b: Any) -> Any:
        if predicate(path, a):
            weight = jnp.asarray(alpha, jnp.result_type(a))
            return weight * a + (1 - weight) * b
        return jnp.where(jnp.asarray(alpha) >= 0.5, a, b)

    return map_leaves(mix, params_a, params_b)


def inner_product(params_a: Any, params_b: Any, *, predicate: LeafPredicate = is_weight) -> float:
    """Return ⟨A, B⟩ over the leaves that count, summed in float64.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves and shapes of A.
      predicate: ``(path, leaf) -> bool``, the leaves that count; by default the weights.

    Examples:
      >>> inner_product({"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 4.0])})
      11.0
    """
    a, b = leaf_table(params_a), leaf_table(params_b)
    products = (np.multiply(a[path], b[path], dtype=np.float64) for path in a if predicate(path, a[path]))
    return sum(float(np.sum(product)) for product in products)


def distance(params_a: Any, params_b: Any, *, predicate: LeafPredicate = is_weight) -> float:
    """Return the Euclidean distance ‖A − B‖ over the leaves that count, summed in float64.

    Running statistics, counters and optimiser state are not part of it: they follow from the data and from
    the weights, and would otherwise dominate the distance between networks with BatchNorm.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves and shapes of A.
      predicate: ``(path, leaf) -> bool``, the leaves that count; by default the weights.

    Examples:
      >>> a = {"w": np.array([3.0, 0.0]), "batch_stats": {"mean": np.array(100.0)}}
      >>> b = {"w": np.array([0.0, 4.0]), "batch_stats": {"mean": np.array(0.0)}}
      >>> distance(a, b)
      5.0
    """
    a, b = leaf_table(params_a), leaf_table(params_b)
    differences = (np.subtract(a[p], b[p], dtype=np.float64) for p in a if predicate(p, a[p]))
    return float(np.sqrt(sum(float(np.sum(np.square(difference))) for difference in differences)))


def check_same_shapes(
    params_a: Any, params_b: Any, *, names: tuple[str, str] = ("params_a", "params_b")
) -> None:
    """Raises `TreeMismatchError` with every leaf in which two trees differ in presence, shape or dtype."""
    a, b = leaf_table(params_a), leaf_table(params_b)
    problems = [f"{path}: only in {names[0]}" for path in a if path not in b]
    problems += [f"{path}: only in {names[1]}" for path in b if path not in a]
    for path in (path for path in a if path in b):
        shapes = np.shape(a[path]), np.shape(b[path])
        dtypes = jnp.result_type(a[path]), jnp.result_type(b[path])
        if shapes[0] != shapes[1]:
            problems.append(f"{path}: shape {shapes[0]} in {names[0]}, {shapes[1]} in {names[1]}")
        elif dtypes[0] != dtypes[1]:
            problems.append(f"{path}: dtype {dtypes[0]} in {names[0]}, {dtypes[1]} in {names[1]}")
    if problems:
        raise TreeMismatchError(problem_list(f"{names[0]} and {names[1]} differ:", problems))


def state_leaves(state_outputs: Mapping[str, str], outputs: Any, tree: Any) -> dict[str, str]:
    """Which output of a function is the next value of which leaf of its tree.

    Args:
      state_outputs: path name in `outputs` to path name in `tree`, of a leaf or of a whole subtree, whose
        leaves then have the same names below it. ``""`` is all of `outputs` or `tree`.
      outputs: what the function returns, or its shapes.
      tree: the tree that the function takes, or its shapes.

    Returns:
      A dict from path name of an output leaf to path name of a leaf of `tree`.

    Raises:
      TreeMismatchError: a path is not there, two leaves differ in shape, or two outputs claim one leaf.

    Examples:
      >>> tree = {"params": {"w": jnp.ones(3)}, "batch_stats": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
      >>> outputs = (jnp.ones(2), {"batch_stats": tree["batch_stats"]})
      >>> state_leaves({"1/batch_stats": "batch_stats"}, outputs, tree)
      {'1/batch_stats/mean': 'batch_stats/mean', '1/batch_stats/var': 'batch_stats/var'}
    """
    returned, leaves = leaf_table(outputs), leaf_table(tree)
    pairs: dict[str, str] = {}
    problems = []
    for source, target in state_outputs.items():
        below = [path for path in returned if is_below(path, source)]
        if not below:
            problems.append(f"{source!r}: no such output; the outputs are {list(returned)}")
        for path in below:
            leaf = f"{target}/{path[len(source) :].strip('/')}".strip("/")
            if leaf not in leaves:
                problems.append(f"{path!r}: its leaf would be {leaf!r}, which is not in the tree")
            elif np.shape(leaves[leaf]) != np.shape(returned[path]):
                shapes = np.shape(returned[path]), np.shape(leaves[leaf])
                problems.append(f"{path!r}: shape {shapes[0]}, but the leaf {leaf!r} has shape {shapes[1]}")
            elif leaf in pairs.values():
                problems.append(f"{path!r}: the leaf {leaf!r} already has a next value")
            else:
                pairs[path] = leaf
    if problems:
        raise TreeMismatchError(problem_list("state_outputs do not fit the function:", problems))
    return pairs


def is_below(path: str, prefix: str) -> bool:
    """Whether a path name is that of `prefix` itself or of a leaf in its subtree; every path is below ``""``.

    Examples:
      >>> [is_below("Dense_1/bias", prefix) for prefix in ("", "Dense_1", "Dense_1/bias", "Dense")]
      [True, True, True, False]
    """
    return prefix in ("", path) or path.startswith(f"{prefix}/")


@jax.jit
def _finite_flags(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # 0·x is 0 where x is finite, and NaN elsewhere. XLA's CPU backend sums that in one loop, while for
    # `jnp.all(jnp.isfinite(x))` it first writes an array of flags, a quarter of the size of x.
    return {path: jnp.isfinite(jnp.sum(0 * leaf)) for path, leaf in leaves.items()}


def check_finite(tree: Any, name: str) -> None:
    """Raises `NonFiniteError` naming every floating leaf of `tree` that holds NaN or infinity.

    One compiled pass on the device; the message counts what was found in the leaves at fault.
    """
    floating = {
        path: leaf for path, leaf in leaf_table(tree).items() if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    flags = jax.device_get(_finite_flags(floating))
    problems = []
    for path in (path for path, finite in flags.items() if not finite):
        values = np.asarray(floating[path], np.float64)
        problems.append(
            f"{path}: {np.isnan(values).sum()} NaN and {np.isinf(values).sum()} infinite "
            f"of {values.size} values"
        )
    if problems:
        raise NonFiniteError(problem_list(f"{name} is not finite:", problems))
