"""The weights of layers, and how far their leading singular vectors agree between two networks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rebasin.permutation import Permutation, compiled_permute
from rebasin.spec import PermutationSpec
from rebasin.tracing.sites import Layer
from rebasin.trees import leaf_table, map_leaves

__all__ = ["WeightOfLayer", "singular_overlaps", "weights_of_layers"]

# Singular vectors lead if their singular value is at least this share of the largest of the layer.
_LEADING = 0.3


class WeightOfLayer(NamedTuple):
    """A leaf that is the weight of a layer.

    Attributes:
      path: path name of the leaf.
      axis: the axis of the leaf along which the layer's outputs lie; the rest is what it reads.
      writes: the groups of the layer's outputs.
      reads: the groups that the layer sums over.
    """

    path: str
    axis: int
    writes: frozenset[str]
    reads: frozenset[str]


def weights_of_layers(spec: PermutationSpec, layers: Sequence[Layer]) -> tuple[WeightOfLayer, ...]:
    """Find the leaves with at least two axes that are the weights of layers, in the order of the program.

    Args:
      spec: the symmetries of the network.
      layers: what `rebasin.tracing.sites.find_layers` found.

    Returns:
      One entry for each leaf. Of a leaf that serves several layers, such as a tied embedding, the first
      counts.
    """
    table, found = spec.table, {}
    for layer in layers:
        path = layer.leaf or ""
        axes = table.get(path, ())
        if len(axes) < 2 or path in found:
            continue
        writes = frozenset(g for i in layer.channels for g in layer.axes[i].groups) - set(spec.fixed)
        outputs = [i for i, axis in enumerate(axes) if writes.intersection(axis.groups)]
        inputs = [i for i, axis in enumerate(axes) if layer.contracted.intersection(axis.groups)]
        # A matrix has the same singular vectors either way, so it does not matter for the last layer, whose
        # outputs carry no group.
        axis = outputs[-1] if outputs else inputs[0] if inputs else len(axes) - 1
        found[path] = WeightOfLayer(path, axis, writes, layer.contracted)
    return tuple(found.values())


def singular_overlaps(
    spec: PermutationSpec,
    weights: Sequence[WeightOfLayer],
    params_a: Any,
    params_b: Any,
    permutation: Permutation,
) -> dict[str, tuple[float, float]]:
    """Measure how far the leading singular vectors of two networks agree, before and after a permutation.

    With singular vectors uᵢ, vᵢ of a layer in A and u′ⱼ, v′ⱼ in B, of which k and k′ have a singular value of
    at least 0.3 of the largest, it is

        Σᵢⱼ ⟨uᵢ, u′ⱼ⟩⟨vᵢ, v′ⱼ⟩ / √(k k′),

    which is 1 where the leading parts of both have the same directions and 0 where they have nothing in
    common. Ito et al. 2024 (arXiv 2402.04051) explain by such a sum what weight matching aligns; here it is
    taken layer by layer.

    Args:
      spec: the symmetries of the networks.
      weights: the leaves to compare.
      params_a: tree of A.
      params_b: tree of B.
      permutation: what moves B.

    Returns:
      For each leaf by path name, the overlap before and after the permutation.
    """
    table_a, table_b = leaf_table(params_a), leaf_table(params_b)
    frames_a = {w.path: _leading_frame(table_a[w.path], w.axis) for w in weights}
    frames_b = {w.path: _leading_frame(table_b[w.path], w.axis) for w in weights}
    # A permutation of units moves the entries of singular vectors, so Σⱼ u′ⱼ v′ⱼᵀ moves as the weight does.
    tree = map_leaves(lambda path, leaf: frames_b.get(path, leaf), params_b)
    moved = leaf_table(jax.device_get(compiled_permute(spec, permutation, tree)))
    return {
        path: (_overlap(frame, frames_b[path]), _overlap(frame, moved[path]))
        for path, frame in frames_a.items()
    }


def _leading_frame(leaf: Any, axis: int) -> np.ndarray:
    """Return Σᵢ uᵢ vᵢᵀ over the leading singular vectors, divided by √k, in the shape of the leaf."""
    values = np.asarray(leaf)
    values = values.astype(np.promote_types(values.dtype, np.float32))
    front = np.moveaxis(values, axis, 0)
    u, s, v = np.linalg.svd(front.reshape(len(front), -1), full_matrices=False)
    count = int(np.sum(s >= _LEADING * s[0])) if s.size and s[0] > 0 else 0
    frame = (u[:, :count] @ v[:count]) / np.sqrt(max(count, 1))
    return np.ascontiguousarray(np.moveaxis(frame.reshape(front.shape), 0, axis))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(np.asarray(a), np.asarray(b)).real)
