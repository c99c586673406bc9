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
import functools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.arithmetic import distance, inner_product, widen_weights
from rebasin.axis import Axis
from rebasin.batches import Batches, Sum, batch_shapes, check_counts, check_data, inputs_of, sum_batches
from rebasin.errors import ConfigError, NonFiniteError
from rebasin.inference.programs import bind
from rebasin.matching.method import Method, build_method, check_networks
from rebasin.matching.progress import ProgressFn, Reporter
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, compiled_permute, identity_permutation
from rebasin.roles import RoleNames, weight_leaves
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import evaluate
from rebasin.tracing.program import Static, trace_program
from rebasin.tracing.sites import Layer, find_layers
from rebasin.trees import (
    check_finite,
    leaf_table,
    map_leaves,
    real_parts,
)

__all__ = [
    "CovarianceMatching",
    "Metric",
    "Order",
    "apply_metric",
    "covariance_matching",
    "find_metric",
    "sum_weighted",
]

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
        inputs = _checked_inputs(needed["data"], self.batch_size)
        metric = find_metric(spec, params_a, needed["apply_fn"], inputs, self.batch_size, weights)
        weighted_a = _apply(metric, params_a, inputs)
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
        found = _distances(metric, params_a, moved, inputs, weights)
        distances = dict(zip(candidates, found, strict=True))
        if not np.isfinite(found).all():
            raise NonFiniteError(f"distances in the metric of Σ are not finite: {distances}")
        kept = min(distances, key=distances.__getitem__)  # of equal ones the first
        stats |= {
            "distance": (distances["identity"], distances[kept]),
            "distances": distances,
            "kept": kept,
            "weighted": metric.leaves,
            "seconds": time.perf_counter() - began,
        }
        objective = np.maximum.accumulate(-np.array(list(distances.values())))
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


def apply_metric(
    spec: PermutationSpec,
    params: Any,
    apply_fn: Callable[..., Any],
    data: Any,
    *,
    batch_size: int = 500,
    roles: RoleNames = None,
) -> Any:
    """Replace every layer's weight W by W Σ, with Σ from the network's own activations.

    Any method that matches weights becomes one in the metric of Σ if it gets the result in place of A.

    Args:
      spec: the symmetries of the network.
      params: the tree of the network.
      apply_fn: ``(params, *inputs) -> outputs``, the function that `spec` was made for.
      data: a `rebasin.Batch`, whose labels are ignored, or its inputs alone, arrays ``[n, …]``.
      batch_size: number of examples that are evaluated at once.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find; only weights are replaced.

    Returns:
      A tree like `params`.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> params = {"w": np.array([[1.0, 2.0]], np.float32), "v": np.ones((2, 1), np.float32)}
      >>> x = np.array([[2.0], [0.0]], np.float32)  # of second moment 2
      >>> apply_metric(spec, params, lambda params, x: x @ params["w"] @ params["v"], x)["w"].tolist()
      [[2.0, 4.0]]
    """
    inputs = _checked_inputs(data, batch_size)
    weights = weight_leaves(params, roles)
    return _apply(find_metric(spec, params, apply_fn, inputs, batch_size, weights), params, inputs)


