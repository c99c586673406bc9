"""Arithmetic of networks: points between them, averages, inner products and distances.

Everything is computed in float32 at least, or in float64 where leaves are float64, and rounded once to the
dtype of the leaf. A mean of equal networks is that network, bit for bit.

`rebasin.matching.many` aligns several networks, and `rebasin.landscape` measures all their averages.
"""

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rebasin.errors import ConfigError, TreeMismatchError, problem_list
from rebasin.roles import RoleNames, check_weight_dtypes, weight_leaves
from rebasin.trees import (
    check_same_shapes,
    conform,
    is_below,
    leaf_table,
    longest_name,
    map_leaves,
    real_dtype,
    real_parts,
)

__all__ = [
    "average",
    "distance",
    "in_common_dtypes",
    "inner_product",
    "interpolate",
    "mix",
    "wide_dtype",
    "widen_weights",
]


def interpolate(params_a: Any, params_b: Any, alpha: Any, *, roles: RoleNames = None) -> Any:
    """Return the network αA + (1−α)B on the path between two networks.

    Leaves that are no weights (counters, running statistics) are not averaged. They are those of A where α is
    at least ½, and those of B elsewhere, so that the ends of the path are exactly A and B. Where A and B hold
    the same value, also an infinite one, so does every point of the path.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      alpha: weight of A, a scalar in [0, 1] that may be traced. Or a mapping from names of leaves and
        subtrees to such scalars, in which ``*`` stands for any text, the longest fitting name decides, and
        ``""`` names the whole tree: a ratio for each layer. Leaves whose α is the number 1 are taken from A
        without looking at B, where they may be missing or have another shape, as heads for other classes do.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find.

    Returns:
      A tree with the structure, shapes and dtypes of `params_a`.

    Raises:
      TreeMismatchError: A and B differ in leaves, shapes or dtypes, or a weight holds integers.
      ConfigError: `roles` or the names in `alpha` do not fit the tree.

    Examples:
      >>> a, b = {"w": jnp.array([4.0]), "head": jnp.ones(2)}, {"w": jnp.array([0.0]), "head": jnp.ones(3)}
      >>> interpolate({"w": a["w"]}, {"w": b["w"]}, 0.25)["w"].tolist()
      [1.0]
      >>> interpolate(a, b, {"": 0.25, "head": 1})
      {'head': Array([1., 1.], dtype=float32), 'w': Array([1.], dtype=float32)}
    """
    by_leaf = _shares_by_leaf(alpha, params_a, "alpha")
    names = [n for n, share in alpha.items() if _is_one(share)] if isinstance(alpha, Mapping) else []
    kept = _leaves_below(params_a, names, alpha)
    params_b = conform(params_a, _with_leaves_of(params_a, params_b, names, alpha))
    weights = weight_leaves(params_a, roles)
    check_weight_dtypes(params_a, weights - kept, "params_a")

    def combine(path: str, a: Any, b: Any) -> Any:
        share = by_leaf[path]
        if path in kept:
            return a
        if path in weights:
            share = _as_scalar(share, a)
            return _blend((share, 1 - share), (a, b))
        return jnp.where(jnp.asarray(share) >= 0.5, a, b)

    return map_leaves(combine, params_a, params_b)


def average(
    trees: Sequence[Any],
    weights: Sequence[float] | np.ndarray | Mapping[str, Sequence[float]] | None = None,
    *,
    roles: RoleNames = None,
) -> Any:
    """Average networks, which should be aligned.

    Leaves that are no weights (counters, running statistics) are not averaged. They are taken from the
    network with the largest weight, the first of several. The average of two networks with the weights α and
    1 − α is `rebasin.interpolate`.

    Args:
      trees: networks of equal leaves, shapes and dtypes, at least one.
      weights: one number for each network, none negative; they are divided by their sum. By default all are
        equal. Or a mapping from names of leaves and subtrees to such numbers, with names as in
        `rebasin.interpolate`. Leaves for which network 0 alone has a weight are taken from it without looking
        at the others, where they may be missing or have another shape.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find.

    Returns:
      A tree with the structure, shapes and dtypes of the first network.

    Raises:
      TreeMismatchError: two networks differ in leaves, shapes or dtypes, or a weight holds integers.
      ConfigError: there are no networks; there is another number of weights, or weights are negative, not
        finite or all zero; or `roles` or the names in `weights` do not fit the tree.

    Examples:
      >>> average([{"w": jnp.array(1.0)}, {"w": jnp.array(5.0)}], [3, 1])["w"].tolist()
      2.0
    """
    if not trees:
        raise ConfigError("an average needs at least one network, got none")
    first, *rest = trees
    given = np.ones(len(trees)) if weights is None else weights
    named = given if isinstance(given, Mapping) else {"": given}
    shares = {name: _normalised(values, len(trees)) for name, values in named.items()}
    names = [name for name, values in shares.items() if values[0] == 1 and isinstance(given, Mapping)]
    filled = [_with_leaves_of(first, tree, names, shares) for tree in rest]
    conformed = [
        conform(first, tree, names=("network 0", f"network {i}")) for i, tree in enumerate(filled, 1)
    ]
    counted = weight_leaves(first, roles) - _leaves_below(first, names, shares)
    return _mixed([first, *conformed], _shares_by_leaf(shares, first, "weights"), counted)


