"""Covariance matching: weight matching in the metric of the activations that enter each layer.

Section 6 of arXiv 2310.19103. With Σ the uncentred second moment of what enters a layer of network A, the
inner product of the weights W_A and W_B is ⟨W_A, W_B⟩_Σ = tr(W_A Σ W_Bᵀ) = E[(W_A x)·(W_B x)]: two units are
alike if they do alike on A's own activations x, whatever their weights in directions that x never takes.

How the metric is applied, and to which leaves, is told in `rebasin.matching.metric`. With Σ = I the method is
weight matching.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from rebasin.axis import Axis
from rebasin.errors import ConfigError
from rebasin.matching.metric import Metric, inner_product
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import identity_permutation, permute
from rebasin.spec import PermutationSpec
from rebasin.tracing.program import Static
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, is_weight, leaf_table

__all__ = ["Order", "covariance_matching"]

Order = Literal["ascent", "depth"]

_permute = jax.jit(permute, static_argnums=0)


def covariance_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    function: Callable[[Any, Any], Any],
    data: Any,
    *,
    key: jax.Array,
    order: Order = "ascent",
    batch_size: int = 500,
    max_sweeps: int = 100,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """Finds a permutation of B whose layers do what A's do, on the activations of A.

    The objective is the Σ-inner product of all weights, ``Σ_leaves ⟨A, P[B]⟩_Σ``. Unlike the Euclidean norm,
    the Σ-norm of P[B] depends on P, so that the largest inner product need not be the least Σ-distance; the
    distance is reported beside it. No group is left unsolved because an earlier one gained nothing, as in
    the loop that its authors published.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      function: ``(tree, batch) -> outputs``, the function that `spec` was made for.
      data: tree of arrays ``[n, …]`` with one common n; a batch is a slice of it.
      key: PRNG key for the order of groups in the ascent.
      order: ``"depth"`` assigns each group once, in the order of the network, by the weights that lead into
        it from what is already known: the paper's method, exact for each group given the earlier ones; its
        objective is the sum over groups of what was maximised. ``"ascent"`` goes on from there (or from the
        identity, where that is higher) by coordinate ascent over all groups and weights.
      batch_size: examples evaluated at once. Memory does not depend on n.
      max_sweeps: limit on sweeps of an ascent.
      predicate: ``(path, leaf) -> bool``, the leaves that count.

    Returns:
      The match. ``stats`` has ``distance``, the Σ-distance ``‖A − P[B]‖_Σ`` at the identity and at the end;
      ``weighted``, the leaves with a metric of their own; ``start`` of the ascent; and ``seconds``.

    Raises:
      ConfigError: an unknown order, an empty batch, or no sweeps.
      DataError: the data are empty, or of different lengths.
      InferenceError: the function cannot be traced with such a batch, or allows less than `spec`.
      NonFiniteError: a leaf, an input or a product with Σ is NaN or infinite.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, -3.0]]), "v": np.ones((3, 1))}
      >>> b = {"w": np.array([[-3.0, 1.0, 2.0]]), "v": np.ones((3, 1))}
      >>> network = lambda tree, x: jax.nn.tanh(x @ tree["w"]) @ tree["v"]
      >>> x = np.array([[1.0], [-2.0]])
      >>> covariance_matching(spec, a, b, network, x, key=jax.random.key(0)).permutation["P0"].tolist()
      [1, 2, 0]
    """
    began = time.perf_counter()
    if order not in ("ascent", "depth"):
        raise ConfigError(f"unknown order {order!r}; known: 'ascent', 'depth'")
    check_same_shapes(params_a, params_b)
    for tree, name in ((params_a, "params_a"), (params_b, "params_b")):
        spec.group_sizes(tree, name=name)
        check_finite({p: leaf for p, leaf in leaf_table(tree).items() if predicate(p, leaf)}, name)
    metric = Metric(spec, params_a, Static(function), data, batch_size, predicate)
    weighted = metric.apply()
    check_finite({p: x for p, x in leaf_table(weighted).items() if predicate(p, x)}, "A in the metric of Σ")

    match = _depth_pass(spec, weighted, params_b, metric.contracted, key, predicate)
    stats: dict[str, Any] = {}
    if order == "ascent":
        start, stats["start"] = _better(spec, weighted, params_b, match.permutation, predicate)
        match = weight_matching(
            spec,
            weighted,
            params_b,
            key=key,
            start=start,
            max_sweeps=max_sweeps,
            restarts=0,
            predicate=predicate,
        )
    moved = _permute(spec, match.permutation, params_b)
    stats["distance"] = metric.distances(weighted, [params_b, moved])
    stats["weighted"] = metric.leaves
    stats["seconds"] = time.perf_counter() - began
    return MatchResult(match.permutation, match.objective, match.num_sweeps, match.converged, stats)


def _depth_pass(
    spec: PermutationSpec,
    weighted: Any,
    params_b: Any,
    contracted: Mapping[str, frozenset[str]],
    key: jax.Array,
    predicate: LeafPredicate,
) -> MatchResult:
    """Every group once, in order of depth, by the weights that lead into it from what is known."""
    known: dict[str, np.ndarray] = {}
    identity = identity_permutation(spec, params_b)
    outer, start, end = spec.outer_groups, 0.0, 0.0
    for first in spec.groups:
        if first in known:
            continue
        related = {first, *outer.get(first, ())}
        family = {g for g in spec.groups if related & {g, *outer.get(g, ())}} - set(spec.fixed) - known.keys()
        leading = _leading(spec, family, known.keys(), contracted)
        moved = _permute(spec, identity | known, params_b)
        match = weight_matching(
            _restrict(spec, family),
            weighted,
            moved,
            key=key,
            start="identity",
            restarts=0,
            predicate=lambda path, x, leading=leading: path in leading and predicate(path, x),
        )
        known |= match.permutation
        start, end = start + match.objective[0], end + match.objective[-1]
    return MatchResult(identity | known, np.array([start, end]), 1, True)


def _leading(
    spec: PermutationSpec, family: set[str], known: Any, contracted: Mapping[str, frozenset[str]]
) -> frozenset[str]:
    """The leaves that lead into a family from what is known; those that lead away where there are none."""
    into, away = set(), set()
    for path, axes in spec.leaves:
        groups = {group for axis in axes for group in axis.groups} - set(spec.fixed)
        if groups & family and groups - family <= set(known):
            (away if contracted.get(path, frozenset()) & family else into).add(path)
    return frozenset(into or away)


def _restrict(spec: PermutationSpec, groups: set[str]) -> PermutationSpec:
    """The spec with all other groups staying put."""
    kept = groups | set(spec.fixed)

    def restricted(axis: Axis) -> Axis:
        return Axis(
            tuple(
                tuple(f if f.group in kept else f._replace(group=None) for f in segment)
                for segment in axis.segments
            )
        )

    leaves = tuple((path, tuple(map(restricted, axes))) for path, axes in spec.leaves)
    return PermutationSpec(leaves, tuple(x for x in spec.indexed if x[0] in groups), spec.fixed)


def _better(
    spec: PermutationSpec, weighted: Any, params_b: Any, depth: Any, predicate: LeafPredicate
) -> tuple[dict[str, np.ndarray], str]:
    """The start of the ascent: the pass in order of depth, unless the identity is higher."""
    values = [
        inner_product(weighted, tree, predicate) for tree in (_permute(spec, depth, params_b), params_b)
    ]
    if values[0] >= values[1]:
        return depth, "depth"
    return identity_permutation(spec, params_b), "identity"
