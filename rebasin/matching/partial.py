"""Matching a network with units of a wider one, and widening a network without changing its function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import SizedFactor
from rebasin.errors import TreeMismatchError, VerificationError, problem_list
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, map_leaves

__all__ = ["partial_weight_matching", "widen"]


def partial_weight_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    key: jax.Array,
    spec_a: PermutationSpec | None = None,
    **options: Any,
) -> MatchResult:
    """Finds, for each unit of A, one of a wider B.

    A is padded with units whose weights are all zero, for the matching only: they are similar to none, so
    each group is a rectangular assignment, and the objective is ⟨A, P[B]⟩ over the weights of A.

    Args:
      spec: the symmetries of B.
      params_a: tree of A, in no group wider than B.
      params_b: tree of B, with the leaves and dtypes of A.
      key: PRNG key for the order of groups.
      spec_a: the symmetries of A, where axes of several parts give them other sizes; by default `spec`.
      **options: those of `weight_matching`, but for `start` only ``"depth"`` and ``"identity"``.

    Returns:
      The match; of B's units in each group the first as many as A has are matched to A's, and the rest follow
      in B's own order.

    Raises:
      TreeMismatchError: A is wider than B somewhere, or they differ in more than the sizes of groups.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0")})
      >>> a, b = {"w": np.array([[1.0, -2.0]])}, {"w": np.array([[5.0, -3.0, 0.0, 1.0]])}
      >>> partial_weight_matching(spec, a, b, key=jax.random.key(0)).permutation["P0"].tolist()
      [0, 1, 2, 3]
    """
    narrow = identity_permutation(spec_a or spec, params_a)
    padded = _pad(spec_a or spec, params_a, spec, params_b)
    match = weight_matching(spec, padded, params_b, key=key, **options)
    rows = {group: _rest_in_order(row, narrow[group].shape) for group, row in match.permutation.items()}
    return MatchResult(rows, match.objective, match.num_iterations, match.converged, match.stats)


def widen(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    function: Callable[..., Any],
    *inputs: Any,
    spec_a: PermutationSpec | None = None,
    tolerance: float = 1e-5,
) -> Any:
    """Pads A with zeros to the widths of B, where that leaves its function as it is.

    A unit whose weights are all zero neither gets nor gives anything, unless something is computed over all
    units of its group: a normalisation takes its mean and variance over more of them. So the function is
    evaluated with each group widened alone, and then with all of them.

    Args:
      spec: the symmetries of B.
      params_a: tree of A.
      params_b: tree of B, or its shapes.
      function: ``function(tree, *inputs)`` for a tree of any widths, such as ``lambda tree, x:
        MLP(widths_of(tree)).apply(tree, x)``.
      *inputs: examples on which the outputs are compared.
      spec_a: the symmetries of A, where axes of several parts give them other sizes; by default `spec`.
      tolerance: largest difference of an output, relative to the largest output.

    Returns:
      A tree with the shapes of B's and the function of A.

    Raises:
      TreeMismatchError: A is wider than B somewhere, or they differ in more than the sizes of groups.
      VerificationError: widening changes the function, by group and by how much.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a, b = ({"w": np.ones((2, n)), "v": np.ones((n, 1))} for n in (2, 3))
      >>> def function(tree, x):
      ...     return jnp.tanh(x @ tree["w"]) @ tree["v"]
      >>> widen(spec, a, b, function, np.ones((4, 2)))["v"].T.tolist()
      [[1.0, 1.0, 0.0]]
    """
    spec_a = spec_a or spec
    expected = jax.tree.map(np.asarray, function(params_a, *inputs))

    def change(tree: Any) -> float:
        outputs = jax.tree.map(np.asarray, function(tree, *inputs))
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
    """A with zeros for the units that only B has, in all groups or in one."""
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
            segments, wide_segments = axis.sized(leaf.shape[dim]), wide_axes[dim].sized(wide[dim])
            if [[f.group for f in s] for s in segments] != [[f.group for f in s] for s in wide_segments]:
                problems.append(f"{path} axis {dim}: {axis} in A, {wide_axes[dim]} in B")
                return leaf
            pairs = [list(zip(s, w, strict=True)) for s, w in zip(segments, wide_segments, strict=True)]
            for old, new in (pair for segment in pairs for pair in segment):
                if old.size > new.size or (old.size != new.size and old.group not in moving):
                    name = "what stays" if old.group not in moving else f"group {old.group!r}"
                    problems.append(f"{path} axis {dim}: {name} has size {old.size} in A, {new.size} in B")
            place, length = _places(pairs, only)
            places.append(place)
            shape.append(length)
        if problems:
            return leaf
        padded = np.zeros(shape, leaf.dtype)
        padded[np.ix_(*places)] = leaf
        return jnp.asarray(padded)

    padded = map_leaves(pad, params_a)
    if problems:
        raise TreeMismatchError(problem_list("A cannot be padded to the widths of B:", problems))
    return padded


def _places(
    segments: list[list[tuple[SizedFactor, SizedFactor]]], only: str | None
) -> tuple[np.ndarray, int]:
    """Where the positions of an axis of A lie in the padded axis, and its length."""
    parts, start = [], 0
    for segment in segments:
        place, length = np.zeros(1, int), 1
        for old, new in segment:
            size = new.size if only in (None, old.group) else old.size
            place = (place[:, None] * size + np.arange(old.size)).reshape(-1)
            length *= size
        parts.append(start + place)
        start += length
    return np.concatenate(parts), start


def _rest_in_order(rows: np.ndarray, narrow: tuple[int, ...]) -> np.ndarray:
    """Rows whose first units are those matched to A's, and the others in B's own order.

    Args:
      rows: ``[index…, n]``.
      narrow: the shape of the rows in A.
    """
    ordered = np.sort(rows, axis=-1)  # units of an index that A does not have keep B's order
    for where in np.ndindex(*narrow[:-1]):
        matched = rows[where][: narrow[-1]]
        rest = np.setdiff1d(rows[where], matched)  # ascending
        ordered[where] = np.concatenate([matched, rest])
    return ordered


def _relative(new: np.ndarray, old: np.ndarray) -> float:
    return float(np.max(np.abs(new - old), initial=0.0) / max(np.max(np.abs(old), initial=0.0), 1e-30))
