"""Covariance matching: weight matching in the metric of the activations that enter each layer.

Section 6 of arXiv 2310.19103. With Σ the uncentred second moment of what enters a layer of network A, the
inner product of the weights W_A and W_B is ⟨W_A, W_B⟩_Σ = tr(W_A Σ W_Bᵀ) = E[(W_A x)·(W_B x)]: two units are
alike if they do alike on A's own activations x, whatever their weights in directions that x never takes.

With Σ = I the method is weight matching.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.axis import Axis
from rebasin.batches import Batches, batch_shapes, check_data, sum_batches
from rebasin.errors import ConfigError
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import identity_permutation, permute
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import bind, evaluate
from rebasin.tracing.program import Static, trace_program
from rebasin.tracing.sites import Layer, find_layers
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, is_weight, leaf_table, map_leaves

__all__ = ["Metric", "Order", "apply_metric", "covariance_matching", "inner_product"]


def apply_metric(
    spec: PermutationSpec,
    params: Any,
    function: Callable[[Any, Any], Any],
    data: Any,
    *,
    batch_size: int = 500,
    predicate: LeafPredicate = is_weight,
) -> Any:
    """The tree with W Σ in place of every layer's weight W, Σ from the network's own activations.

    Args:
      spec: the symmetries.
      params: the tree.
      function: ``(tree, batch) -> outputs``.
      data: tree of arrays ``[n, …]``.
      batch_size: examples evaluated at once.
      predicate: the leaves that count.

    Returns:
      A tree like `params`; any method that matches weights becomes one in the metric of Σ if it gets this in
      place of A.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> tree = {"w": np.array([[1.0, 2.0]], np.float32), "v": np.ones((2, 1), np.float32)}
      >>> x = np.array([[2.0], [0.0]], np.float32)  # of second moment 2
      >>> apply_metric(spec, tree, lambda t, x: x @ t["w"] @ t["v"], x)["w"].tolist()
      [[2.0, 4.0]]
    """
    return Metric(spec, params, Static(function), data, batch_size, predicate).apply()


class Metric:
    """Σ of one network over one split, as something that can be applied."""

    def __init__(
        self,
        spec: PermutationSpec,
        params: Any,
        function: Static,
        data: Any,
        batch_size: int,
        predicate: LeafPredicate,
    ) -> None:
        check_data(data, batch_size)
        check_finite(jax.tree.map(jnp.asarray, data), "data")
        self.batches = Batches.of(data, batch_size)
        self.spec, self.params, self.function, self.data = spec, params, function, data
        self.predicate = predicate
        table = leaf_table(params)
        layers = find_layers(
            trace_program(spec, function.function, params, batch_shapes(data, self.batches.size))
        )
        usable = [layer for layer in layers if layer.leaf is not None and not layer.in_while]
        names = dict.fromkeys(layer.leaf for layer in usable if layer.leaf is not None)
        self.leaves = tuple(path for path in names if predicate(path, table[path]))
        # Groups that each weight sums over: it leads away from them, and into the others.
        self.contracted = {
            path: frozenset().union(*(layer.contracted for layer in usable if layer.leaf == path))
            for path in self.leaves
        }
        self.examples = int(self.batches.sizes.sum())

    def apply(self) -> Any:
        """W Σ for every weight, in the dtype of the leaf."""
        total = jax.device_get(_gradients(self._static, self.params, self.data)).value()
        means = {path: x / self.examples for path, x in total.items()}
        return map_leaves(lambda path, x: jnp.asarray(means.get(path, x), jnp.result_type(x)), self.params)

    def distances(self, weighted: Any, trees: Sequence[Any]) -> tuple[float, ...]:
        """‖A − B‖_Σ for each tree B."""
        norms = jax.device_get(_squares(self._static, self.params, tuple(trees), self.data)).value()
        own = inner_product(weighted, self.params, self.predicate)
        found = []
        for tree, norm in zip(trees, norms, strict=True):
            plain = [p for p, x in leaf_table(tree).items() if p not in self.leaves and self.predicate(p, x)]
            rest = sum(float(np.sum(np.square(leaf_table(tree)[p], dtype=np.float64))) for p in plain)
            square = own + norm / self.examples + rest - 2 * inner_product(weighted, tree, self.predicate)
            found.append(math.sqrt(max(square, 0.0)))
        return tuple(found)

    @property
    def _static(self) -> "_Key":
        return _Key(self.spec, self.function, self.batches, self.leaves)


class _Key(NamedTuple):
    """What a compiled pass depends on beside shapes."""

    spec: PermutationSpec
    function: Static
    batches: Batches
    leaves: tuple[str, ...]


def _layers(key: _Key, params: Any, batch: Any) -> tuple[Any, list[Layer]]:
    program = trace_program(key.spec, key.function.function, params, batch)
    layers = [x for x in find_layers(program) if x.leaf in key.leaves and not x.in_while]
    return program.closed, layers


def _activations(key: _Key, params: Any, batch: Any) -> dict[Any, jax.Array]:
    """What enters each layer."""
    closed, layers = _layers(key, params, batch)
    data = {layer.address: layer.data for layer in layers}

    def hand_out(address: Any, eqn: Any, operands: Sequence[Any], extra: Any) -> tuple[Any, Any]:
        return bind(eqn, operands), operands[data[address]]

    inputs = [jnp.asarray(x) for x in jax.tree.leaves((params, batch))]
    return evaluate(closed, inputs, hand_out, dict.fromkeys(data))[1]


def _energy(key: _Key, params: Any, batch: Any, entering: Mapping[Any, jax.Array]) -> jax.Array:
    """½ ‖W x‖² summed over all layers, examples and outputs, a mean over positions, x being given."""
    closed, layers = _layers(key, params, batch)
    by_address = {layer.address: layer for layer in layers}

    def energy(address: Any, eqn: Any, operands: Sequence[Any], x: jax.Array) -> tuple[Any, Any]:
        layer = by_address[address]
        operands = [*operands[: layer.data], x, *operands[layer.data + 1 :]]
        (y,) = bind(eqn, operands)
        dtype = jnp.promote_types(y.dtype, jnp.float32)
        outputs = _outputs(eqn, jnp.shape(operands[layer.weight]))
        scale = jax.tree.leaves(batch)[0].shape[0] * outputs / (y.size * layer.repeats)
        # Nothing but the layer itself is to be differentiated.
        return [lax.stop_gradient(y)], 0.5 * scale * jnp.sum(jnp.square(y.astype(dtype)))

    inputs = [jnp.asarray(x) for x in jax.tree.leaves((params, batch))]
    _, energies = evaluate(closed, inputs, energy, entering)
    return sum((jnp.sum(x) for x in energies.values()), jnp.zeros(()))


def _outputs(eqn: Any, weight: tuple[int, ...]) -> int:
    """The number of outputs of a layer at each position."""
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return weight[eqn.params["dimension_numbers"].rhs_spec[0]]
    if name == "dot_general":
        (x, y), _ = eqn.params["dimension_numbers"]
        contracted = math.prod(eqn.invars[0].aval.shape[i] for i in x) if x else 1
        return math.prod(weight) // max(contracted, 1)
    return weight[-1]  # channels last, as in a convolution with a derivative of its own


@functools.partial(jax.jit, static_argnums=0)
def _gradients(key: _Key, params: Any, data: Any) -> Any:
    """Sum over the examples of W Σ, for each leaf of `key`."""

    def of_batch(batch: Any) -> Any:
        entering = _activations(key, params, batch)

        def energy(weights: Mapping[str, jax.Array]) -> jax.Array:
            tree = map_leaves(lambda path, x: weights.get(path, x), params)
            return _energy(key, tree, batch, entering)

        table = leaf_table(params)
        return jax.grad(energy)({path: jnp.asarray(table[path]) for path in key.leaves})

    return sum_batches(of_batch, data, key.batches)


@functools.partial(jax.jit, static_argnums=0)
def _squares(key: _Key, params: Any, trees: tuple[Any, ...], data: Any) -> Any:
    """Sum over the examples of ‖W x‖² for each tree, on the activations of `params`."""

    def of_batch(batch: Any) -> Any:
        entering = _activations(key, params, batch)
        return tuple(2 * _energy(key, tree, batch, entering) for tree in trees)

    return sum_batches(of_batch, data, key.batches)


def inner_product(a: Any, b: Any, predicate: LeafPredicate) -> float:
    """⟨A, B⟩ over the leaves that count, in float64."""
    a, b = leaf_table(a), leaf_table(b)
    return sum(float(np.sum(np.multiply(a[p], b[p], dtype=np.float64))) for p in a if predicate(p, a[p]))


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
    max_iterations: int = 100,
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
      max_iterations: limit on sweeps of an ascent.
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
            max_iterations=max_iterations,
            restarts=0,
            predicate=predicate,
        )
    moved = _permute(spec, match.permutation, params_b)
    stats["distance"] = metric.distances(weighted, [params_b, moved])
    stats["weighted"] = metric.leaves
    stats["seconds"] = time.perf_counter() - began
    return MatchResult(match.permutation, match.objective, match.num_iterations, match.converged, stats)


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
