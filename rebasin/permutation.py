"""Permutations of a spec's groups: make, check, invert, compose, apply, compare, save.

A permutation is a plain mapping from group to integer array, in the *gather* convention of git-re-basin:
along every axis of group g, ``new[i] = old[permutation[g][i]]``. The array of an indexed group has the shape
``[outer…, n]`` and holds one inner permutation for each *new* position of its outer groups,
``new[h, d] = old[outer[h], inner[h, d]]``.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import Axis, cut, iter_blocks, join
from rebasin.errors import PermutationError, problem_list
from rebasin.spec import GroupSize, PermutationSpec
from rebasin.trees import map_leaves

__all__ = [
    "FixedPoints",
    "Permutation",
    "check_permutation",
    "compiled_permute",
    "compose",
    "fixed_points",
    "identity_permutation",
    "index_dims",
    "invert",
    "load_permutation",
    "permute",
    "random_permutation",
    "save_permutation",
    "take_indexed",
]

Permutation: TypeAlias = Mapping[str, Any]  # group -> integer array [n], or [outer…, n]


def _shape(size: GroupSize) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


def identity_permutation(spec: PermutationSpec, tree: Any) -> dict[str, np.ndarray]:
    """The permutation that moves nothing.

    Args:
      spec: the groups.
      tree: a tree that fits `spec`, or its shapes.

    Returns:
      ``arange(n)`` for each group, int32, repeated over the outer positions of an indexed group.
    """
    sizes = {group: _shape(size) for group, size in spec.group_sizes(tree).items()}
    return {g: np.broadcast_to(np.arange(s[-1], dtype=np.int32), s).copy() for g, s in sizes.items()}


def random_permutation(spec: PermutationSpec, tree: Any, *, key: jax.Array) -> dict[str, jax.Array]:
    """A permutation drawn uniformly, each group on its own.

    Args:
      spec: the groups.
      tree: a tree that fits `spec`, or its shapes.
      key: PRNG key.

    Returns:
      Permutation of int32 arrays.
    """
    rows = identity_permutation(spec, tree)
    return {
        group: jax.random.permutation(jax.random.fold_in(key, i), row, axis=-1, independent=True)
        for i, (group, row) in enumerate(rows.items())
    }


def check_permutation(
    spec: PermutationSpec, tree: Any, permutation: Permutation, *, values: bool = True
) -> None:
    """Validates a permutation against spec and tree.

    Args:
      spec: the groups.
      tree: a tree that fits `spec`, or its shapes.
      permutation: what to check.
      values: also look at the values; under ``jit`` only shapes can be checked.

    Raises:
      PermutationError: listing every group that is missing, unknown, of another shape or dtype, or whose
        values are not a permutation of 0 to n−1.
    """
    sizes = {group: _shape(size) for group, size in spec.group_sizes(tree).items()}
    problems = [f"group {group!r}: missing" for group in sizes if group not in permutation]
    problems += [f"group {group!r}: not in the spec" for group in permutation if group not in sizes]
    for group, shape in sizes.items():
        if group not in permutation:
            continue
        row = permutation[group]
        if np.shape(row) != shape or not jnp.issubdtype(jnp.result_type(row), jnp.integer):
            got = f"{jnp.result_type(row)} array of shape {np.shape(row)}"
            problems.append(f"group {group!r}: wanted an integer array of shape {shape}, got {got}")
        elif values and not np.array_equal(
            np.sort(row, axis=-1), np.broadcast_to(np.arange(shape[-1]), shape)
        ):
            problems.append(f"group {group!r}: not a permutation of 0 to {shape[-1] - 1}")
    if problems:
        raise PermutationError(problem_list("the permutation does not fit the spec:", problems))


def permute(spec: PermutationSpec, permutation: Permutation, tree: Any) -> Any:
    """Reorders the units of a network without changing the function it computes.

    Along every axis of group g, ``new[i] = old[permutation[g][i]]``. For one hidden layer this is W₁ ← W₁[:,
    p], b₁ ← b₁[p], W₂ ← W₂[p, :], and W₂ᵀ σ(W₁ᵀ x + b₁) is unchanged, because σ acts on each unit by itself.
    A pure
    function: it runs under ``jit``, ``vmap`` (over permutations, trees or both) and on sharded arrays.

    Args:
      spec: the axes that move.
      permutation: integer array for each group, as in the module's docstring.
      tree: the tree to reorder; every leaf moves, whatever its dtype.

    Returns:
      A new tree with the structure, shapes and dtypes of `tree`.

    Raises:
      SpecMismatchError: the tree does not fit the spec.
      PermutationError: a group is missing or unknown, or an array has the wrong shape. Values are not looked
        at; `check_permutation` does that.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> permute(spec, {"P0": jnp.array([2, 0, 1])}, {"bias": jnp.array([10, 11, 12])})["bias"].tolist()
      [12, 10, 11]
    """
    check_permutation(spec, tree, permutation, values=False)
    table, outer = spec.table, spec.outer_groups

    def reorder(path: str, leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        axes = table[path]
        for i, axis in enumerate(axes):
            if any(group in permutation and group not in outer for group in axis.groups):
                where = (slice(None),) * i + (_axis_index(axis, leaf.shape[i], permutation, outer),)
                # Explicitly sharded arrays do not say by themselves how the result is laid out: as before.
                leaf = leaf.at[where].get(out_sharding=jax.typeof(leaf).sharding)
        if any(group in outer for axis in axes for group in axis.groups):
            leaf = _reorder_indexed(leaf, axes, permutation, spec)
        return leaf

    return map_leaves(reorder, tree)


def _axis_index(
    axis: Axis, length: int, permutation: Permutation, outer: Mapping[str, tuple[str, ...]]
) -> jax.Array:
    """Old position of every new position along an axis, with indexed groups left where they are."""
    start, parts = 0, []
    for segment in axis.sized(length):
        index = jnp.zeros((1,), jnp.int32)
        for factor in segment:
            if factor.group is None or factor.group in outer or factor.group not in permutation:
                digit = jnp.arange(factor.size)
            else:
                digit = jnp.asarray(permutation[factor.group], jnp.int32)
            index = (index[:, None] * factor.size + digit[None, :]).reshape(-1)
        parts.append(start + index)
        start += index.size
    return jnp.concatenate(parts)


# One compiled program: for small networks, gathers that are dispatched one by one cost more than what a
# matching or a sweep computes with the result.
compiled_permute = jax.jit(permute, static_argnums=0)


def _reorder_indexed(
    leaf: jax.Array, axes: tuple[Axis, ...], permutation: Permutation, spec: PermutationSpec
) -> jax.Array:
    """Applies the inner permutations, each at its new outer position."""
    pieces = []
    for block in iter_blocks(axes, leaf.shape):
        values = cut(leaf, block)
        for group in (
            group for group in spec.outward if group in block.labels and group in spec.outer_groups
        ):
            dim = block.labels.index(group)
            values = take_indexed(values, permutation[group], index_dims(block.labels, group, spec), dim)
        pieces.append((block, values))
    return join(leaf, pieces)


def index_dims(labels: Sequence[str | None], group: str, spec: PermutationSpec) -> tuple[int, ...]:
    """The dimensions of a block that index a group, in the order of its index; none for most groups."""
    return tuple(labels.index(outer) for outer in spec.outer_groups.get(group, ()))


def take_indexed(values: jax.Array, rows: jax.Array, index: tuple[int, ...], dim: int) -> jax.Array:
    """``take`` along one dimension, with rows of their own for each position along the dimensions `index`."""
    if not index:
        return jnp.take(values, rows, axis=dim)
    dims = (*index, dim)
    # The rows' axes stand in the order of the index, the block's in that of the leaf.
    rows = jnp.transpose(jnp.asarray(rows), np.argsort(dims).tolist())
    shape = [size if d in dims else 1 for d, size in enumerate(values.shape)]
    return jnp.take_along_axis(values, rows.reshape(shape), axis=dim)


def invert(spec: PermutationSpec, permutation: Permutation) -> dict[str, jax.Array]:
    """The permutation that undoes `permutation`.

    An inner permutation is undone at the old outer position: ``inverse[outer[h]] = inner[h]⁻¹``.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> invert(spec, {"P0": np.array([2, 0, 1])})["P0"].tolist()
      [1, 2, 0]
    """
    inverse: dict[str, jax.Array] = {}
    for group in spec.outward:
        rows = jnp.argsort(jnp.asarray(permutation[group]), axis=-1).astype(jnp.int32)
        inverse[group] = _at_outer(rows, group, inverse, spec)
    return {group: inverse[group] for group in permutation}


def compose(spec: PermutationSpec, first: Permutation, second: Permutation) -> dict[str, jax.Array]:
    """The permutation that does `first`, then `second`.

    ``permute(compose(p, q), tree)`` equals ``permute(q, permute(p, tree))``: in the gather convention
    ``p[q]``, and for an indexed group ``inner_p[outer_q[h]][inner_q[h]]``.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> compose(spec, {"P0": np.array([2, 0, 1])}, {"P0": np.array([0, 2, 1])})["P0"].tolist()
      [2, 1, 0]
    """
    moved = {group: _at_outer(jnp.asarray(rows), group, second, spec) for group, rows in first.items()}
    return {g: jnp.take_along_axis(row, jnp.asarray(second[g]), axis=-1) for g, row in moved.items()}


def _at_outer(rows: jax.Array, group: str, permutation: Permutation, spec: PermutationSpec) -> jax.Array:
    """Inner permutations reordered with their outer positions; fixed outer groups stay."""
    outer = spec.outer_groups.get(group, ())
    for axis, name in enumerate(outer):
        if name in permutation:
            index = tuple(outer.index(o) for o in spec.outer_groups.get(name, ()))
            rows = take_indexed(rows, jnp.asarray(permutation[name]), index, axis)
    return rows


class FixedPoints(NamedTuple):
    """Where two permutations agree (arXiv 2404.06498, appendix G).

    Attributes:
      counts: number of agreeing positions of each group, ``trace(P₁ᵀP₂)``.
      sizes: number of positions of each group.
    """

    counts: dict[str, int]
    sizes: dict[str, int]

    @property
    def fractions(self) -> dict[str, float]:
        """Share of agreeing positions in each group."""
        return {group: self.counts[group] / self.sizes[group] for group in self.sizes}

    @property
    def total(self) -> float:
        """Share of agreeing positions over all groups together; 1 where there is no group."""
        return sum(self.counts.values()) / sum(self.sizes.values()) if self.sizes else 1.0


def fixed_points(first: Permutation, second: Permutation | None = None) -> FixedPoints:
    """Compares two permutations position by position.

    Args:
      first: a permutation.
      second: another of the same groups; by default the identity.

    Returns:
      Counts per group, with fractions and total.

    Raises:
      PermutationError: the two differ in groups or shapes.

    Examples:
      >>> fixed_points({"P0": np.array([0, 2, 1]), "P1": np.array([0])}).total
      0.5
    """
    rows = {group: np.asarray(row) for group, row in first.items()}
    if second is None:
        others = {group: np.broadcast_to(np.arange(row.shape[-1]), row.shape) for group, row in rows.items()}
    else:
        others = {group: np.asarray(row) for group, row in second.items()}
    shapes = [{group: row.shape for group, row in p.items()} for p in (rows, others)]
    if shapes[0] != shapes[1]:
        raise PermutationError(f"permutations of different groups or sizes: {shapes[0]} and {shapes[1]}")
    counts = {group: int((row == others[group]).sum()) for group, row in rows.items()}
    return FixedPoints(counts, {group: math.prod(row.shape) for group, row in rows.items()})


def save_permutation(path: str | pathlib.Path, spec: PermutationSpec, permutation: Permutation) -> None:
    """Writes a permutation as JSON, with the hash of its spec."""
    groups = {group: np.asarray(row).tolist() for group, row in permutation.items()}
    data = {"format": "rebasin.permutation", "version": 1, "spec_digest": spec.digest, "groups": groups}
    pathlib.Path(path).write_text(json.dumps(data) + "\n")


def load_permutation(path: str | pathlib.Path, spec: PermutationSpec) -> dict[str, np.ndarray]:
    """Reads what `save_permutation` wrote; raises `PermutationError` if it was for another spec."""
    try:
        data = json.loads(pathlib.Path(path).read_text())
        digest, groups = data["spec_digest"], data["groups"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PermutationError(f"{path}: not a saved permutation: {error!r}") from error
    if digest != spec.digest:
        raise PermutationError(
            f"{path}: saved for another spec (hash {digest[:12]}…), wanted hash {spec.digest[:12]}…"
        )
    return {group: np.array(row, np.int32) for group, row in groups.items()}
