"""Leaves of pytrees by path name, and the checks of trees that users pass in."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rebasin.errors import NonFiniteError, TreeError, TreeMismatchError, problem_list

__all__ = [
    "check_finite",
    "check_same_shapes",
    "conform",
    "is_below",
    "join_static",
    "leaf_table",
    "longest_name",
    "map_leaves",
    "path_name",
    "real_dtype",
    "real_parts",
    "split_static",
    "state_leaves",
]


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
      TreeError: a leaf is neither an array nor a number, such as a function or text; or two leaves have the
        same path name, because a key contains ``/`` or because one key is the number whose text another is.

    Examples:
      >>> leaf_table({"Dense_0": {"kernel": 1, "bias": 2}})
      {'Dense_0/bias': 2, 'Dense_0/kernel': 1}
    """
    table: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in table:
            raise TreeError(f"two leaves of the tree are both named {name!r}; rename one of their keys")
        table[name] = leaf
    others = [f"{name or 'the tree'}: {_kind(leaf)}" for name, leaf in table.items() if not _is_numeric(leaf)]
    if others:
        headline = (
            "some leaves are neither arrays nor numbers; take them out of the tree, and put them back where "
            "the function is called (Equinox has partition(model, is_array) and combine for it):"
        )
        raise TreeError(problem_list(headline, others))
    return table


def _is_numeric(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, bool | int | float | complex)
    kinds = (np.number, np.bool_, jax.dtypes.prng_key)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and _is_numeric(leaf)


def _kind(leaf: Any) -> str:
    """Return what a leaf is, for a message."""
    if hasattr(leaf, "dtype"):
        return f"an array of dtype {leaf.dtype}"
    name = getattr(leaf, "__name__", None)
    return f"a {type(leaf).__name__}" if name is None else f"the {type(leaf).__name__} {name}"


def split_static(tree: Any) -> tuple[Any, Any]:
    """Split a module that is a tree, such as one of Equinox, into its arrays and its static leaves.

    A tree that has numeric leaves alone has no static ones. Where there are others, such as activation
    functions, Python's own numbers are static too, since code may branch on them.

    Args:
      tree: any pytree.

    Returns:
      The arrays and the static leaves, each in the structure of the tree with `None` for the rest.

    Examples:
      >>> arrays, static = split_static({"w": np.ones(2), "rate": 0.5, "activation": "relu"})
      >>> arrays
      {'activation': None, 'rate': None, 'w': array([1., 1.])}
      >>> static
      {'activation': 'relu', 'rate': 0.5, 'w': None}
      >>> split_static({"w": np.ones(2), "rate": 0.5})[0]["rate"]
      0.5
    """
    leaves, structure = jax.tree.flatten(tree)
    keep = _is_numeric if all(map(_is_numeric, leaves)) else _is_array
    arrays = [leaf if keep(leaf) else None for leaf in leaves]
    static = [None if keep(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, arrays), jax.tree.unflatten(structure, static)


def join_static(arrays: Any, static: Any) -> Any:
    """Put together what `split_static` took apart."""
    return jax.tree.map(
        lambda array, leaf: leaf if array is None else array,
        arrays,
        static,
        is_leaf=lambda leaf: leaf is None,
    )


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


def conform(
    params_a: Any, params_b: Any, *, names: tuple[str, str] = ("params_a", "params_b"), dtypes: bool = True
) -> Any:
    """Return B with the containers of A: each leaf of B in the place of the leaf of A with its path name.

    A tree that was restored from disk often differs from one in memory in nothing but its containers. Lists
    have become dictionaries whose keys are texts, and ``"10"`` then comes before ``"2"``; two states of
    training hold different optimisers; so leaves must be paired by name, never by position. If a leaf of B
    lies on other devices than that of A, it is put beside it.

    Args:
      params_a: tree of A.
      params_b: tree of B.
      names: what messages call the two trees.
      dtypes: whether dtypes must be equal too.

    Returns:
      The leaves of B in the structure of A; `params_b` itself where nothing has to change.

    Raises:
      TreeMismatchError: the trees differ in leaves, shapes or dtypes; the message lists every leaf in which
        they do.

    Examples:
      >>> conform([np.zeros(1), np.zeros(2)], {"0": np.ones(1), "1": np.ones(2)})
      [array([1.]), array([1., 1.])]
    """
    check_same_shapes(params_a, params_b, names=names, dtypes=dtypes)
    leaves_a, structure = jax.tree.flatten(params_a)
    if jax.tree.structure(params_b) == structure:
        leaves_b = jax.tree.leaves(params_b)
    else:
        table = leaf_table(params_b)
        leaves_b = [table[path] for path in leaf_table(params_a)]
    beside = [_beside(a, b) for a, b in zip(leaves_a, leaves_b, strict=True)]
    return jax.tree.unflatten(structure, beside)


def _beside(a: Any, b: Any) -> Any:
    """Return `b` on the devices of `a`, if both are arrays that were put on different ones."""
    if not (_has_place(a) and _has_place(b)) or a.sharding.device_set == b.sharding.device_set:
        return b
    return jax.device_put(b, a.sharding)


def _has_place(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


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


def is_below(path: str, name: str) -> bool:
    """Return whether a path name is `name` itself or lies in the subtree of that name.

    Args:
      path: path name of a leaf.
      name: path name of a leaf or subtree, in which ``*`` stands for any text; every path is below ``""``.

    Examples:
      >>> [is_below("Dense_1/bias", name) for name in ("", "Dense_1", "Dense_1/bias", "Dense", "*/bias")]
      [True, True, True, False, True]
    """
    if "*" in name:
        return _pattern(name).fullmatch(path) is not None
    return name in ("", path) or path.startswith(f"{name}/")


@functools.lru_cache(maxsize=1024)
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, name.split("*"))) + "(/.*)?", re.DOTALL)


