"""Permutations of the groups of a spec: how to make, check, apply, invert, compose, compare and save them.

A permutation is a plain mapping from group to integer array, in the *gather* convention of git-re-basin:
along every axis of group g, ``new[i] = old[permutation[g][i]]``. The array of an inner group has the shape
``[outer…, n]`` and holds one permutation for each *new* position of its outer groups,
``new[h, d] = old[outer[h], inner[h, d]]``.
"""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rebasin.axis import Axis, SizedFactor, cut, iter_blocks, join
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


# What `save_permutation` writes into a file.
_FORMAT, _VERSION = "rebasin.permutation", 1


def _shape(size: GroupSize) -> tuple[int, ...]:
    """Return the shape of a group's permutation."""
    return size if isinstance(size, tuple) else (size,)


def identity_permutation(spec: PermutationSpec, tree: Any) -> dict[str, np.ndarray]:
    """Return the permutation that moves nothing.

    Args:
      spec: the symmetries of the network.
      tree: a tree that fits `spec`, or its shapes.

    Returns:
      ``arange(n)`` for each group, int32, repeated over the outer positions of an inner group.

    Raises:
      SpecMismatchError: the tree does not fit the spec.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> identity_permutation(spec, {"bias": np.zeros(3)})["P0"].tolist()
      [0, 1, 2]
    """
    sizes = {group: _shape(size) for group, size in spec.group_sizes(tree).items()}
    return {g: np.broadcast_to(np.arange(s[-1], dtype=np.int32), s).copy() for g, s in sizes.items()}


def random_permutation(spec: PermutationSpec, tree: Any, *, key: jax.Array) -> dict[str, jax.Array]:
    """Draw a permutation uniformly and independently for each group.

    The permutations of an inner group are drawn independently for each outer position.

    Args:
      spec: the symmetries of the network.
      tree: a tree that fits `spec`, or its shapes.
      key: PRNG key.

    Returns:
      A permutation of int32 arrays.

    Raises:
      SpecMismatchError: the tree does not fit the spec.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> permutation = random_permutation(spec, {"bias": np.zeros(3)}, key=jax.random.key(0))
      >>> sorted(permutation["P0"].tolist())
      [0, 1, 2]
    """
    rows = identity_permutation(spec, tree)
    return {
        group: jax.random.permutation(jax.random.fold_in(key, i), row, axis=-1, independent=True)
        for i, (group, row) in enumerate(rows.items())
    }


def check_permutation(
    spec: PermutationSpec, tree: Any, permutation: Permutation, *, values: bool = True
) -> None:
    """Raise `PermutationError` unless a permutation fits a spec and a tree.

    Args:
      spec: the symmetries of the network.
      tree: a tree that fits `spec`, or its shapes.
      permutation: the permutation to check.
      values: whether the values are checked too. Under ``jit`` only groups, shapes and dtypes can be.

    Raises:
      PermutationError: a group is missing or unknown, its array has a wrong shape or dtype, or its values
        are not a permutation of 0 to n−1. The message lists every case.
      SpecMismatchError: the tree does not fit the spec.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> check_permutation(spec, {"bias": np.zeros(3)}, {"P0": np.array([0, 2, 2])})
      Traceback (most recent call last):
      rebasin.errors.PermutationError: the permutation does not fit the spec:
        group 'P0': not a permutation of 0 to 2
    """
    sizes = {group: _shape(size) for group, size in spec.group_sizes(tree).items()}
    rows = _rows(permutation, "the permutation")
    problems = [f"group {group!r}: missing" for group in sizes if group not in rows]
    problems += [f"group {group!r}: not in the spec" for group in rows if group not in sizes]
    for group, shape in sizes.items():
        if group not in rows:
            continue
        row = rows[group]
        if not _is_integer(row) or np.shape(row) != shape:
            problems.append(
                f"group {group!r}: wanted an integer array of shape {shape}, got {_describe_row(row)}"
            )
        elif values and not _is_permutation(row):
            problems.append(f"group {group!r}: not a permutation of 0 to {shape[-1] - 1}")
    if problems:
        raise PermutationError(problem_list("the permutation does not fit the spec:", problems))


