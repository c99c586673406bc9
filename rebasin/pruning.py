"""Pruning: which weights of a network stay, by magnitude or at random.

The result is a mask, see `rebasin.masks`. How many weights stay is exact: ⌊n·(1−s)⌋ of n prunable weights at
sparsity s, in rational arithmetic. At level i of pruning, s is 1 − 0.8^i, whether the level is reached in one
step or in i steps. Of weights of equal magnitude those are pruned first that come first in the order of path
names and, within a leaf, of positions.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from rebasin.errors import ConfigError, problem_list
from rebasin.masks import check_mask
from rebasin.roles import RoleNames, weight_leaves
from rebasin.spec import PermutationSpec
from rebasin.trees import check_finite, is_below, leaf_table, map_leaves

__all__ = [
    "PRUNED_PER_LEVEL",
    "count_kept",
    "edge_leaves",
    "level_sparsity",
    "magnitude_mask",
    "prunable_leaves",
    "random_mask",
]

# Fraction of the remaining weights that a level prunes (arXiv 2404.06498, App. A, as in OpenLTH).
PRUNED_PER_LEVEL = 0.2

# Last parts of the names of leaves that have several axes and are no kernels: biases of attention heads,
# scales of grouped norms, and tables of positions.
_NOT_KERNELS = re.compile(r"(.*_)?(bias|b|scale|offset|gamma|beta|positions?|pos_embed\w*|position_embed\w*)")


def prunable_leaves(tree: Any, *, roles: RoleNames = None, exclude: Collection[str] = ()) -> tuple[str, ...]:
    """Return the path names of the kernels of a tree, in alphabetical order.

    Kernels are the weights (see `rebasin.roles`) with two or more axes whose names are not those of biases,
    scales or positions.

    Args:
      tree: a tree of arrays or of their shapes.
      roles: roles of leaves that are known better, as in `rebasin.roles.leaf_roles`.
      exclude: path names of leaves or subtrees that are not pruned, in which ``*`` stands for any text; for
        example `edge_leaves`.

    Raises:
      ConfigError: `exclude` names no leaf, or no leaf is left to prune.

    Examples:
      >>> tree = {"Dense_0": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "scale": np.ones((1, 3))}
      >>> prunable_leaves(tree)
      ('Dense_0/kernel',)
    """
    paths = leaf_table(tree)
    unused = [name for name in exclude if not any(is_below(path, name) for path in paths)]
    if unused:
        raise ConfigError(problem_list("exclude does not fit the tree:", (f"no leaf {n!r}" for n in unused)))
    found = tuple(
        path
        for path in sorted(weight_leaves(tree, roles))
        if np.ndim(paths[path]) >= 2
        and not _NOT_KERNELS.fullmatch(re.split(r"[/.]", path)[-1])
        and not any(is_below(path, name) for name in exclude)
    )
    if not found:
        raise ConfigError(f"no leaf is left to prune; wanted weights with two axes among {list(paths)}")
    return found


def edge_leaves(spec: PermutationSpec, tree: Any, *, roles: RoleNames = None) -> tuple[str, ...]:
    """Return the kernels of the first and of the last layers, to be left out of pruning by ``exclude=``.

    They are the kernels of which at most one axis has a group. The other side is an input or an output of the
    network, which stays put. A layer with a side that is pinned for another reason counts too.

    Args:
      spec: the symmetries of the network.
      tree: a tree that fits `spec`, or its shapes.
      roles: as in `prunable_leaves`.

    Raises:
      SpecMismatchError: the tree does not fit the spec.

    Examples:
      >>> spec = PermutationSpec.from_axes({"u": (None, "P"), "v": ("P", "Q"), "w": ("Q", None)})
      >>> edge_leaves(spec, {name: np.ones((2, 2)) for name in "uvw"})
      ('u', 'w')
    """
    spec.group_sizes(tree)
    table = spec.table
    return tuple(
        path for path in prunable_leaves(tree, roles=roles) if sum(bool(a.groups) for a in table[path]) <= 1
    )


def level_sparsity(level: int, *, fraction: float = PRUNED_PER_LEVEL) -> Fraction:
    """Return the sparsity of a level of pruning, 1 − (1−f)^level, as an exact fraction.

    Args:
      level: how often a fraction of the remaining weights is pruned; level 0 is the dense network.
      fraction: the fraction f, in [0, 1), as its decimal digits say.

    Raises:
      ConfigError: the level is negative, or the fraction is outside [0, 1).

    Examples:
      >>> level_sparsity(2), float(level_sparsity(12))
      (Fraction(9, 25), 0.931280523264)
    """
    if level < 0:
        raise ConfigError(f"level: wanted at least 0, got {level}")
    return 1 - (1 - _exact(fraction, "fraction")) ** int(level)


def count_kept(num_weights: int, sparsity: float | Fraction) -> int:
    """Return how many of some weights stay at a sparsity: ⌊n·(1−s)⌋.

    Args:
      num_weights: the number of weights n.
      sparsity: the fraction s of weights that are pruned, in [0, 1), as its decimal digits say.

    Raises:
      ConfigError: the sparsity is outside [0, 1).

    Examples:
      >>> [count_kept(1000, level_sparsity(level)) for level in range(5)]
      [1000, 800, 640, 512, 409]
    """
    return math.floor(num_weights * (1 - _exact(sparsity, "sparsity")))


def _exact(value: float | Fraction, name: str) -> Fraction:
    """Return a number in [0, 1) as the fraction that its shortest decimal form names, such as 1/5 for 0.2."""
    if isinstance(value, Fraction) or math.isfinite(value):
        exact = value if isinstance(value, Fraction) else Fraction(str(value))
        if 0 <= exact < 1:
            return exact
    raise ConfigError(f"{name}: wanted at least 0 and less than 1, got {value}")


def magnitude_mask(
    tree: Any,
    sparsity: float | Fraction,
    *,
    layerwise: bool = False,
    within: Any = None,
    leaves: Sequence[str] | None = None,
) -> Any:
    """Return the mask that keeps the weights of largest magnitude.

    Args:
      tree: the network.
      sparsity: fraction of all prunable weights that are pruned, in [0, 1). `level_sparsity` gives that of a
        level.
      layerwise: prune every leaf to this sparsity, rather than all leaves together.
      within: a mask whose pruned weights stay pruned. With `within` the mask of a level, and `sparsity` that
        of the next level, this is a step of iterative magnitude pruning. Without it this is one-shot pruning.
      leaves: path names of the leaves that are pruned; by default `prunable_leaves`.

    Returns:
      A mask of NumPy arrays in the structure of `tree`.

    Raises:
      ConfigError: the sparsity is outside [0, 1) or leaves fewer than one weight per leaf, `within` keeps
        fewer weights than wanted, or `leaves` names leaves that are not there.
      NonFiniteError: a weight that may be pruned is NaN or infinite.
      TreeMismatchError: `within` does not fit the tree.

    Examples:
      >>> tree = {"w": np.array([[1.0, -4.0], [2.0, 3.0]]), "bias": np.zeros(2)}
      >>> magnitude_mask(tree, 0.5)["w"].tolist()
      [[False, True], [False, True]]
    """
    table, leaves = leaf_table(tree), _checked_leaves(tree, leaves)
    check_finite(tree, "the network to prune", leaves=leaves)
    magnitudes = {path: np.abs(_as_numpy(table[path])).ravel() for path in leaves}
    return _build_mask(tree, magnitudes, sparsity, layerwise, within)


def random_mask(
    tree: Any,
    sparsity: float | Fraction,
    *,
    key: jax.Array,
    layerwise: bool = False,
    within: Any = None,
    leaves: Sequence[str] | None = None,
) -> Any:
    """Return a mask that keeps weights drawn at random, as many as `magnitude_mask` keeps.

    Args:
      tree: the network, or its shapes.
      sparsity: fraction of all prunable weights that are pruned, in [0, 1).
      key: PRNG key.
      layerwise: prune every leaf to this sparsity, rather than all leaves together.
      within: a mask whose pruned weights stay pruned.
      leaves: path names of the leaves that are pruned; by default `prunable_leaves`.

    Returns:
      A mask of NumPy arrays in the structure of `tree`.

    Raises:
      ConfigError: as `magnitude_mask`.
      TreeMismatchError: `within` does not fit the tree.

    Examples:
      >>> int(random_mask({"w": np.ones((10, 10))}, 0.36, key=jax.random.key(0))["w"].sum())
      64
    """
    table, leaves = leaf_table(tree), _checked_leaves(tree, leaves)
    sizes = [math.prod(np.shape(table[path])) for path in leaves]
    # Ranks rather than uniform numbers, among which there are ties.
    ranks = np.asarray(jax.random.permutation(key, sum(sizes)))
    parts = np.split(ranks, np.cumsum(sizes)[:-1])
    return _build_mask(tree, dict(zip(leaves, parts, strict=True)), sparsity, layerwise, within)


def _checked_leaves(tree: Any, leaves: Sequence[str] | None) -> tuple[str, ...]:
    """Return the leaves to prune in alphabetical order, so that nothing depends on containers."""
    if leaves is None:
        return prunable_leaves(tree)
    table = leaf_table(tree)
    unknown = [path for path in leaves if path not in table]
    if unknown:
        raise ConfigError(problem_list("leaves do not fit the tree:", (f"no leaf {p!r}" for p in unknown)))
    if not leaves:
        raise ConfigError("leaves: wanted at least one leaf to prune, got none")
    return tuple(sorted(set(leaves)))


def _as_numpy(leaf: Any) -> np.ndarray:
    """Return a leaf in a type that NumPy can compare: types of half precision become float32."""
    leaf = np.asarray(leaf)
    return leaf.astype(np.float32) if leaf.dtype.itemsize < 4 else leaf


def _build_mask(
    tree: Any, scores: Mapping[str, np.ndarray], sparsity: float | Fraction, layerwise: bool, within: Any
) -> Any:
    """Return the mask that keeps the entries of highest score.

    Args:
      tree: the network, or its shapes.
      scores: a number of at least 0 for each entry, ``[size]``, of each leaf that is pruned.
      sparsity: fraction of entries that are pruned.
      layerwise: whether entries compete within their leaf alone.
      within: a mask whose pruned entries stay so, or `None`.
    """
    before = None if within is None else leaf_table(check_mask(within, tree, name="the network"))
    if before is not None:
        # Pruned weights have the score −1, below that of a weight that is zero.
        scores = {p: np.where(np.asarray(before[p]).ravel(), s, -1) for p, s in scores.items()}
    parts = [scores] if not layerwise else [{path: values} for path, values in scores.items()]
    kept = dict(before or {})
    for part in parts:
        kept |= _keep_highest(part, sparsity)

    def shaped(path: str, leaf: Any) -> np.ndarray:
        shape = np.shape(leaf)
        return np.asarray(kept[path]).reshape(shape) if path in kept else np.ones(shape, bool)

    return map_leaves(shaped, tree)


def _keep_highest(scores: Mapping[str, np.ndarray], sparsity: float | Fraction) -> dict[str, np.ndarray]:
    """Return which entries of some leaves stay when they compete with one another."""
    values = np.concatenate(list(scores.values()))
    count = count_kept(len(values), sparsity)
    where = next(iter(scores)) if len(scores) == 1 else f"{len(scores)} leaves"
    if count < len(scores):
        raise ConfigError(
            f"sparsity: {float(sparsity):.6g} keeps {count} of the {len(values)} weights of {where}; "
            "wanted at least one weight per leaf"
        )
    available = int(np.sum(values >= 0))
    if available < count:
        raise ConfigError(
            f"within: wanted at least {count} of the {len(values)} weights of {where}, for a sparsity of "
            f"{float(sparsity):.6g}, got {available}"
        )
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    kept = values > threshold
    ties = np.flatnonzero(values == threshold)
    kept[ties[len(ties) - (count - int(kept.sum())) :]] = True
    ends = np.cumsum([len(part) for part in scores.values()])
    return dict(zip(scores, np.split(kept, ends[:-1]), strict=True))