def mix(trees: Sequence[Any], shares: Any, weights: frozenset[str]) -> Any:
    """Average networks of one structure without checking them; for use under ``jit``.

    Args:
      trees: networks of equal structure, shapes and dtypes.
      shares: ``[k]`` with sum 1; it may be traced.
      weights: path names of the leaves to average; the others are taken as `average` says.
    """
    return _mixed(trees, dict.fromkeys(leaf_table(trees[0]), shares), weights)


def _mixed(trees: Sequence[Any], shares: Mapping[str, Any], weights: frozenset[str]) -> Any:
    check_weight_dtypes(trees[0], weights, "network 0")

    def combine(path: str, *leaves: Any) -> Any:
        own = shares[path]
        if path in weights:
            return _blend(tuple(_as_scalar(own[i], leaves[0]) for i in range(len(leaves))), leaves)
        if isinstance(own, np.ndarray):
            return leaves[int(np.argmax(own))]
        return jnp.stack(leaves)[jnp.argmax(own)]

    return map_leaves(combine, *trees)


def _normalised(values: Any, count: int) -> np.ndarray:
    """Return weights of networks divided by their sum, after checking them."""
    numbers = np.asarray(values, np.float64)
    if (
        numbers.shape != (count,)
        or not np.isfinite(numbers).all()
        or (numbers < 0).any()
        or not numbers.any()
    ):
        raise ConfigError(
            f"weights must be {count} numbers, one for each network, none negative and not all zero; "
            f"got {numbers.tolist()}"
        )
    return numbers / numbers.sum()


def _shares_by_leaf(shares: Any, tree: Any, name: str) -> dict[str, Any]:
    """Return the share of each leaf, where shares are given for the whole tree or by names."""
    paths = list(leaf_table(tree))
    if not isinstance(shares, Mapping):
        return dict.fromkeys(paths, shares)
    names = {path: longest_name(path, shares) for path in paths}
    problems = [f"{path}: no name fits this leaf" for path, found in names.items() if found is None]
    problems += [
        f"{other!r} names no leaf" for other in shares if not any(is_below(path, other) for path in paths)
    ]
    if problems:
        raise ConfigError(
            problem_list(f'{name} does not fit the tree (the name "" is the whole tree):', problems)
        )
    return {path: shares[found] for path, found in names.items() if found is not None}


def _is_one(share: Any) -> bool:
    return isinstance(share, int | float) and share == 1


def _leaves_below(tree: Any, names: Collection[str], all_names: Collection[str]) -> frozenset[str]:
    """Return the leaves for which one of `names` is the longest of all names that fit."""
    if not names:
        return frozenset()
    return frozenset(path for path in leaf_table(tree) if longest_name(path, all_names) in names)


def _with_leaves_of(params_a: Any, params_b: Any, names: Collection[str], all_names: Any) -> Any:
    """Return B with A's leaves below `names`, whatever B has there; B itself if there are no names."""
    if not names:
        return params_b
    kept_a, kept_b = (_leaves_below(tree, names, all_names) for tree in (params_a, params_b))
    own = {path: leaf for path, leaf in leaf_table(params_b).items() if path not in kept_b}
    return own | {path: leaf for path, leaf in leaf_table(params_a).items() if path in kept_a}


def wide_dtype(leaf: Any) -> np.dtype:
    """Return the dtype in which a floating or complex leaf is computed with: its own, or float32 if wider.

    Examples:
      >>> [wide_dtype(np.zeros(1, dtype)).name for dtype in (np.float16, np.float32, np.complex64)]
      ['float32', 'float32', 'complex64']
    """
    dtype = np.dtype(jnp.result_type(leaf))
    return dtype if dtype.itemsize >= 4 else np.dtype(np.float32)


def widen_weights(tree: Any, weights: Collection[str]) -> Any:
    """Return a tree whose narrow weights (float16, bfloat16, float8) have become float32.

    Args:
      tree: the tree of a network.
      weights: path names of its weights.
    """
    return map_leaves(
        lambda path, leaf: jnp.asarray(leaf, wide_dtype(leaf)) if path in weights else leaf, tree
    )


def in_common_dtypes(trees: Sequence[Any], *, names: Sequence[str]) -> list[Any]:
    """Return networks in the widest of their floating dtypes, leaf by leaf.

    Leaves whose dtypes are equal stay as they are.

    Args:
      trees: networks of one structure, two or more.
      names: what messages call them.

    Raises:
      TreeMismatchError: leaves of one place differ in dtype, and one of them holds integers or booleans.
    """
    tables = [leaf_table(tree) for tree in trees]
    common, problems = {}, []
    for path in tables[0]:
        dtypes = [jnp.result_type(table[path]) for table in tables]
        if len(set(dtypes)) == 1:
            continue
        if all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
            common[path] = functools.reduce(jnp.promote_types, (wide_dtype(table[path]) for table in tables))
        else:
            other = next(i for i, dtype in enumerate(dtypes) if dtype != dtypes[0])
            problems.append(f"{path}: dtype {dtypes[0]} in {names[0]}, {dtypes[other]} in {names[other]}")
    if problems:
        raise TreeMismatchError(problem_list("networks differ:", problems))

    def widen(path: str, leaf: Any) -> Any:
        return jnp.asarray(leaf, common[path]) if path in common else leaf

    return [map_leaves(widen, tree) for tree in trees]


