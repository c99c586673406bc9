"""What similarity means: leaves weighted, and units divided by their norms."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from rebasin.errors import ConfigError, problem_list
from rebasin.matching.blocks import Leaves, Piece, aligned, iter_pieces
from rebasin.spec import PermutationSpec
from rebasin.trees import is_below

__all__ = ["Kernel", "check_kernel", "kernel_pieces"]

Kernel: TypeAlias = Literal["inner", "cosine"]

_ROUNDS = 200
_TOLERANCE = 1e-6


def check_kernel(kernel: str, leaf_weights: Mapping[str, float] | None, paths: Iterable[str]) -> None:
    """Raises `ConfigError` for an unknown kernel and for weights that cannot be meant."""
    problems = []
    if kernel not in get_args(Kernel):
        problems.append(f"kernel: unknown {kernel!r}; known: {', '.join(map(repr, get_args(Kernel)))}")
    paths = list(paths)
    for name, weight in (leaf_weights or {}).items():
        if not any(is_below(path, name) for path in paths):
            problems.append(f"leaf_weights: {name!r} names no leaf that counts")
        if not (np.isfinite(weight) and weight >= 0):
            problems.append(f"leaf_weights: {name!r} has weight {weight}, wanted a finite one of at least 0")
    if problems:
        raise ConfigError(problem_list("this matching cannot work:", problems))


def kernel_pieces(
    spec: PermutationSpec,
    leaves: Leaves,
    kernel: Kernel = "inner",
    leaf_weights: Mapping[str, float] | None = None,
) -> list[Piece]:
    """The pieces whose plain inner product is the objective of a kernel with weights.

    Args:
      spec: the symmetries.
      leaves: those that count, of A and of B.
      kernel: as in `weight_matching`.
      leaf_weights: factors of leaves or whole subtrees; the longest name that a leaf lies below decides.
    """
    pieces = list(iter_pieces(spec, leaves))
    if leaf_weights:
        # The root on both sides, so that norms count a leaf as the objective does.
        roots = {path: _weight(path, leaf_weights) ** 0.5 for path in leaves}
        pieces = [
            p if roots[p.path] == 1 else p._replace(a=p.a * p.a.dtype.type(r), b=p.b * p.b.dtype.type(r))
            for p in pieces
            if (r := roots[p.path]) > 0
        ]
    if kernel == "cosine":
        # The weights of a head are those of its insides, which cannot both have norm one.
        indices = {outer for outers in spec.outer_groups.values() for outer in outers}
        groups = [group for group in spec.groups if group not in indices]
        a = _normalised([p.a for p in pieces], pieces, groups)
        b = _normalised([p.b for p in pieces], pieces, groups)
        pieces = [p._replace(a=x, b=y) for p, x, y in zip(pieces, a, b, strict=True)]
    return pieces


def _weight(path: str, leaf_weights: Mapping[str, float]) -> float:
    names = [name for name in leaf_weights if is_below(path, name)]
    return leaf_weights[max(names, key=len)] if names else 1.0


def _normalised(
    blocks: Sequence[np.ndarray], pieces: Sequence[Piece], groups: Sequence[str]
) -> list[np.ndarray]:
    """One network with each unit divided by a number, so that all weights of every unit have norm one.

    The numbers minimise Σ ½(w · Π scales)² − Σ log scale, which is convex in their logarithms, group by
    group. A unit whose weights are all zero keeps them. Where no such numbers are (two groups of different
    sizes that meet only each other), what the last round found counts.
    """
    squares = [np.square(block, dtype=np.float64) for block in blocks]
    scales: dict[str, np.ndarray] = {}
    places: dict[str, list[tuple[int, int]]] = {group: [] for group in groups}
    for number, piece in enumerate(pieces):
        for dim, label in enumerate(piece.labels):
            if label in places:
                places[label].append((number, dim))
                shape = [piece.a.shape[d] for d in (*piece.index[dim], dim)]
                scales.setdefault(label, np.ones(shape))
    for _ in range(_ROUNDS):
        worst = 0.0
        for group, scale in scales.items():
            norms = np.zeros_like(scale)
            repeated = False
            for number, dim in places[group]:
                piece = pieces[number]
                dims = (*piece.index[dim], dim)
                scaled = _scaled(squares[number], piece, scales, power=2)
                total = scaled.sum(axis=tuple(d for d in range(scaled.ndim) if d not in dims))
                norms += np.transpose(total, np.argsort(np.argsort(dims)))
                repeated |= piece.labels.count(group) > 1
            alive = norms > 0
            worst = max(worst, float(np.abs(norms[alive] - 1).max(initial=0.0)))
            # Where a leaf carries the group twice, a whole step would overshoot.
            scales[group] = scale * np.where(alive, norms, 1.0) ** (-0.25 if repeated else -0.5)
        if worst < _TOLERANCE:
            break
    pairs = zip(blocks, pieces, strict=True)
    return [_scaled(block, piece, scales, power=1).astype(block.dtype) for block, piece in pairs]


def _scaled(values: np.ndarray, piece: Piece, scales: Mapping[str, np.ndarray], *, power: int) -> np.ndarray:
    """A block times the scales of all its dimensions."""
    for dim, label in enumerate(piece.labels):
        if label is not None and label in scales:
            values = values * aligned(scales[label] ** power, piece.index[dim], dim, piece.a.shape)
    return values
