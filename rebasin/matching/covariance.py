"""Covariance matching: weight matching in the metric of the activations that enter each layer.

Section 6 of arXiv 2310.19103. Let Σ be the uncentred second moment of what enters a layer of network A. The
inner product of the weights W_A and W_B is then ⟨W_A, W_B⟩_Σ = tr(W_A Σ W_Bᵀ) = E[(W_A x)·(W_B x)]: two units
are alike if they do alike on A's own activations x, whatever their weights in directions that x never takes.

With Σ = I the method is weight matching.

Networks are compared by their Σ-distance ‖A − P[B]‖_Σ, the root of the sum of ‖W_A − P[W_B]‖²_Σ over layers
and of the plain ‖·‖² of all other weights. The objective of the method is minus that distance. The
assignments maximise inner products, as Section 6 has it. Given the permutation of what enters a layer,
‖P[W_B]‖_Σ does not depend on that of what leaves it, so the largest inner product is the least distance. In
an ascent over all groups it need not be, since permuting what enters a layer changes ‖P[W_B]‖_Σ. The method
therefore returns whichever has the least distance: the identity, the pass in order of depth, or the end of
the ascent.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import numpy as np

from rebasin.arithmetic import inner_product, widen_weights
from rebasin.axis import Axis
from rebasin.batches import check_counts
from rebasin.errors import ConfigError, NonFiniteError
from rebasin.matching.method import Method, build_method, check_networks
from rebasin.matching.metric import Metric, checked_inputs, distances, find_metric, weigh
from rebasin.matching.progress import ProgressFn, Reporter
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, compiled_permute, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import check_finite, leaf_table

__all__ = ["CovarianceMatching", "Order", "covariance_matching"]

Order: TypeAlias = Literal["ascent", "depth"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class CovarianceMatching(Method):
    """Covariance matching, together with its options.

    Attributes:
      order: ``"depth"`` assigns each group once, in the order of the network, by the weights that lead into
        it from what is already known. This is the method of arXiv 2310.19103; each assignment is exact given
        the earlier ones. ``"ascent"`` goes on from there by coordinate ascent over all groups and weights in
        the Σ-inner product, and from the identity instead where that has the higher inner product. Its end is
        taken only if it has the smaller Σ-distance.
      batch_size: number of examples that are evaluated at once. Memory does not depend on the number of all
        examples.
      max_iterations: limit on the iterations of the ascent.
      roles: as in `Method`; only weights count.
    """

    name: ClassVar[str] = "covariance"
    objective: ClassVar[str] = "−‖A − P[B]‖ in the metric of the activations"

    order: Order = "ascent"
    batch_size: int = 500
    max_iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("ascent", "depth"):
            raise ConfigError(f"unknown order {self.order!r}; known: 'ascent', 'depth'")
        check_counts(1, batch_size=self.batch_size, max_iterations=self.max_iterations)

    @property
    def needs(self) -> tuple[str, ...]:
        """The network as a function, data, and a key for the order of groups in the ascent."""
        return ("apply_fn", "data", "key")

    def _match(
        self, spec: PermutationSpec, params_a: Any, params_b: Any, report: Reporter, **needed: Any
    ) -> MatchResult:
        began = time.perf_counter()
        key = needed["key"]
        (params_a, params_b), weights = check_networks(
            spec, {"params_a": params_a, "params_b": params_b}, self.roles
        )
        params_a, params_b = (widen_weights(tree, weights) for tree in (params_a, params_b))
        inputs = checked_inputs(needed["data"], self.batch_size)
        metric = find_metric(spec, params_a, needed["apply_fn"], inputs, self.batch_size, weights)
        weighted_a = weigh(metric, params_a, inputs)
        counted = {path: leaf for path, leaf in leaf_table(weighted_a).items() if path in weights}
        check_finite(counted, "A in the metric of Σ")

        candidates: dict[str, Permutation] = {"identity": identity_permutation(spec, params_b)}
        candidates["depth"] = _match_in_order(spec, weighted_a, params_b, metric, key, weights, report)
        stats: dict[str, Any] = {}
        converged = True
        if self.order == "ascent":
            start = _better_start(spec, weighted_a, params_b, candidates["depth"], weights)
            ascent = weight_matching(
                spec,
                weighted_a,
                params_b,
                key=key,
                progress=lambda state: state.done or report("ascent", state.iteration, state.limit),
                start=candidates[start],
                max_iterations=self.max_iterations,
                restarts=0,
                roles=self.roles,
            )
            candidates["ascent"], converged = ascent.permutation, ascent.converged
            stats |= {"start": start, "inner_products": ascent.objective}
        moved = tuple(compiled_permute(spec, rows, params_b) for rows in candidates.values())
        found = distances(metric, params_a, moved, inputs, weights)
        apart = dict(zip(candidates, found, strict=True))
        if not np.isfinite(found).all():
            raise NonFiniteError(f"distances in the metric of Σ are not finite: {apart}")
        kept = min(apart, key=apart.__getitem__)  # of equal ones the first
        stats |= {
            "distance": (apart["identity"], apart[kept]),
            "distances": apart,
            "kept": kept,
            "weighted": metric.leaves,
            "seconds": time.perf_counter() - began,
        }
        objective = np.maximum.accumulate(-np.array(list(apart.values())))
        return MatchResult(dict(candidates[kept]), objective, len(objective) - 1, converged, stats)


def covariance_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    apply_fn: Callable[..., Any],
    data: Any,
    *,
    key: jax.Array,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find a permutation of B whose layers do what A's do, on the activations of A.

    The objective is minus the Σ-distance, −‖A − P[B]‖_Σ over all weights. What is assigned, group by group,
    are Σ-inner products. Unlike the Euclidean norm, the Σ-norm of P[B] depends on P, so the largest inner
    product need not be the least distance. Of the identity, the pass in order of depth and the ascent, the
    one of least distance is therefore returned. Every group is solved, even if an earlier one gained nothing;
    the loop that the authors published leaves such groups unsolved.

    Args:
      spec: the symmetries of the networks.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      apply_fn: ``(params, *inputs) -> outputs``, the function that `spec` was made for.
      data: a `rebasin.Batch`, whose labels are ignored, or its inputs alone, arrays ``[n, …]``.
      key: PRNG key for the order of groups in the ascent.
      progress: called after each group of the pass, each iteration of the ascent and at the end, as in
        `Method.match`. The objective is known at the end only.
      **options: the fields of `CovarianceMatching`.

    Returns:
      The match. `objective` is the best so far of the identity, the pass and, with ``order="ascent"``, the
      ascent; the pass and the ascent count as one iteration each. ``stats`` has ``distances``, the Σ-distance
      of each of them; ``kept``, which of them is returned; ``distance``, the Σ-distance of the identity and
      of the result; ``weighted``, the leaves with a metric of their own; ``seconds``; and of the ascent
      ``start``, where it began, and ``inner_products``, the Σ-inner product at its start and after each of
      its iterations.

    Raises:
      ConfigError: an option cannot work.
      DataError: the data are empty, or of different lengths.
      InferenceError: the function cannot be traced with such a batch, or allows less than `spec`.
      NonFiniteError: a leaf, an input or a product with Σ is NaN or infinite.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, -3.0]]), "v": np.ones((3, 1))}
      >>> b = {"w": np.array([[-3.0, 1.0, 2.0]]), "v": np.ones((3, 1))}
      >>> network = lambda params, x: jax.nn.tanh(x @ params["w"]) @ params["v"]
      >>> x = np.array([[1.0], [-2.0]])
      >>> covariance_matching(spec, a, b, network, x, key=jax.random.key(0)).permutation["P0"].tolist()
      [1, 2, 0]
    """
    method = build_method(CovarianceMatching, options)
    return method.match(spec, params_a, params_b, key=key, apply_fn=apply_fn, data=data, progress=progress)


