"""Leaves of pytrees by path name, arithmetic of networks, and the checks of trees that users pass in."""

import math
from collections.abc import Callable, Iterator, Mapping
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
    "real_dtype",
    "real_parts",
    "state_leaves",
]

LeafPredicate = Callable[[str, Any], bool]

# Collections of Flax (and names of common wrappers) whose leaves are estimates or bookkeeping, not weights.
# They would distort the distance between two networks, and averaging an optimiser's moments means nothing.
_STATE_COLLECTIONS = frozenset({"batch_stats", "opt_state", "cache", "intermediates"})


def path_name(path: tuple[Any, ...]) -> str:
    """Return a key path of JAX as text.

    Examples:
      >>> path_name((jax.tree_util.DictKey("params"), jax.tree_util.SequenceKey(0)))
      'params/0'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_table(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path name, in the order of the tree.

    Args:
      tree: any pytree.

    Returns:
      A dict from path name to leaf.

    Raises:
      SpecError: two leaves have the same path name, because a key contains ``/`` or because one key is the
        number whose text another key is.

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
    """Map a function over the leaves of trees, as `jax.tree.map` does, together with their path names.

    Args:
      function: ``(path, leaf, *rest) -> leaf``.
      tree: the tree whose structure the result has.
      *rest: further trees of the same structure.

    Examples:
      >>> map_leaves(lambda path, leaf: f"{path} = {leaf}", {"w": 1, "b": 2})
      {'b': 'b = 2', 'w': 'w = 1'}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def is_weight(path: str, leaf: Any) -> bool:
    """Return whether a leaf is a weight: floating or complex, and not running statistics or optimiser state.

    This is the default leaf predicate of matching and interpolation.

    Args:
      path: path name of the leaf.
      leaf: the leaf, of which only the dtype counts.

    Examples:
      >>> [is_weight(path, jnp.zeros(3)) for path in ("params/Dense_0/kernel", "batch_stats/Norm_0/mean")]
      [True, False]
    """
    is_inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return is_inexact and _STATE_COLLECTIONS.isdisjoint(path.split("/"))


def real_dtype(x: Any) -> np.dtype:
    """Return the floating type of an array, or of the real part of a complex array.

    Examples:
      >>> real_dtype(np.zeros(3, np.complex64))
      dtype('float32')
    """
    return np.dtype(jnp.finfo(jnp.result_type(x)).dtype)


def real_parts(x: Any) -> Any:
    """Return a complex array as a real one with real and imaginary parts along a new last axis.

    The Euclidean inner product of two results is Re⟨a, b⟩ of the complex arrays. So whatever compares weights
    reads complex leaves in this form. A real array is returned as it is.

    Args:
      x: array of NumPy or of JAX, ``[…]``.

    Examples:
      >>> real_parts(np.array([1 + 2j, 3])).tolist()
      [[1.0, 2.0], [3.0, 0.0]]
    """
    if not jnp.iscomplexobj(x):
        return x
    return (jnp if isinstance(x, jax.Array) else np).stack([x.real, x.imag], axis=-1)


def interpolate(params_a: Any, params_b: Any, alpha: Any, *, predicate: LeafPredicate = is_weight) -> Any:
    """Return the network αA + (1−α)B on the path between two networks.

    Leaves for which `predicate` is false (counters, running statistics) are not averaged. They are those of
    A where α is at least ½, and those of B elsewhere, so that the ends of the path are exactly A and B.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      alpha: weight of A, a scalar in [0, 1]; it may be traced.
      predicate: ``(path, leaf) -> bool``, true for the leaves to average; by default the weights.

    Returns:
      A tree like `params_a`.

    Examples:
      >>> interpolate({"w": jnp.array([4.0])}, {"w": jnp.array([0.0])}, 0.25)["w"].tolist()
      [1.0]
    """

    def combine(path: str, a: Any, b: Any) -> Any:
        if predicate(path, a):
            weight = jnp.asarray(alpha, real_dtype(a))
            return weight * a + (1 - weight) * b
        return jnp.where(jnp.asarray(alpha) >= 0.5, a, b)

    return map_leaves(combine, params_a, params_b)


def inner_product(params_a: Any, params_b: Any, *, predicate: LeafPredicate = is_weight) -> float:
    """Return the inner product ⟨A, B⟩ of two networks, summed in float64.

    Complex leaves count with the real part, Re⟨A, B⟩.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves and shapes of A.
      predicate: ``(path, leaf) -> bool``, true for the leaves that count; by default the weights.

    Raises:
      TreeMismatchError: A and B differ in leaves or shapes.

    Examples:
      >>> inner_product({"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 4.0])})
      11.0
    """
    pairs = _float64_pairs(params_a, params_b, predicate)
    return sum((float(np.sum(a * b)) for a, b in pairs), 0.0)


def distance(params_a: Any, params_b: Any, *, predicate: LeafPredicate = is_weight) -> float:
    """Return the Euclidean distance ‖A − B‖ between two networks, summed in float64.

    Running statistics, counters and optimiser state do not count by default. They follow from the data and
    the weights, and they would dominate the distance between networks with BatchNorm.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves and shapes of A.
      predicate: ``(path, leaf) -> bool``, true for the leaves that count; by default the weights.

    Raises:
      TreeMismatchError: A and B differ in leaves or shapes.

    Examples:
      >>> a = {"w": np.array([3.0, 0.0]), "batch_stats": {"mean": np.array(100.0)}}
      >>> b = {"w": np.array([0.0, 4.0]), "batch_stats": {"mean": np.array(0.0)}}
      >>> distance(a, b)
      5.0
    """
    pairs = _float64_pairs(params_a, params_b, predicate)
    return math.sqrt(sum(float(np.sum(np.square(a - b))) for a, b in pairs))