class Metric(NamedTuple):
    """The layers of a network with a Σ of their own; a static argument of the compiled passes over the data.

    Attributes:
      spec: the symmetries of the network.
      apply_fn: the function of the network.
      batches: how the data fall into batches.
      contracted: the path name of the weight of each layer, with the groups over which the layer sums: the
        weight leads away from these groups, and into the other groups that it carries.
    """

    spec: PermutationSpec
    apply_fn: Static
    batches: Batches
    contracted: tuple[tuple[str, frozenset[str]], ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        """Path names of the weights of the layers."""
        return tuple(path for path, _ in self.contracted)


def _checked_inputs(data: Any, batch_size: int) -> tuple[Any, ...]:
    """Check data and return the inputs in them, on the device."""
    check_data(data, batch_size)
    inputs = jax.tree.map(jnp.asarray, inputs_of(data))
    check_finite(inputs, "data")
    return inputs


def find_metric(
    spec: PermutationSpec,
    params: Any,
    apply_fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    batch_size: int,
    weights: Collection[str],
) -> Metric:
    """Find the layers of a network whose weight is a leaf that counts.

    Layers in ``while`` loops are left out, since there is no gradient through them.
    """
    batches = Batches.of(inputs, batch_size)
    program = trace_program(spec, apply_fn, params, *batch_shapes(inputs, batches.size))
    contracted: dict[str, frozenset[str]] = {}
    for layer in find_layers(program):
        leaf = layer.leaf
        if leaf is not None and not layer.in_while and leaf in weights:
            contracted[leaf] = contracted.get(leaf, frozenset()) | layer.contracted
    return Metric(spec, Static(apply_fn), batches, tuple(contracted.items()))


def _apply(metric: Metric, params: Any, inputs: tuple[Any, ...]) -> Any:
    """Replace every weight W of a layer by W Σ, in the dtype of the leaf."""
    total = jax.device_get(sum_weighted(metric, params, inputs)).value()
    means = {path: x / metric.batches.sizes.sum() for path, x in total.items()}

    def weighted(path: str, leaf: Any) -> Any:
        mean = means.get(path, leaf)
        if path in means and jnp.iscomplexobj(leaf):
            mean = mean[..., 0] + 1j * mean[..., 1]
        return jnp.asarray(mean, jnp.result_type(leaf))

    return map_leaves(weighted, params)


@functools.partial(jax.jit, static_argnums=0)
def sum_weighted(metric: Metric, params: Any, inputs: tuple[Any, ...]) -> Sum:
    """Sum W Σ over all examples, for the weight W of every layer.

    W Σ is the gradient of ½ ‖W x‖², summed over examples, with respect to W, with the activations x given.
    For complex weights JAX returns its conjugate. Their sum has real and imaginary parts along a last axis.
    """

    def of_batch(batch: tuple[Any, ...]) -> Any:
        entering = _activations(metric, params, batch)

        def energy(weights: Mapping[str, jax.Array]) -> jax.Array:
            replaced = map_leaves(lambda path, x: weights.get(path, x), params)
            return _energy(metric, replaced, batch, entering)

        table = leaf_table(params)
        gradient = jax.grad(energy)({path: jnp.asarray(table[path]) for path in metric.leaves})
        return {path: real_parts(jnp.conj(x)) for path, x in gradient.items()}

    return sum_batches(of_batch, inputs, metric.batches)


@functools.partial(jax.jit, static_argnums=0)
def _sum_squares(metric: Metric, params: Any, others: tuple[Any, ...], inputs: tuple[Any, ...]) -> Sum:
    """Sum ‖W x‖² over examples and layers for each network of `others`, on the activations x of `params`."""

    def of_batch(batch: tuple[Any, ...]) -> Any:
        entering = _activations(metric, params, batch)
        return tuple(2 * _energy(metric, other, batch, entering) for other in others)

    return sum_batches(of_batch, inputs, metric.batches)


def _traced(metric: Metric, params: Any, inputs: tuple[Any, ...]) -> tuple[Any, dict[Any, Layer]]:
    """Trace the network; return its program and its layers by address."""
    program = trace_program(metric.spec, metric.apply_fn.function, params, *inputs)
    layers = [x for x in find_layers(program) if x.leaf in metric.leaves and not x.in_while]
    return program.closed, {layer.address: layer for layer in layers}


def _activations(metric: Metric, params: Any, inputs: tuple[Any, ...]) -> dict[Any, jax.Array]:
    """Return what enters each layer, by the address of the layer."""
    closed, layers = _traced(metric, params, inputs)

    def hand_out(address: Any, eqn: Any, operands: Sequence[Any], extra: Any) -> tuple[Any, Any]:
        return bind(eqn, operands), operands[layers[address].data]

    arguments = [jnp.asarray(x) for x in jax.tree.leaves((params, inputs))]
    return evaluate(closed, arguments, hand_out, dict.fromkeys(layers))[1]


def _energy(
    metric: Metric, params: Any, inputs: tuple[Any, ...], entering: Mapping[Any, jax.Array]
) -> jax.Array:
    """Sum ½ ‖W x‖² over layers, examples and outputs, as a mean over positions; `entering` holds every x."""
    closed, layers = _traced(metric, params, inputs)

    def energy(address: Any, eqn: Any, operands: Sequence[Any], x: jax.Array) -> tuple[Any, Any]:
        layer = layers[address]
        operands = [*operands[: layer.data], x, *operands[layer.data + 1 :]]
        (y,) = bind(eqn, operands)
        parts = real_parts(y)
        dtype = jnp.promote_types(parts.dtype, jnp.float32)
        outputs = _outputs(eqn, jnp.shape(operands[layer.weight]))
        scale = jax.tree.leaves(inputs)[0].shape[0] * outputs / (y.size * layer.repeats)
        # Later layers must not contribute to the gradient of this one: only its own outputs count.
        return [lax.stop_gradient(y)], 0.5 * scale * jnp.sum(jnp.square(parts.astype(dtype)))

    arguments = [jnp.asarray(x) for x in jax.tree.leaves((params, inputs))]
    _, energies = evaluate(closed, arguments, energy, entering)
    return sum((jnp.sum(x) for x in energies.values()), jnp.zeros(()))


def _outputs(eqn: Any, weight: tuple[int, ...]) -> int:
    """Return the number of outputs of a layer at each position, from its equation and its weight's shape."""
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return weight[eqn.params["dimension_numbers"].rhs_spec[0]]
    if name == "dot_general":
        (x, y), _ = eqn.params["dimension_numbers"]
        contracted = math.prod(eqn.invars[0].aval.shape[i] for i in x) if x else 1
        return math.prod(weight) // max(contracted, 1)
    return weight[-1]  # channels last, as in a convolution with a derivative of its own


def _distances(
    metric: Metric, params_a: Any, others: tuple[Any, ...], inputs: tuple[Any, ...], weights: Collection[str]
) -> tuple[float, ...]:
    """Return ‖A − B‖_Σ for each B of `others`; leaves without a Σ count with their Euclidean distance."""
    # Of the differences themselves: a difference of squares would lose the small distances that decide.
    squares = jax.device_get(_sum_squares(metric, params_a, _differences(metric, params_a, others), inputs))

    unweighted = frozenset(weights) - set(metric.leaves)
    plain = [distance(params_a, other, leaves=unweighted) for other in others]
    means = [float(total) / metric.batches.sizes.sum() for total in squares.value()]
    return tuple(math.sqrt(mean + rest**2) for mean, rest in zip(means, plain, strict=True))


def _differences(metric: Metric, params_a: Any, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return A − B for each B of `others` in the weights of layers; all other leaves are those of A."""
    tables = [leaf_table(other) for other in others]

    def difference(table: Mapping[str, Any]) -> Any:
        return map_leaves(lambda path, leaf: leaf - table[path] if path in metric.leaves else leaf, params_a)

    return tuple(map(difference, tables))


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