def longest_name(path: str, names: Collection[str]) -> str | None:
    """Return the longest of the names that a path name lies below, or `None` where it lies below none.

    Examples:
      >>> longest_name("layers/3/bias", ["layers", "layers/3", "layers/4", "*/bias"])
      'layers/3'
    """
    return max((name for name in names if is_below(path, name)), key=len, default=None)


@jax.jit
def _finite_flags(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # 0·x is 0 where x is finite, and NaN elsewhere. XLA's CPU backend sums 0·x in one loop. For
    # `jnp.all(jnp.isfinite(x))` it would first write an array of flags, a quarter of the size of x.
    # Narrow types are widened on the way, since sums of some are not implemented.
    def is_finite(leaf: jax.Array) -> jax.Array:
        wide = leaf if leaf.dtype.itemsize >= 4 else leaf.astype(jnp.float32)
        return jnp.isfinite(jnp.sum(0 * wide))

    return {path: is_finite(leaf) for path, leaf in leaves.items()}


def check_finite(tree: Any, name: str, *, leaves: Collection[str] | None = None) -> None:
    """Raise `NonFiniteError` if a floating or complex leaf of a tree holds NaN or infinity.

    The values are read in one compiled pass on the device.

    Args:
      tree: a tree of arrays.
      name: what the message calls the tree.
      leaves: path names of the leaves to look at; by default all of them.

    Raises:
      NonFiniteError: the message lists every such leaf, with the number of NaN and infinite values in it.
        Where only some leaves are looked at, it says how to leave out a mask, whose entries may be −inf.

    Examples:
      >>> check_finite({"w": np.array([0.0, np.nan]), "b": np.ones(2)}, "params_b")
      Traceback (most recent call last):
      rebasin.errors.NonFiniteError: params_b is not finite:
        w: 1 NaN and 0 infinite of 2 values
    """
    floating = {
        path: leaf
        for path, leaf in leaf_table(tree).items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and (leaves is None or path in leaves)
    }
    flags = jax.device_get(_finite_flags(floating))
    problems = []
    for path in (path for path, finite in flags.items() if not finite):
        values = np.asarray(floating[path])
        values = values if np.iscomplexobj(values) else values.astype(np.float64)
        num_nan, num_infinite = np.isnan(values).sum(), np.isinf(values).sum()
        problem = f"{path}: {num_nan} NaN and {num_infinite} infinite of {values.size} values"
        if leaves is not None and not num_nan:
            problem += f"; if this is a mask, leave it out by roles={{{path!r}: 'constant'}}"
        problems.append(problem)
    if problems:
        raise NonFiniteError(problem_list(f"{name} is not finite:", problems))