def _float64_pairs(
    params_a: Any, params_b: Any, predicate: LeafPredicate
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the leaves of two networks that count, side by side."""
    check_same_shapes(params_a, params_b, dtypes=False)
    b = leaf_table(params_b)
    for path, leaf in leaf_table(params_a).items():
        if predicate(path, leaf):
            x, y = (np.asarray(real_parts(np.asarray(x)), np.float64) for x in (leaf, b[path]))
            yield x, y


def check_same_shapes(
    params_a: Any,
    params_b: Any,
    *,
    names: tuple[str, str] = ("params_a", "params_b"),
    dtypes: bool = True,
) -> None:
    """Raise `TreeMismatchError` unless two trees have the same leaves, of the same shapes and dtypes.

    Args:
      params_a: the first tree.
      params_b: the second tree.
      names: what the message calls the two trees.
      dtypes: whether dtypes are compared too.

    Raises:
      TreeMismatchError: the trees differ; the message lists every leaf in which they do.

    Examples:
      >>> check_same_shapes({"w": np.zeros(3)}, {"w": np.zeros(4)})
      Traceback (most recent call last):
      rebasin.errors.TreeMismatchError: params_a and params_b differ:
        w: shape (3,) in params_a, (4,) in params_b
    """
    a, b = leaf_table(params_a), leaf_table(params_b)
    problems = [f"{path}: only in {names[0]}" for path in a if path not in b]
    problems += [f"{path}: only in {names[1]}" for path in b if path not in a]
    for path in (path for path in a if path in b):
        shape_a, shape_b = np.shape(a[path]), np.shape(b[path])
        dtype_a, dtype_b = jnp.result_type(a[path]), jnp.result_type(b[path])
        if shape_a != shape_b:
            problems.append(f"{path}: shape {shape_a} in {names[0]}, {shape_b} in {names[1]}")
        elif dtypes and dtype_a != dtype_b:
            problems.append(f"{path}: dtype {dtype_a} in {names[0]}, {dtype_b} in {names[1]}")
    if problems:
        raise TreeMismatchError(problem_list(f"{names[0]} and {names[1]} differ:", problems))


def state_leaves(state_outputs: Mapping[str, str], outputs: Any, tree: Any) -> dict[str, str]:
    """Return, for each output of a function that is a next state, the leaf whose next value it is.

    Args:
      state_outputs: path names in `outputs`, each with a path name in `tree`. A path names a leaf or a whole
        subtree, whose leaves must have the same names on both sides; ``""`` names the whole of `outputs` or
        `tree`.
      outputs: what the function returns, or its shapes.
      tree: the tree that the function takes, or its shapes.

    Returns:
      A dict from the path name of an output leaf to the path name of a leaf of `tree`.

    Raises:
      TreeMismatchError: a path does not exist, an output and its leaf differ in shape, or two outputs are
        given for one leaf. The message lists every case.

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
    """Return whether a path name is `prefix` itself or lies in the subtree at `prefix`.

    Args:
      path: path name of a leaf.
      prefix: path name of a leaf or subtree; every path is below ``""``.

    Examples:
      >>> [is_below("Dense_1/bias", prefix) for prefix in ("", "Dense_1", "Dense_1/bias", "Dense")]
      [True, True, True, False]
    """
    return prefix in ("", path) or path.startswith(f"{prefix}/")


@jax.jit
def _finite_flags(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # 0·x is 0 where x is finite, and NaN elsewhere. XLA's CPU backend sums 0·x in one loop. For
    # `jnp.all(jnp.isfinite(x))` it would first write an array of flags, a quarter of the size of x.
    return {path: jnp.isfinite(jnp.sum(0 * leaf)) for path, leaf in leaves.items()}


def check_finite(tree: Any, name: str, *, predicate: LeafPredicate | None = None) -> None:
    """Raise `NonFiniteError` if a floating or complex leaf of a tree holds NaN or infinity.

    The values are read in one compiled pass on the device.

    Args:
      tree: a tree of arrays.
      name: what the message calls the tree.
      predicate: ``(path, leaf) -> bool``, true for the leaves to look at; by default all of them.

    Raises:
      NonFiniteError: the message lists every such leaf, with the number of NaN and infinite values in it.

    Examples:
      >>> check_finite({"w": np.array([0.0, np.nan]), "b": np.ones(2)}, "params_b")
      Traceback (most recent call last):
      rebasin.errors.NonFiniteError: params_b is not finite:
        w: 1 NaN and 0 infinite of 2 values
    """
    floating = {
        path: leaf
        for path, leaf in leaf_table(tree).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and (predicate is None or predicate(path, leaf))
    }
    flags = jax.device_get(_finite_flags(floating))
    problems = []
    for path in (path for path, finite in flags.items() if not finite):
        values = np.asarray(floating[path])
        values = values if np.iscomplexobj(values) else values.astype(np.float64)
        problems.append(
            f"{path}: {np.isnan(values).sum()} NaN and {np.isinf(values).sum()} infinite "
            f"of {values.size} values"
        )
    if problems:
        raise NonFiniteError(problem_list(f"{name} is not finite:", problems))