def _rows(permutation: Any, name: str) -> dict[str, Any]:
    """Return the array of each group; what cannot be an array is left as it is.

    Raises:
      PermutationError: it is no mapping.
    """
    if not isinstance(permutation, Mapping):
        raise PermutationError(
            f"{name} must be a mapping from group to integer array, got a {type(permutation).__name__}"
        )
    return {group: _as_array(row) for group, row in permutation.items()}


def _as_array(row: Any) -> Any:
    if isinstance(row, np.ndarray | jax.Array):
        return row
    try:
        return np.asarray(row)
    except ValueError:  # of a list whose parts differ in length
        return row


def _is_integer(row: Any) -> bool:
    return isinstance(row, np.ndarray | jax.Array) and jnp.issubdtype(row.dtype, np.integer)


def _is_permutation(row: Any) -> bool:
    """Tell whether an integer array holds a permutation on its last axis; true where values are unknown."""
    if isinstance(row, Tracer):
        return True
    shape = np.shape(row)
    return len(shape) > 0 and bool((np.sort(row, axis=-1) == np.arange(shape[-1])).all())


def _describe_row(row: Any) -> str:
    if isinstance(row, np.ndarray | jax.Array):
        return f"{row.dtype} array of shape {np.shape(row)}"
    return f"a {type(row).__name__} that is no array"


