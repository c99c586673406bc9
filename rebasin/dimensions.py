"""Effective dimensions of the matrices whose spectra govern the matching of a layer.

After arXiv 2310.19103, section 6. The fewer directions the neurons of a layer fill, the closer can they be
paired with those of another one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from rebasin.batches import Batches
from rebasin.errors import NonFiniteError, RebasinError
from rebasin.matching.metric import checked_inputs, find_metric, weigh
from rebasin.matching.site_products import Measurement, find_blocks, sum_products
from rebasin.roles import weight_leaves
from rebasin.spec import PermutationSpec
from rebasin.tracing.program import Static
from rebasin.trees import leaf_table

__all__ = [
    "EffectiveDimensions",
    "as_matrix",
    "as_moment",
    "effective_dimension",
    "effective_dimensions",
    "layer_neurons",
    "network_dimensions",
    "symmetric_root",
]


def effective_dimension(moment: ArrayLike) -> float:
    """Return the effective dimension (Σλ)² / Σλ² of a matrix with the eigenvalues λ.

    Args:
      moment: a symmetric positive semidefinite matrix, ``[d, d]``.

    Raises:
      RebasinError: it is no such matrix, or zero.
      NonFiniteError: a number is NaN or infinite.

    Examples:
      >>> effective_dimension([[3.0, 0.0], [0.0, 1.0]])
      1.6
    """
    moment = as_moment(moment, "moment")
    squares = (moment**2).sum()
    if squares == 0:
        raise RebasinError("moment: wanted a matrix that is not zero, got zeros alone")
    return float(np.trace(moment) ** 2 / squares)


class EffectiveDimensions(NamedTuple):
    """Effective dimensions of the matrices whose spectra govern the matching of one layer (section 6).

    Attributes:
      weights: of WᵀW, for weight matching.
      covariance: of W Σ Wᵀ, for covariance matching.
      activations: of the second moment of the layer's own activations, for activation matching.
    """

    weights: float
    covariance: float
    activations: float


def effective_dimensions(
    neurons: ArrayLike, entering: ArrayLike, activations: ArrayLike
) -> EffectiveDimensions:
    """Return the effective dimension that governs each matching method at one layer.

    Args:
      neurons: weight W of the layer, ``[n, d]``, one row for each unit.
      entering: what enters the layer for each example, ``[examples, d]``.
      activations: what the units of the layer do for each example, ``[examples, n]``.

    Raises:
      RebasinError: the arrays do not fit each other, or a matrix is zero.
      NonFiniteError: a number is NaN or infinite.

    Examples:
      >>> tuple(effective_dimensions(np.eye(2), [[1.0, 0.0], [1.0, 0.0]], np.eye(2)))
      (2.0, 1.0, 2.0)
    """
    w, x, y = (
        as_matrix(value, name)
        for value, name in ((neurons, "neurons"), (entering, "entering"), (activations, "activations"))
    )
    if x.shape[1] != w.shape[1] or y.shape[1] != w.shape[0]:
        raise RebasinError(
            f"wanted entering [examples, {w.shape[1]}] and activations [examples, {w.shape[0]}] for neurons "
            f"{list(w.shape)}, got {list(x.shape)} and {list(y.shape)}"
        )
    done = x @ w.T
    return EffectiveDimensions(*(effective_dimension(z.T @ z) for z in (w, done, y)))


def network_dimensions(
    spec: PermutationSpec,
    params: Any,
    apply_fn: Callable[..., Any],
    data: Any,
    *,
    batch_size: int = 500,
) -> dict[str, EffectiveDimensions]:
    """Return the effective dimensions that govern each matching method at every layer of a network.

    A neuron of a convolution is the kernel of one channel, what enters it are patches, and activations count
    at every position. The activations of a layer are those at which activation matching compares its units:
    in a residual network, layers that lead into one stream share them.

    Args:
      spec: the symmetries of the network.
      params: the tree of the network.
      apply_fn: ``(params, *inputs) -> outputs``, the function that `spec` was made for.
      data: a `rebasin.Batch`, whose labels are ignored, or its inputs alone, arrays ``[n, …]``.
      batch_size: number of examples that are evaluated at once.

    Returns:
      The dimensions by the path name of the layer's weight, in the order of the network. Layers whose units
      all stay where they are, as those of the output layer do, are left out, and so are layers whose units or
      whose units' positions carry several groups, such as those of attention.

    Raises:
      RebasinError: a matrix is zero, as where all units of a layer are dead.
      DataError: the data are empty, or of different lengths.
      InferenceError: the function cannot be traced with such a batch, or allows less than `spec`.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
      >>> network = lambda params, x: jax.nn.relu(x @ params["w"]) @ params["v"]
      >>> params = {"w": np.eye(2, dtype=np.float32), "v": np.ones((2, 1), np.float32)}
      >>> tuple(network_dimensions(spec, params, network, np.eye(2, dtype=np.float32))["w"])
      (2.0, 2.0, 2.0)
    """
    inputs = checked_inputs(data, batch_size)
    metric = find_metric(spec, params, apply_fn, inputs, batch_size, weight_leaves(params))
    table, weighted = leaf_table(params), leaf_table(weigh(metric, params, inputs))
    measurement = Measurement(spec, Static(apply_fn), Batches.of(inputs, batch_size), "last", "inner")
    blocks = [block.group for block in find_blocks(measurement, params, inputs)]
    sums, _ = jax.device_get(sum_products(measurement, tuple(range(len(blocks))), params, params, inputs))
    moments = {
        group: np.asarray(own.products[0] / own.count, np.float64)
        for group, own in zip(blocks, sums.value(), strict=True)
        if len(own.products) == 1
    }
    found = {}
    for path, contracted in metric.contracted:
        place = _output_axis(spec, path, contracted)
        if place is None or place[1] not in moments:
            continue
        axis, group = place
        w, product = (layer_neurons(tree[path], axis) for tree in (table, weighted))
        grams = (w @ w.T, product @ w.T, moments[group])
        found[path] = EffectiveDimensions(*map(effective_dimension, grams))
    return found


def layer_neurons(weight: ArrayLike, axis: int) -> np.ndarray:
    """Return the weight of a layer as ``[units, inputs]`` in float64; `axis` is that of the units."""
    array = np.asarray(weight, np.float64)
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _output_axis(spec: PermutationSpec, path: str, contracted: frozenset[str]) -> tuple[int, str] | None:
    """Return the axis of a weight along which its units lie, with their group; `None` unless there is one."""
    groups = [axis.groups for axis in spec.table[path]]
    places = [(i, own) for i, own in enumerate(groups) if set(own) - contracted - set(spec.fixed)]
    if len(places) != 1 or len(places[0][1]) != 1:
        return None
    return places[0][0], places[0][1][0]


def as_matrix(value: ArrayLike, name: str) -> np.ndarray:
    """Return a finite matrix with at least one entry in float64."""
    array = np.asarray(value, np.float64)
    if array.ndim != 2 or not array.size:
        raise RebasinError(f"{name}: wanted a matrix with at least one entry, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name}: {(~np.isfinite(array)).sum()} of {array.size} entries are not finite")
    return array


def as_moment(value: ArrayLike, name: str, size: int | None = None) -> np.ndarray:
    """Return a symmetric positive semidefinite matrix in float64."""
    array = as_matrix(value, name)
    wanted = [size or len(array)] * 2
    if list(array.shape) != wanted:
        raise RebasinError(f"{name}: wanted shape {wanted}, got {list(array.shape)}")
    least = linalg.eigvalsh((array + array.T) / 2, subset_by_index=[0, 0])[0]
    scale = np.abs(array).max()
    # Moments are computed in float32, whose rounding leaves eigenvalues somewhat below zero.
    if np.abs(array - array.T).max() > 1e-4 * scale or least < -1e-4 * scale * len(array):
        raise RebasinError(f"{name}: wanted a symmetric positive semidefinite matrix")
    return (array + array.T) / 2


def symmetric_root(moment: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = linalg.eigh(moment)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
