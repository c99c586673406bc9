"""The metric of the activations that enter each layer of a network, applied to its weights.

*The trick.* ⟨W_A, P[W_B]⟩_Σ = ⟨W_A Σ, P[W_B]⟩. So covariance matching is weight matching of B to a tree in
which every weight of A's layers is replaced by W_A Σ; and W_A Σ is the gradient of ½ E‖W x‖² at W_A, with x
held fixed. Gradients exist for every contraction, hence no Σ is ever formed: memory is that of one more
tree, and for a convolution Σ is the second moment of whole *patches*, as strides and padding cut them. (The
second moment of channels alone would be cheaper to store but forgets how the offsets of a kernel go
together, and with a gradient there is nothing to store.) The mean is over examples and positions.

A bias sees a constant 1, and the scale of a norm inputs of mean square 1, so their metric is the plain one
(each leaf counts by itself: products of weights with biases are left out), and so is that of everything else
that enters no layer by itself: looked-up embeddings, weights computed from others (weight norm), and layers
inside ``while`` loops, through which there is no gradient.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluation import bind, evaluate
from rebasin.tracing.program import Static, trace_program
from rebasin.tracing.sites import Layer, find_layers
from rebasin.tracing.streaming import Batches, batch_shapes, check_examples, sum_batches
from rebasin.trees import LeafPredicate, check_finite, is_weight, leaf_table, map_leaves

__all__ = ["Metric", "apply_metric", "inner_product"]


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
        check_examples(data, batch_size)
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