def permute(spec: PermutationSpec, permutation: Permutation, tree: Any) -> Any:
    """Reorder the units of a network without changing the function that it computes.

    Along every axis of group g, ``new[i] = old[permutation[g][i]]``. For one hidden layer this is
    W₁ ← W₁[:, p], b₁ ← b₁[p], W₂ ← W₂[p, :], and W₂ᵀ σ(W₁ᵀ x + b₁) is unchanged, because σ acts on each unit
    by itself. `permute` runs under ``jit``, under ``vmap`` (over permutations, trees or both) and on sharded
    arrays.

    Args:
      spec: the symmetries of the network.
      permutation: an integer array for each group, ``[n]``, or ``[outer…, n]`` for an inner group.
      tree: the tree to reorder. Leaves of every dtype are reordered.

    Returns:
      A new tree with the structure, shapes and dtypes of `tree`.

    Raises:
      SpecMismatchError: the tree does not fit the spec.
      PermutationError: a group is missing or unknown, its array has a wrong shape or dtype, or its values are
        no permutation. Under ``jit`` values are not known, and so not checked.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> permute(spec, {"P0": jnp.array([2, 0, 1])}, {"bias": jnp.array([10, 11, 12])})["bias"].tolist()
      [12, 10, 11]
    """
    check_permutation(spec, tree, permutation)
    table, outer = spec.table, spec.outer_groups

    def reorder(path: str, leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        axes = table[path]
        for i, axis in enumerate(axes):
            if any(group in permutation and group not in outer for group in axis.groups):
                where = (slice(None),) * i + (_axis_index(axis, leaf.shape[i], permutation, outer),)
                # Under explicit sharding JAX cannot know how the result should be laid out: as the leaf was.
                leaf = leaf.at[where].get(out_sharding=jax.typeof(leaf).sharding)
        if any(group in outer for axis in axes for group in axis.groups):
            leaf = _reorder_indexed(leaf, axes, permutation, spec)
        return leaf

    return map_leaves(reorder, tree)


# `permute` as one compiled program, for callers outside `jit`: dispatching the gathers of a small network one
# by one costs more than what a matching or a sweep computes with the result.
compiled_permute = jax.jit(permute, static_argnums=0)


def _axis_index(
    axis: Axis, length: int, permutation: Permutation, outer: Mapping[str, tuple[str, ...]]
) -> jax.Array:
    """Return the old position of every new position along an axis, with inner groups left where they are."""

    def positions(factor: SizedFactor) -> jax.Array:
        if factor.group is None or factor.group in outer or factor.group not in permutation:
            return jnp.arange(factor.size)
        return jnp.asarray(permutation[factor.group], jnp.int32)

    def product(digits: list[jax.Array]) -> jax.Array:
        return functools.reduce(lambda index, digit: jnp.add.outer(index * digit.size, digit).ravel(), digits)

    def concatenate(parts: list[jax.Array]) -> jax.Array:
        starts = itertools.accumulate([0, *(part.size for part in parts)])
        return jnp.concatenate([start + part for start, part in zip(starts, parts, strict=False)])

    return axis.fold(length, positions, product, concatenate)


def _reorder_indexed(
    leaf: jax.Array, axes: tuple[Axis, ...], permutation: Permutation, spec: PermutationSpec
) -> jax.Array:
    """Reorder the inner groups of a leaf, by the permutation at each new outer position."""
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
    """Return the dimensions of a block at whose positions a group is permuted differently.

    Args:
      labels: group of each dimension of the block.
      group: a group among `labels`.
      spec: the symmetries of the network.

    Returns:
      The dimensions of the outer groups, in the order of `PermutationSpec.outer_groups`; none for a group
      that is not an inner group.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": ("H", None, "D")}, indexed={"D": ["H"]})
      >>> index_dims(("H", None, "D"), "D", spec), index_dims(("H", None, "D"), "H", spec)
      ((0,), ())
    """
    return tuple(labels.index(outer) for outer in spec.outer_groups.get(group, ()))


def take_indexed(values: jax.Array, rows: jax.Array, index: tuple[int, ...], dim: int) -> jax.Array:
    """Reorder one dimension of a block, differently at each position of the dimensions `index`.

    Args:
      values: the block.
      rows: positions to take along `dim`, ``[sizes of index…, n]``.
      index: the dimensions at whose positions `rows` differ; with none, this is ``jnp.take``.
      dim: the dimension to reorder.

    Examples:
      >>> values = jnp.array([[10, 11], [20, 21]])
      >>> take_indexed(values, jnp.array([[0, 1], [1, 0]]), (0,), 1).tolist()
      [[10, 11], [21, 20]]
    """
    if not index:
        return jnp.take(values, rows, axis=dim)
    dims = (*index, dim)
    # The axes of `rows` stand in the order of `index`, but must stand in the order of the block's dimensions.
    rows = jnp.transpose(jnp.asarray(rows), np.argsort(dims).tolist())
    shape = [size if d in dims else 1 for d, size in enumerate(values.shape)]
    return jnp.take_along_axis(values, rows.reshape(shape), axis=dim)


def invert(spec: PermutationSpec, permutation: Permutation) -> dict[str, jax.Array]:
    """Return the permutation that undoes a permutation.

    An inner permutation is undone at the old outer position: ``inverse[outer[h]] = inner[h]⁻¹``.

    Args:
      spec: the symmetries of the network.
      permutation: the permutation to undo.

    Returns:
      A permutation of int32 arrays of the same groups.

    Raises:
      PermutationError: it is no permutation of the groups of `spec`.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> invert(spec, {"P0": np.array([2, 0, 1])})["P0"].tolist()
      [1, 2, 0]
    """
    permutation = _checked_rows(spec, permutation, "the permutation")
    inverse: dict[str, jax.Array] = {}
    for group in spec.outward:
        rows = jnp.argsort(jnp.asarray(permutation[group]), axis=-1).astype(jnp.int32)
        inverse[group] = _at_outer(rows, group, inverse, spec)
    return {group: inverse[group] for group in permutation}


def compose(spec: PermutationSpec, first: Permutation, second: Permutation) -> dict[str, jax.Array]:
    """Return the permutation that does `first`, then `second`.

    ``permute(spec, compose(spec, p, q), tree)`` equals ``permute(spec, q, permute(spec, p, tree))``. In the
    gather convention this is ``p[q]``, and for an inner group ``inner_p[outer_q[h]][inner_q[h]]``.

    Args:
      spec: the symmetries of the network.
      first: the permutation applied first.
      second: the permutation applied to the result, of the same groups.

    Returns:
      A permutation of the same groups.

    Raises:
      PermutationError: one of them is no permutation of the groups of `spec`, or their sizes differ.

    Examples:
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> compose(spec, {"P0": np.array([2, 0, 1])}, {"P0": np.array([0, 2, 1])})["P0"].tolist()
      [2, 1, 0]
    """
    first = _checked_rows(spec, first, "the first permutation")
    second = _checked_rows(spec, second, "the second permutation")
    differ = [f"group {g!r}: {np.shape(first[g])} and {np.shape(second[g])}" for g in spec.groups]
    differ = [
        line for line, g in zip(differ, spec.groups, strict=True) if np.shape(first[g]) != np.shape(second[g])
    ]
    if differ:
        raise PermutationError(problem_list("two permutations of different sizes:", differ))
    moved = {group: _at_outer(jnp.asarray(rows), group, second, spec) for group, rows in first.items()}
    return {g: jnp.take_along_axis(row, jnp.asarray(second[g]), axis=-1) for g, row in moved.items()}


def _checked_rows(spec: PermutationSpec, permutation: Permutation, name: str) -> dict[str, Any]:
    """Return the arrays of a permutation of a spec's groups, whatever their sizes.

    Values are checked where they are known, which they are not under ``jit``.

    Raises:
      PermutationError: groups are missing or unknown, or an array is no permutation.
    """
    permutation = _rows(permutation, name)
    problems = [f"group {group!r}: missing" for group in spec.groups if group not in permutation]
    problems += [f"group {group!r}: not in the spec" for group in permutation if group not in spec.groups]
    for group in (group for group in spec.groups if group in permutation):
        row, outer = permutation[group], spec.outer_groups.get(group, ())
        if not _is_integer(row) or np.ndim(row) != len(outer) + 1:
            wanted = f"an integer array with {len(outer) + 1} axes"
            problems.append(f"group {group!r}: wanted {wanted}, got {_describe_row(row)}")
            continue
        for axis, other in enumerate(outer):
            if not (other in permutation and np.ndim(permutation[other])):
                continue
            if np.shape(row)[axis] != np.shape(permutation[other])[-1]:
                size = np.shape(permutation[other])[-1]
                problems.append(
                    f"group {group!r}: {np.shape(row)[axis]} positions of group {other!r}, which has {size}"
                )
        if not _is_permutation(row):
            problems.append(f"group {group!r}: not a permutation of 0 to {np.shape(row)[-1] - 1}")
    if problems:
        raise PermutationError(problem_list(f"{name} does not fit the spec:", problems))
    return permutation


def _at_outer(rows: jax.Array, group: str, permutation: Permutation, spec: PermutationSpec) -> jax.Array:
    """Reorder the inner permutations of a group as its outer positions are; fixed outer groups stay put."""
    outer = spec.outer_groups.get(group, ())
    for axis, name in enumerate(outer):
        if name in permutation:
            index = tuple(outer.index(o) for o in spec.outer_groups.get(name, ()))
            rows = take_indexed(rows, jnp.asarray(permutation[name]), index, axis)
    return rows


class FixedPoints(NamedTuple):
    """The number of positions at which two permutations agree (arXiv 2404.06498, appendix G).

    Attributes:
      counts: number of positions of each group at which the two agree, ``trace(P₁ᵀP₂)``.
      sizes: number of positions of each group.
    """

    counts: dict[str, int]
    sizes: dict[str, int]

    @property
    def fractions(self) -> dict[str, float]:
        """Fraction of the positions of each group at which the two agree."""
        return {group: self.counts[group] / self.sizes[group] for group in self.sizes}

    @property
    def total(self) -> float:
        """Fraction of the positions of all groups at which the two agree; 1 if there are no groups."""
        return sum(self.counts.values()) / sum(self.sizes.values()) if self.sizes else 1.0


def fixed_points(first: Permutation, second: Permutation | None = None) -> FixedPoints:
    """Count the positions at which two permutations agree.

    Args:
      first: a permutation.
      second: another permutation of the same groups; by default the identity.

    Returns:
      The counts of each group, from which fractions follow.

    Raises:
      PermutationError: one of them is no permutation, or the two differ in groups or shapes.

    Examples:
      >>> fixed_points({"P0": np.array([0, 2, 1]), "P1": np.array([0])}).total
      0.5
    """
    rows = _host_rows(first, "the first permutation")
    if second is None:
        others = {group: np.broadcast_to(np.arange(row.shape[-1]), row.shape) for group, row in rows.items()}
    else:
        others = _host_rows(second, "the second permutation")
    shapes = [{group: row.shape for group, row in p.items()} for p in (rows, others)]
    if shapes[0] != shapes[1]:
        raise PermutationError(f"permutations of different groups or sizes: {shapes[0]} and {shapes[1]}")
    counts = {group: int((row == others[group]).sum()) for group, row in rows.items()}
    return FixedPoints(counts, {group: math.prod(row.shape) for group, row in rows.items()})


def _host_rows(permutation: Permutation, name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a permutation on the host, after checking that each is one."""
    rows = _rows(permutation, name)
    problems = [
        f"group {group!r}: {_describe_row(row)}"
        for group, row in rows.items()
        if not (_is_integer(row) and _is_permutation(row))
    ]
    if problems:
        raise PermutationError(problem_list(f"{name} has arrays that are no permutations:", problems))
    return {group: np.asarray(row) for group, row in rows.items()}


def save_permutation(path: str | pathlib.Path, spec: PermutationSpec, permutation: Permutation) -> None:
    """Write a permutation to a file as JSON, together with the hash of its spec.

    Args:
      path: the file.
      spec: the symmetries that the permutation belongs to.
      permutation: the permutation.

    Raises:
      PermutationError: it is no permutation of the groups of `spec`.
    """
    rows = _checked_rows(spec, permutation, "the permutation")
    groups = {group: np.asarray(row).tolist() for group, row in rows.items()}
    data = {"format": _FORMAT, "version": _VERSION, "spec_digest": spec.digest, "groups": groups}
    pathlib.Path(path).write_text(json.dumps(data) + "\n")


def load_permutation(path: str | pathlib.Path, spec: PermutationSpec) -> dict[str, np.ndarray]:
    """Read a permutation that `save_permutation` wrote.

    Args:
      path: the file.
      spec: the symmetries that the permutation must have been saved for.

    Returns:
      A permutation of int32 arrays.

    Raises:
      PermutationError: the file holds something else, is of another version, was saved for another spec, or
        holds arrays that are no permutation.

    Examples:
      >>> import tempfile
      >>> spec = PermutationSpec.from_axes({"bias": ("P0",)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_permutation(f"{folder}/p.json", spec, {"P0": np.array([2, 0, 1])})
      ...     load_permutation(f"{folder}/p.json", spec)
      {'P0': array([2, 0, 1], dtype=int32)}
    """
    try:
        data = json.loads(pathlib.Path(path).read_text())
        form, digest = (data["format"], data["version"]), data["spec_digest"]
        permutation = {group: np.array(row) for group, row in data["groups"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise PermutationError(f"{path}: not a saved permutation: {error!r}") from error
    if form != (_FORMAT, _VERSION):
        raise PermutationError(
            f"{path}: wanted {_FORMAT} version {_VERSION}, got {form[0]} version {form[1]}"
        )
    if digest != spec.digest:
        raise PermutationError(
            f"{path}: saved for another spec (hash {digest[:12]}…), wanted hash {spec.digest[:12]}…"
        )
    rows = _checked_rows(spec, permutation, f"{path}: the permutation")
    return {group: row.astype(np.int32) for group, row in rows.items()}
