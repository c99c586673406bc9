"""Matching a network with units of a wider one, and widening a network without changing its function."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import Axis, SizedFactor
from rebasin.errors import TreeMismatchError, VerificationError, problem_list
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, map_leaves

__all__ = ["partial_weight_matching", "rest_in_order", "widen"]


def partial_weight_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    key: jax.Array,
    spec_a: PermutationSpec | None = None,
    **options: Any,
) -> MatchResult:
    """Find a unit of a wider network B for each unit of A.

    For the matching alone, A is padded with units whose weights are all zero. Their similarity to every unit
    of B is zero. So the assignment of each group is a rectangular one, and the objective is ⟨A, P[B]⟩ over
    the weights of A.

    Args:
      spec: the symmetries of B.
      params_a: tree of A, which is in no group wider than B.
      params_b: tree of B, with the leaves and dtypes of A.
      key: PRNG key for the order of the groups.
      spec_a: the symmetries of A; by default `spec`. The two differ where an axis has several segments or
        factors, whose sizes a spec states.
      **options: options of `weight_matching`; `start` must be ``"depth"`` or ``"identity"``.

    Returns:
      The match. In each group, the first units of the permuted B are matched to the units of A in A's order.
      The rest follow in B's own order.

    Raises:
      TreeMismatchError: A is wider than B in some group, or they differ in more than the sizes of groups.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0")})
      >>> a, b = {"w": np.array([[1.0, -2.0]])}, {"w": np.array([[5.0, -3.0, 0.0, 1.0]])}
      >>> partial_weight_matching(spec, a, b, key=jax.random.key(0)).permutation["P0"].tolist()
      [0, 1, 2, 3]
    """
    narrow = identity_permutation(spec_a or spec, params_a)
    padded = _pad(spec_a or spec, params_a, spec, params_b)
    match = weight_matching(spec, padded, params_b, key=key, **options)
    rows = {group: rest_in_order(row, narrow[group].shape) for group, row in match.permutation.items()}
    return MatchResult(rows, match.objective, match.num_iterations, match.converged, match.stats)


def widen(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    apply_fn: Callable[..., Any],
    *inputs: Any,
    spec_a: PermutationSpec | None = None,
    tolerance: float = 1e-5,
) -> Any:
    """Pad A with zeros to the widths of B, and check that its function stays the same.

    A unit whose weights are all zero receives nothing and passes nothing on. It can still change the function
    where something is computed over all units of its group: a normalisation, for example, takes its mean and
    variance over more units. So the function is evaluated with each group widened alone, and then with all of
    them widened.

    Args:
      spec: the symmetries of B.
      params_a: tree of A.
      params_b: tree of B, or its shapes.
      apply_fn: ``(params, *inputs) -> outputs`` for a tree of any widths, such as ``lambda params, x:
        MLP(widths_of(params)).apply(params, x)``.
      *inputs: examples on which the outputs are compared.
      spec_a: the symmetries of A, as in `partial_weight_matching`; by default `spec`.
      tolerance: largest difference of an output that is accepted, relative to the largest output.

    Returns:
      A tree with the shapes of B and the function of A.

    Raises:
      TreeMismatchError: A is wider than B in some group, or they differ in more than the sizes of groups.
      VerificationError: widening changes the function; the message says in which group and by how much.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a, b = ({"w": np.ones((2, n)), "v": np.ones((n, 1))} for n in (2, 3))
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["w"]) @ params["v"]
      >>> widen(spec, a, b, apply_fn, np.ones((4, 2)))["v"].T.tolist()
      [[1.0, 1.0, 0.0]]
    """
    spec_a = spec_a or spec
    expected = jax.tree.map(np.asarray, apply_fn(params_a, *inputs))

    def change(params: Any) -> float:
        outputs = jax.tree.map(np.asarray, apply_fn(params, *inputs))
        pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True)
        return max((_relative(new, old) for new, old in pairs), default=0.0)

    problems = []
    for group in spec_a.groups:
        if (size := change(_pad(spec_a, params_a, spec, params_b, only=group))) > tolerance:
            problems.append(
                f"group {group!r}: zeros for new units change an output by {size:.2g} of the largest; "
                "something, such as a normalisation, is computed over all units of the group"
            )
    widened = _pad(spec_a, params_a, spec, params_b)
    if not problems and (size := change(widened)) > tolerance:
        problems.append(f"all groups together change an output by {size:.2g} of the largest")
    if problems:
        raise VerificationError(problem_list("A cannot be widened without changing its function:", problems))
    return widened


def _pad(
    spec_a: PermutationSpec, params_a: Any, spec: PermutationSpec, params_b: Any, only: str | None = None
) -> Any:
    """Pad A with zeros for the units that only B has.

    Args:
      spec_a: the symmetries of A.
      params_a: tree of A.
      spec: the symmetries of B.
      params_b: tree of B, or its shapes.
      only: the group to pad; by default all groups.

    Raises:
      TreeMismatchError: A is wider than B in some group, or they differ in more than the sizes of groups.
    """
    spec_a.group_sizes(params_a, name="params_a")
    spec.group_sizes(params_b, name="params_b")
    a, b = leaf_table(params_a), leaf_table(params_b)
    if a.keys() != b.keys():
        raise TreeMismatchError(
            problem_list("params_a and params_b differ:", (f"{p}: in only one" for p in a.keys() ^ b.keys()))
        )
    problems = []
    moving = frozenset(spec.groups)

    def pad(path: str, leaf: Any) -> Any:
        leaf, wide = np.asarray(leaf), np.shape(b[path])
        axes, wide_axes = spec_a.table[path], spec.table[path]
        if len(axes) != len(wide_axes):
            problems.append(f"{path}: {len(axes)} axes in A, {len(wide_axes)} in B")
            return leaf
        places, shape = [], []
        for dim, axis in enumerate(axes):
            if _shape_of(axis) != _shape_of(wide_axes[dim]):
                problems.append(f"{path} axis {dim}: {axis} in A, {wide_axes[dim]} in B")
                return leaf
            new_factors = wide_axes[dim].sized(wide[dim])
            for old, new in zip(axis.sized(leaf.shape[dim]), new_factors, strict=True):
                if old.size > new.size or (old.size != new.size and old.group not in moving):
                    name = "what stays" if old.group not in moving else f"group {old.group!r}"
                    problems.append(f"{path} axis {dim}: {name} has size {old.size} in A, {new.size} in B")
            sizes = {f.group: f.size for f in new_factors if only in (None, f.group)}
            where = _places(axis, leaf.shape[dim], sizes)
            places.append(where.positions)
            shape.append(where.length)
        if problems:
            return leaf
        padded = np.zeros(shape, leaf.dtype)
        padded[np.ix_(*places)] = leaf
        return jnp.asarray(padded)

    padded = map_leaves(pad, params_a)
    if problems:
        raise TreeMismatchError(problem_list("A cannot be padded to the widths of B:", problems))
    return padded


def _shape_of(axis: Axis) -> Any:
    """Return the structure of an axis without its sizes."""
    return [
        [_shape_of(part) if isinstance(part, Axis) else part.group for part in segment]
        for segment in axis.segments
    ]


class _Places(NamedTuple):
    """Where the positions of a part of A lie in the padded part.

    Attributes:
      positions: the position in the padded part of each position of A's.
      length: length of the padded part.
    """

    positions: np.ndarray
    length: int


def _places(axis: Axis, length: int, sizes: Mapping[str | None, int]) -> _Places:
    """Find where the positions of an axis of A lie in the padded axis.

    Args:
      axis: the axis of A.
      length: its length.
      sizes: sizes of the groups to pad, in B.
    """

    def factor(old: SizedFactor) -> _Places:
        wide = old.size if old.group is None else sizes.get(old.group, old.size)
        return _Places(np.arange(old.size), wide)

    def product(parts: list[_Places]) -> _Places:
        positions = np.zeros(1, int)
        for part in parts:
            positions = np.add.outer(positions * part.length, part.positions).ravel()
        return _Places(positions, math.prod(part.length for part in parts))

    def concatenate(parts: list[_Places]) -> _Places:
        starts = np.cumsum([0, *(part.length for part in parts)])
        shifted = [start + part.positions for start, part in zip(starts, parts, strict=False)]
        return _Places(np.concatenate(shifted), int(starts[-1]))

    return axis.fold(length, factor, product, concatenate)


def rest_in_order(rows: np.ndarray, narrow: tuple[int, ...]) -> np.ndarray:
    """Put the units that are matched to A's first, and the others behind them in B's own order.

    Args:
      rows: the permutation of one group of B, ``[outer…, n]``.
      narrow: shape of the permutation of this group in A.

    Examples:
      >>> rest_in_order(np.array([3, 0, 2, 1]), (2,)).tolist()
      [3, 0, 1, 2]
    """
    ordered = np.sort(rows, axis=-1)  # at outer positions that A does not have, all units keep B's order
    for where in np.ndindex(*narrow[:-1]):
        matched = rows[where][: narrow[-1]]
        rest = np.setdiff1d(rows[where], matched)  # ascending
        ordered[where] = np.concatenate([matched, rest])
    return ordered


def _relative(new: np.ndarray, old: np.ndarray) -> float:
    """Return the largest difference, relative to the largest of the old values."""
    return float(np.max(np.abs(new - old), initial=0.0) / max(np.max(np.abs(old), initial=0.0), 1e-30))
