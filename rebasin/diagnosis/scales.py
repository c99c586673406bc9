"""Layers of B that are scaled otherwise than those of A, and how they can be scaled back."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rebasin.diagnosis.layers import WeightOfLayer
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, map_leaves

__all__ = ["OVER_SCALED", "Rescaled", "norm_ratios", "rescale"]

# A layer is over-scaled in one of two networks if its norms differ by more than this factor. Layers of
# networks that were trained alike differ by up to 1.1, by 1.35 in a deep network without norms.
OVER_SCALED = 1.5

# Largest change of an output, relative to the largest output, that counts as rounding.
_SAME = 1e-3


class Rescaled(NamedTuple):
    """B with layers scaled to the norms of A's, and the path names of their weights."""

    params: Any
    paths: tuple[str, ...]


def norm_ratios(weights: Sequence[WeightOfLayer], params_a: Any, params_b: Any) -> dict[str, float]:
    """Return ‖A‖ / ‖B‖ of the weight of each layer, which no permutation changes.

    Args:
      weights: the leaves to compare.
      params_a: tree of A.
      params_b: tree of B.

    Returns:
      The ratio by path name; infinite or NaN where B's weight is zero.
    """
    a, b = leaf_table(params_a), leaf_table(params_b)
    return {weight.path: _ratio(a[weight.path], b[weight.path]) for weight in weights}


def rescale(
    spec: PermutationSpec,
    weights: Sequence[WeightOfLayer],
    params_a: Any,
    params_b: Any,
    outputs_of: Callable[[Any], Any],
) -> Rescaled:
    """Scale over-scaled layers of B to the norms of A's, wherever B still computes the same function.

    Two symmetries of scale are tried for each layer in turn, and B is evaluated to see whether it has them: a
    layer in front of a norm may be scaled alone, and units behind a ReLU may be scaled if the layers that
    read them are scaled inversely.

    Args:
      spec: the symmetries of the networks, by whose groups the leaves to scale are found.
      weights: the weights of the layers, in the order of the program.
      params_a: tree of A.
      params_b: tree of B.
      outputs_of: ``params -> outputs``, the function on some data.

    Returns:
      The scaled tree, and which layers were brought back.
    """
    table_a, expected = leaf_table(params_a), jax.device_get(outputs_of(params_b))
    params, brought_back = params_b, []
    for weight in weights:
        ratio = _ratio(table_a[weight.path], leaf_table(params)[weight.path])
        if not is_over_scaled(ratio) or not math.isfinite(ratio) or ratio == 0:
            continue
        for factors in _scalings(spec, weights, weight, ratio):
            scaled = map_leaves(lambda path, leaf, f=factors: _times(leaf, f.get(path)), params)
            if _agree(jax.device_get(outputs_of(scaled)), expected):
                params, brought_back = scaled, [*brought_back, weight.path]
                break
    return Rescaled(params, tuple(brought_back))


def is_over_scaled(ratio: float) -> bool:
    """Tell whether a layer is over-scaled in one of the networks, by the ratio of its norms."""
    return not 1 / OVER_SCALED <= ratio <= OVER_SCALED


def _scalings(
    spec: PermutationSpec, weights: Sequence[WeightOfLayer], weight: WeightOfLayer, ratio: float
) -> list[Mapping[str, np.float32]]:
    """Return the factors of leaves under the symmetries that may scale a layer."""
    carrying = {
        path for path, axes in spec.leaves if any(weight.writes.intersection(axis.groups) for axis in axes)
    }
    reading = {w.path for w in weights if weight.writes & w.reads}
    factor, inverse = np.float32(ratio), np.float32(1 / ratio)
    folder = weight.path.rpartition("/")[0]
    alone = {path: factor for path in carrying - reading if path.rpartition("/")[0] == folder}
    whole = {path: inverse if path in reading else factor for path in carrying | reading}
    return [alone | {weight.path: factor}, whole] if weight.path not in reading else []


def _times(leaf: Any, factor: np.float32 | None) -> Any:
    return leaf if factor is None else (leaf * factor).astype(leaf.dtype)


def _ratio(a: Any, b: Any) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.linalg.norm(np.ravel(a)) / np.linalg.norm(np.ravel(b)))


def _agree(outputs: Any, expected: Any) -> bool:
    """Tell whether outputs are the same up to rounding."""
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True)
    return all(np.max(np.abs(x - y), initial=0) <= _SAME * np.max(np.abs(y), initial=0) for x, y in pairs)