def _match_in_order(
    spec: PermutationSpec,
    weighted_a: Any,
    params_b: Any,
    metric: Metric,
    key: jax.Array,
    weights: Collection[str],
    report: Reporter,
) -> Permutation:
    """Match every group once, in order of depth, by the weights that lead into it from what is known."""
    known: dict[str, np.ndarray] = {}
    identity = identity_permutation(spec, params_b)
    outer = spec.outer_groups
    for first in spec.groups:
        if first in known:
            continue
        related = {first, *outer.get(first, ())}
        family = {g for g in spec.groups if related & {g, *outer.get(g, ())}} - set(spec.fixed) - known.keys()
        leading = _leading_leaves(spec, family, known, dict(metric.contracted)) & frozenset(weights)
        if not leading:
            continue  # no weight says anything about these groups
        moved = compiled_permute(spec, identity | known, params_b)
        match = weight_matching(
            _restrict(spec, family),
            weighted_a,
            moved,
            key=key,
            start="identity",
            restarts=0,
            roles={path: "weight" if path in leading else "constant" for path, _ in spec.leaves},
        )
        known |= match.permutation
        report("depth", len(known), len(spec.groups))
    return identity | known


def _leading_leaves(
    spec: PermutationSpec,
    family: set[str],
    known: Collection[str],
    contracted: Mapping[str, frozenset[str]],
) -> frozenset[str]:
    """Return the leaves that lead into a family from known groups; if there are none, those leading away."""
    into, away = set(), set()
    for path, axes in spec.leaves:
        groups = {group for axis in axes for group in axis.groups} - set(spec.fixed)
        if groups & family and groups - family <= set(known):
            (away if contracted.get(path, frozenset()) & family else into).add(path)
    return frozenset(into or away)


def _restrict(spec: PermutationSpec, groups: set[str]) -> PermutationSpec:
    """Return the spec in which only these groups move."""
    kept = groups | set(spec.fixed)

    def restricted(axis: Axis) -> Axis:
        return axis.rename({group: group if group in kept else None for group in axis.groups})

    leaves = tuple((path, tuple(map(restricted, axes))) for path, axes in spec.leaves)
    return PermutationSpec(leaves, tuple(x for x in spec.indexed if x[0] in groups), spec.fixed)


def _better_start(
    spec: PermutationSpec, weighted_a: Any, params_b: Any, in_order: Permutation, weights: Collection[str]
) -> str:
    """Return the name of the start of the ascent: the pass in order of depth, or the identity if higher."""
    moved = compiled_permute(spec, in_order, params_b)
    found, plain = (inner_product(weighted_a, other, leaves=weights) for other in (moved, params_b))
    return "depth" if found >= plain else "identity"
