"""Masks: which weights of a network stay when it is pruned.

A mask is a tree like the network's, with a boolean array for each leaf: true where a weight stays. It has
*every* leaf of the network. Leaves that are not pruned, such as biases, are true everywhere. A mask therefore
fits the network's spec, and `rebasin.permute` carries it from network B into the order of units of network A,
as it does with the network itself: ``permute(spec, p, apply_mask(mask, params))`` equals
``apply_mask(permute(spec, p, mask), permute(spec, p, params))``.
"""

import hashlib
import io
import math
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError, TreeMismatchError, problem_list
from rebasin.trees import conform, leaf_table, map_leaves

__all__ = [
    "LeafSparsity",
    "SparsityReport",
    "apply_mask",
    "check_mask",
    "full_mask",
    "join_masks",
    "load_mask",
    "mask_digest",
    "save_mask",
    "shuffle_mask",
    "sparsity_report",
]


def full_mask(tree: Any) -> Any:
    """Return the mask that prunes nothing.

    Examples:
      >>> full_mask({"w": jnp.zeros(3)})
      {'w': array([ True,  True,  True])}
    """
    leaf_table(tree)  # raises on leaves that are no arrays
    return jax.tree.map(lambda leaf: np.ones(np.shape(leaf), bool), tree)


def check_mask(mask: Any, tree: Any, *, name: str = "params") -> Any:
    """Return a mask in the containers of a tree, and raise where it does not fit.

    Args:
      mask: the mask.
      tree: the network, or its shapes.
      name: what messages call the tree.

    Raises:
      TreeMismatchError: the mask has other leaves or shapes, or holds something else than booleans. The
        message lists every such leaf.

    Examples:
      >>> check_mask({"w": np.ones(3, bool)}, {"w": np.ones(4)})
      Traceback (most recent call last):
      rebasin.errors.TreeMismatchError: params and mask differ:
        w: shape (4,) in params, (3,) in mask
    """
    mask = conform(tree, mask, names=(name, "mask"), dtypes=False)
    wrong = [
        f"{path}: wanted booleans, got {dtype}"
        for path, leaf in leaf_table(mask).items()
        if (dtype := jnp.result_type(leaf)) != np.bool_
    ]
    if wrong:
        raise TreeMismatchError(problem_list("the mask is none:", wrong))
    return mask