def _as_scalar(share: Any, leaf: Any) -> Any:
    """Return a share in the real dtype in which a leaf is computed with, on the host where it is known."""
    dtype = real_dtype(wide_dtype(leaf))
    return jnp.asarray(share, dtype) if isinstance(share, jax.Array) else np.asarray(share, dtype)[()]


def _blend(shares: tuple[Any, ...], leaves: tuple[Any, ...]) -> jax.Array:
    """Return Σ shareᵢ · leafᵢ in the dtype of the leaves, and a common value of all leaves as it is.

    Args:
      shares: k scalars of sum 1.
      leaves: k arrays of one shape and dtype.
    """
    # Without a derivative to take, the rule for it would only cost time, for each leaf.
    is_traced = any(isinstance(x, Tracer) for x in (*shares, *leaves))
    return _blend_with_derivative(shares, leaves) if is_traced else _blend_values(shares, leaves)


def _blend_values(shares: tuple[Any, ...], leaves: tuple[Any, ...]) -> jax.Array:
    first = jnp.asarray(leaves[0])
    wide = (jnp.asarray(leaf, wide_dtype(leaf)) for leaf in leaves)
    total = functools.reduce(jnp.add, (share * leaf for share, leaf in zip(shares, wide, strict=True)))
    return jnp.where(_all_equal(leaves), first, total.astype(first.dtype))


_blend_with_derivative = jax.custom_jvp(_blend_values)


@_blend_with_derivative.defjvp
def _blend_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The derivative is that of the sum, also where the values are equal: there `where` would lose it.
    (shares, leaves), (share_tangents, leaf_tangents) = primals, tangents
    out = _blend_with_derivative(shares, leaves)
    dtype = wide_dtype(leaves[0])
    moved = sum(share * jnp.asarray(t, dtype) for share, t in zip(shares, leaf_tangents, strict=True))
    # Shares keep the sum 1. So equal leaves add nothing, and infinite ones must not make NaN of it. They are
    # replaced before the product, since the product's transpose would multiply them by zero.
    differing = [jnp.where(_all_equal(leaves), 0, jnp.asarray(leaf, dtype)) for leaf in leaves]
    turned = sum(t * leaf for t, leaf in zip(share_tangents, differing, strict=True))
    return out, jnp.asarray(moved + turned, out.dtype)


def _all_equal(leaves: Sequence[Any]) -> jax.Array:
    if len(leaves) == 1:
        return jnp.asarray(True)
    return functools.reduce(jnp.logical_and, (jnp.equal(leaf, leaves[0]) for leaf in leaves[1:]))


def inner_product(params_a: Any, params_b: Any, *, leaves: Collection[str] | None = None) -> float:
    """Return the inner product ⟨A, B⟩ of two networks, summed in float64.

    Complex leaves count with the real part, Re⟨A, B⟩.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves and shapes of A.
      leaves: path names of the leaves that count; by default the weights.

    Raises:
      TreeMismatchError: A and B differ in leaves or shapes.

    Examples:
      >>> inner_product({"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 4.0])})
      11.0
    """
    pairs = _float64_pairs(params_a, params_b, leaves)
    return sum((float(np.sum(a * b)) for a, b in pairs), 0.0)


def distance(params_a: Any, params_b: Any, *, leaves: Collection[str] | None = None) -> float:
    """Return the Euclidean distance ‖A − B‖ between two networks, summed in float64.

    Running statistics, counters and optimiser state do not count by default. They follow from the data and
    the weights, and they would dominate the distance between networks with BatchNorm.

    Args:
      params_a: tree of A.
      params_b: tree of B, with the leaves and shapes of A.
      leaves: path names of the leaves that count; by default the weights.

    Raises:
      TreeMismatchError: A and B differ in leaves or shapes.

    Examples:
      >>> a = {"w": np.array([3.0, 0.0]), "batch_stats": {"mean": np.array(100.0)}}
      >>> b = {"w": np.array([0.0, 4.0]), "batch_stats": {"mean": np.array(0.0)}}
      >>> distance(a, b)
      5.0
    """
    pairs = _float64_pairs(params_a, params_b, leaves)
    return math.sqrt(sum(float(np.sum(np.square(a - b))) for a, b in pairs))


def _float64_pairs(
    params_a: Any, params_b: Any, leaves: Collection[str] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the leaves of two networks that count, side by side."""
    check_same_shapes(params_a, params_b, dtypes=False)
    counted = weight_leaves(params_a) if leaves is None else leaves
    a, b = leaf_table(params_a), leaf_table(params_b)
    for path in (path for path in a if path in counted):
        x, y = (np.asarray(real_parts(np.asarray(leaf)), np.float64) for leaf in (a[path], b[path]))
        yield x, y
