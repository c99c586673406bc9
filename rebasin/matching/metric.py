"""The metric of the activations that enter each layer: weights in the metric of Σ, and distances in it.

Σ is the uncentred second moment of what enters a layer. It is never formed: W Σ is the gradient of ½ E‖W x‖²
with respect to W, with x fixed. So a convolution gets the exact metric of its patches.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rebasin.arithmetic import distance
from rebasin.batches import Batches, Sum, batch_shapes, check_data, inputs_of, sum_batches
from rebasin.inference.programs import bind
from rebasin.roles import RoleNames, weight_leaves
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import evaluate
from rebasin.tracing.program import Static, trace_program
from rebasin.tracing.sites import Layer, find_layers
from rebasin.trees import check_finite, leaf_table, map_leaves, real_parts

__all__ = ["Metric", "apply_metric", "checked_inputs", "distances", "find_metric", "sum_weighted", "weigh"]


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
      >>> import numpy as np
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> params = {"w": np.array([[1.0, 2.0]], np.float32), "v": np.ones((2, 1), np.float32)}
      >>> x = np.array([[2.0], [0.0]], np.float32)  # of second moment 2
      >>> apply_metric(spec, params, lambda params, x: x @ params["w"] @ params["v"], x)["w"].tolist()
      [[2.0, 4.0]]
    """
    inputs = checked_inputs(data, batch_size)
    weights = weight_leaves(params, roles)
    return weigh(find_metric(spec, params, apply_fn, inputs, batch_size, weights), params, inputs)


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


def checked_inputs(data: Any, batch_size: int) -> tuple[Any, ...]:
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


def weigh(metric: Metric, params: Any, inputs: tuple[Any, ...]) -> Any:
    """Replace every weight W of a layer by W Σ, in the dtype of the leaf."""
    total = jax.device_get(sum_weighted(metric, params, inputs)).value()
    products = {path: x / metric.batches.sizes.sum() for path, x in total.items()}

    def weighted(path: str, leaf: Any) -> Any:
        product = products.get(path, leaf)
        if path in products and jnp.iscomplexobj(leaf):
            product = product[..., 0] + 1j * product[..., 1]
        return jnp.asarray(product, jnp.result_type(leaf))

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


def distances(
    metric: Metric, params_a: Any, others: tuple[Any, ...], inputs: tuple[Any, ...], weights: Collection[str]
) -> tuple[float, ...]:
    """Return ‖A − B‖_Σ for each B of `others`; leaves without a Σ count with their Euclidean distance."""
    # Of the differences themselves: a difference of squares would lose the small distances that decide.
    squares = jax.device_get(_sum_squares(metric, params_a, _differences(metric, params_a, others), inputs))

    unweighted = frozenset(weights) - set(metric.leaves)
    plain = [distance(params_a, other, leaves=unweighted) for other in others]
    layers = [float(total) / metric.batches.sizes.sum() for total in squares.value()]
    return tuple(math.sqrt(mean + rest**2) for mean, rest in zip(layers, plain, strict=True))


def _differences(metric: Metric, params_a: Any, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return A − B for each B of `others` in the weights of layers; all other leaves are those of A."""
    tables = [leaf_table(other) for other in others]

    def difference(table: Mapping[str, Any]) -> Any:
        return map_leaves(lambda path, leaf: leaf - table[path] if path in metric.leaves else leaf, params_a)

    return tuple(map(difference, tables))