def apply_mask(mask: Any, tree: Any) -> Any:
    """Return a tree with zeros in the place of pruned weights; what stays is not changed in any bit.

    It runs under ``jit``.

    Args:
      mask: a mask of `tree`, with containers of any kind.
      tree: the network.

    Raises:
      TreeMismatchError: the mask does not fit the tree.

    Examples:
      >>> mask = {"w": np.array([True, False]), "bias": np.array([True])}
      >>> apply_mask(mask, {"w": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])})["w"].tolist()
      [1.0, 0.0]
    """
    mask = check_mask(mask, tree)

    def prune(kept: Any, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # has no zero
            return leaf
        # Not a product: 0 · NaN is NaN, and 0 · −1 is −0.
        return jnp.where(kept, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(prune, mask, tree)


def join_masks(mask: Any, other: Any) -> Any:
    """Return the mask of all weights that one of two masks keeps.

    It is the mask of every network between two pruned ones, but for weights that cancel.

    Raises:
      TreeMismatchError: the masks do not fit each other.

    Examples:
      >>> join_masks({"w": np.array([True, False, False])}, {"w": np.array([False, False, True])})
      {'w': array([ True, False,  True])}
    """
    other = conform(mask, other, names=("mask", "other"))
    return jax.tree.map(lambda a, b: np.logical_or(a, b), mask, other)


def shuffle_mask(mask: Any, *, key: jax.Array) -> Any:
    """Return a mask with the entries of every leaf in a random order, so that each keeps as many as before.

    Args:
      mask: the mask.
      key: PRNG key.

    Examples:
      >>> mask = {"w": np.arange(100).reshape(10, 10) < 7}
      >>> int(shuffle_mask(mask, key=jax.random.key(0))["w"].sum())
      7
    """
    order = {path: i for i, path in enumerate(sorted(leaf_table(mask)))}

    def shuffle(path: str, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        moved = jax.random.permutation(jax.random.fold_in(key, order[path]), leaf.ravel())
        return np.asarray(moved).reshape(leaf.shape)

    return map_leaves(shuffle, mask)


def mask_digest(mask: Any) -> str:
    """Return a hash of a mask: of path names, shapes and entries, whatever its containers.

    Examples:
      >>> mask_digest({"w": np.array([True, False])}) == mask_digest({"w": np.array([True, True])})
      False
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(leaf_table(mask).items()):
        digest.update(f"{path} {list(np.shape(leaf))} ".encode() + np.packbits(np.asarray(leaf)).tobytes())
    return digest.hexdigest()


class LeafSparsity(NamedTuple):
    """How many weights of a leaf stay.

    Attributes:
      kept: number of weights that stay.
      size: number of all weights.
    """

    kept: int
    size: int

    @property
    def density(self) -> float:
        """The fraction of weights that stay; 1 for a leaf without entries."""
        return self.kept / self.size if self.size else 1.0


class SparsityReport(NamedTuple):
    """How many weights of each leaf stay; printed as a table.

    Attributes:
      leaves: kept and all weights, by path name.
    """

    leaves: Mapping[str, LeafSparsity]

    @property
    def total(self) -> LeafSparsity:
        """Kept and all weights of all leaves together."""
        return LeafSparsity(*(sum(column) for column in zip(*self.leaves.values(), strict=True)))

    def __str__(self) -> str:
        rows = {**self.leaves, "total": self.total}
        width = max(map(len, rows))
        lines = (
            f"{path:<{width}}  {leaf.kept:>10,} of {leaf.size:>10,}  {leaf.density:7.2%}"
            for path, leaf in rows.items()
        )
        return "\n".join(lines)


def sparsity_report(mask: Any, leaves: Sequence[str] | None = None) -> SparsityReport:
    """Count the weights that a mask keeps in each leaf.

    Args:
      mask: the mask.
      leaves: path names of the leaves to report, such as the `prunable_leaves` of the network; by default
        all leaves.

    Raises:
      ConfigError: `leaves` names leaves that are not there.

    Examples:
      >>> print(sparsity_report({"v": np.ones(2, bool), "w": np.array([True, False, False, False])}, ["w"]))
      w               1 of          4   25.00%
      total           1 of          4   25.00%
    """
    table = leaf_table(mask)
    unknown = [path for path in leaves or () if path not in table]
    if unknown:
        raise ConfigError(problem_list("leaves do not fit the mask:", (f"no leaf {p!r}" for p in unknown)))
    return SparsityReport(
        {
            path: LeafSparsity(int(np.sum(np.asarray(table[path]))), int(np.size(table[path])))
            for path in (table if leaves is None else leaves)
        }
    )


def save_mask(path: str | os.PathLike[str], mask: Any) -> None:
    """Write a mask into a file, eight entries a byte; a killed process leaves all of it or nothing.

    Args:
      path: the file, whose name usually ends in ``.npz``.
      mask: the mask.
    """
    content = io.BytesIO()
    table = {name: np.asarray(leaf, bool) for name, leaf in leaf_table(mask).items()}
    arrays: dict[str, Any] = {name: np.packbits(leaf) for name, leaf in table.items()}
    np.savez_compressed(content, **arrays)
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.getvalue())
    partial.replace(path)


def load_mask(path: str | os.PathLike[str], tree: Any) -> Any:
    """Read the mask of a network from a file.

    Args:
      path: a file that `save_mask` wrote.
      tree: the network, or its shapes.

    Returns:
      The mask in the structure of `tree`.

    Raises:
      OSError: the file cannot be read.
      TreeMismatchError: the file is damaged, or holds the mask of another network.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_mask(f"{folder}/mask.npz", {"w": np.array([True, False, True])})
      ...     load_mask(f"{folder}/mask.npz", {"w": jnp.ones(3)})
      {'w': array([ True, False,  True])}
    """
    try:
        with np.load(io.BytesIO(pathlib.Path(path).read_bytes())) as stored:
            packed = dict(stored)
    except (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        raise TreeMismatchError(f"{path}: not a saved mask, or damaged") from error
    shapes = {name: np.shape(leaf) for name, leaf in leaf_table(tree).items()}
    problems = [f"{name}: only in {where}" for name, where in _only_once(shapes, packed)]
    problems += [
        f"{name}: {packed[name].dtype} array of shape {packed[name].shape}, wanted the bits of {shape}"
        for name, shape in shapes.items()
        if name in packed
        and (packed[name].dtype != np.uint8 or packed[name].shape != (-(-math.prod(shape) // 8),))
    ]
    if problems:
        raise TreeMismatchError(problem_list(f"{path} holds no mask of this network:", problems))

    def unpack(name: str, leaf: Any) -> np.ndarray:
        shape = np.shape(leaf)
        return np.unpackbits(packed[name], count=math.prod(shape)).astype(bool).reshape(shape)

    return map_leaves(unpack, tree)


def _only_once(shapes: Mapping[str, Any], packed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each name that is not in both mappings, and where it is."""
    ours = [(name, "the network") for name in shapes if name not in packed]
    return ours + [(name, "the file") for name in packed if name not in shapes]
