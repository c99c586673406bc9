"""REPAIR: bring the statistics of interpolated networks between those of the two endpoints.

Between two networks the variance of activations collapses: where units of A and B are not quite alike, their
average varies less than either (arXiv 2211.08403). REPAIR gives every channel of the network at α a mean and
a standard deviation that lie between those of the endpoints,

    E[Y] ← α E[Y_A] + (1−α) E[Y_B],    std[Y] ← α std[Y_A] + (1−α) std[Y_B].

*Where.* Y is the output of a layer that leads to units that can be permuted. A layer is a matrix product or a
convolution of the data with a weight, together with whatever follows that only scales and shifts its
channels, such as a bias. A channel is one output of the weight. Its statistics are taken over examples and
positions, and separately for each step of a scan. Layers whose outputs are pinned, such as the logits, and
layers in ``while`` loops are left as they are.

*BatchNorm* in evaluation only scales and shifts channels, so Y is the output of BatchNorm, as in the authors'
code. Its mean and standard deviation at the endpoints, β and |γ|, are brought between each other, and the
running statistics of an interpolated network cancel. New running statistics in place of REPAIR have much the
same effect and cost less; but they leave layers without BatchNorm alone, and they change the endpoints. See
`rebasin.batchnorm`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rebasin.batches import Batches, batch_shapes, check_data, inputs_of, map_batches
from rebasin.errors import InferenceError
from rebasin.inference.programs import bind
from rebasin.matching.method import check_networks
from rebasin.roles import RoleNames, leaf_roles
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import evaluate
from rebasin.tracing.program import Address, Program, Static, trace_program
from rebasin.tracing.sites import Layer, find_layers
from rebasin.trees import check_finite, leaf_table

__all__ = ["Correction", "Repair", "build_repair"]

# For each layer the scale and the shift of its channels, in the order of the program.
Correction: TypeAlias = tuple[tuple[jax.Array, jax.Array], ...]

# A channel whose deviation is below this share of its mean is constant, and only shifted.
_CONSTANT = 1e-6


class _Moments(NamedTuple):
    """Mean and variance of each channel, of one batch or stacked over batches."""

    mean: jax.Array
    variance: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Repair:
    """What `build_repair` returns: it finds corrections, and runs a network with one.

    Attributes:
      spec: the symmetries of the networks.
      apply_fn: the function of the networks.
      batches: how the data fall into batches.
      inputs: the inputs of the data.
      ends: moments of each layer in each batch, for A and for B.
      layers: the name of each layer that is corrected: the path name of its weight, or its number if the
        weight is computed from several leaves.
    """

    spec: PermutationSpec
    apply_fn: Static
    batches: Batches
    inputs: tuple[Any, ...]
    ends: tuple[Any, Any]
    layers: tuple[str, ...]

    @property
    def prepare(self) -> Callable[[Any, Any], Correction]:
        """``prepare(params, alpha) -> correction`` for the network at `alpha` between the endpoints.

        It takes the interpolated tree and the weight of A, and returns the scale and the shift of the
        channels of each layer. It is the ``prepare`` that `build_sweep` takes, and runs under ``jit``. As a
        `jax.tree_util.Partial` that holds the data it can be an argument of a function under ``jit``; a
        function that closes over it is compiled with a copy of the data inside.
        """
        return Partial(self._prepare, self.inputs, self.ends)

    def _prepare(self, inputs: Any, ends: Any, params: Any, alpha: Any) -> Correction:
        # Each batch gets targets of its own for the layers before, so that nothing changes at the endpoints.
        targets = [_between(a, b, alpha) for a, b in zip(*ends, strict=True)]
        measured = _measure(self.spec, self.apply_fn, self.batches, params, targets, inputs)
        pooled = (
            [_pool(moments, self.batches) for moments in of_network] for of_network in (measured, *ends)
        )
        return tuple(_correction(own, _between(a, b, alpha)) for own, a, b in zip(*pooled, strict=True))

    def variance_ratios(self, params: Any, alpha: Any) -> tuple[float, ...]:
        """Measure how much of the variance of each layer is left at a point of the path, without REPAIR.

        Args:
          params: the network at `alpha` between the endpoints.
          alpha: the weight of A.

        Returns:
          For each of `layers` the variance over the data, summed over its channels, divided by the same sum
          for the deviations that REPAIR would give them. It is 1 where nothing has collapsed (arXiv
          2211.08403, section 3), and NaN for a layer whose channels are all constant at both endpoints.
        """
        measure = jax.jit(_measure, static_argnums=(0, 1, 2))
        measured = measure(self.spec, self.apply_fn, self.batches, params, None, self.inputs)
        ratios = []
        for own, a, b in zip(measured, *self.ends, strict=True):
            wanted = _between(_pool(a, self.batches), _pool(b, self.batches), alpha)
            left = np.sum(np.asarray(_pool(own, self.batches).variance, np.float64))
            total = np.sum(np.asarray(wanted.variance, np.float64))
            ratios.append(float(left / total) if total > 0 else float("nan"))
        return tuple(ratios)

    def apply(self, params: Any, *inputs_and_correction: Any) -> Any:
        """Evaluate the network with every layer corrected: ``apply(params, *inputs, correction)``.

        Args:
          params: the tree of the network.
          *inputs_and_correction: the inputs of a batch, of any number of examples, and last what `prepare`
            returned for `params`.

        Returns:
          The outputs of the function.

        Raises:
          InferenceError: the last argument is no correction, or the function has other layers for such a
            batch than for those it was measured with.
        """
        *inputs, correction = inputs_and_correction or (None,)
        if not isinstance(correction, tuple):
            raise InferenceError(
                f"the last argument must be a correction from Repair.prepare, got {type(correction).__name__}"
            )
        program, layers = _trace(self.spec, self.apply_fn, params, inputs, precision=None)
        if len(correction) != len(layers):
            raise InferenceError(
                f"the correction is for {len(correction)} layers, but with this batch there are {len(layers)}"
            )
        by_end = {layer.end: layer for layer in layers}

        def correct(address: Address, eqn: Any, operands: Sequence[Any], extra: Any) -> tuple[Any, None]:
            (y,) = bind(eqn, operands)
            return [_scale_and_shift(by_end[address], y, *extra)], None

        extras = dict(zip(by_end, correction, strict=True))
        outputs, _ = evaluate(program.closed, _arguments(params, inputs), correct, extras)
        return jax.tree.unflatten(program.outputs, outputs)


def build_repair(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    apply_fn: Callable[..., Any],
    data: Any,
    *,
    batch_size: int = 1000,
    roles: RoleNames = None,
) -> Repair:
    """Prepare REPAIR for the path between two networks that are aligned already.

    Layers are corrected in their order, each measured with those before it corrected. With a single batch the
    correction is exact. With several batches, the layers before are corrected by the statistics of each batch
    while the next is measured, as the authors' code does; the correction that is returned has the statistics
    of all batches together. At the endpoints of the path nothing changes, up to rounding.

    Args:
      spec: the symmetries of the networks.
      params_a: tree of A.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      apply_fn: ``(params, *inputs) -> outputs``, the function that `spec` was made for.
      data: a `rebasin.Batch`, whose labels are ignored, or its inputs alone, arrays ``[n, …]`` with one
        common n; the statistics are taken on them.
      batch_size: number of examples that are evaluated at once.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find. Every leaf that is evaluated must
        be finite, but for constants, such as masks whose entries are −inf.

    Returns:
      The repair. ``build_sweep(classification_metrics(repair.apply), prepare=repair.prepare)`` measures the
      path with REPAIR at every α, since ``repair.apply(params, *inputs, correction)`` stands for `apply_fn`.
      ``repair.layers`` names the layers that are corrected.

    Raises:
      ConfigError: a batch would be empty.
      DataError: the data are empty, or of different lengths.
      InferenceError: the function cannot be traced with such a batch, or allows less than `spec`.
      NonFiniteError: a leaf or an input is NaN or infinite.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": jnp.array([[1.0, 0.0]]), "v": jnp.ones((2, 1))}
      >>> b = {"w": jnp.array([[-1.0, 2.0]]), "v": jnp.ones((2, 1))}
      >>> network = lambda params, x: x @ params["w"] @ params["v"]
      >>> x = jnp.array([[1.0], [-1.0], [2.0], [-2.0]])
      >>> repair = build_repair(spec, a, b, network, x)
      >>> middle = {"w": jnp.array([[0.5, 1.0]]), "v": jnp.ones((2, 1))}
      >>> (scale, shift), = repair.prepare(middle, 0.5)  # deviations of 1 and 1 between A's 1, 0 and B's 1, 2
      >>> scale.tolist(), shift.tolist()
      ([2.0, 1.0], [0.0, 0.0])
    """
    # Running statistics are part of what is evaluated, so they have to be finite too.
    networks = {"params_a": params_a, "params_b": params_b}
    params_a, params_b = check_networks(spec, networks, roles, by_weights=False).trees
    constants = {path for path, role in leaf_roles(params_a, roles).items() if role == "constant"}
    for name, tree in zip(networks, (params_a, params_b), strict=True):
        check_finite(tree, name, leaves=leaf_table(tree).keys() - constants)
    check_data(data, batch_size)
    inputs = jax.tree.map(jnp.asarray, inputs_of(data))
    check_finite(inputs, "data")
    batches, function = Batches.of(inputs, batch_size), Static(apply_fn)
    _, layers = _trace(spec, function, params_a, batch_shapes(inputs, batches.size))
    names = tuple(layer.leaf or f"layer {i}" for i, layer in enumerate(layers))
    measure = jax.jit(_measure, static_argnums=(0, 1, 2))
    end_a, end_b = (measure(spec, function, batches, params, None, inputs) for params in (params_a, params_b))
    return Repair(spec, function, batches, inputs, (end_a, end_b), names)


def _trace(
    spec: PermutationSpec,
    apply_fn: Static,
    params: Any,
    inputs: Sequence[Any],
    *,
    precision: str | None = "highest",
) -> tuple[Program, list[Layer]]:
    """Trace the network for such inputs; return its program and the layers that are corrected."""
    program = trace_program(spec, apply_fn.function, params, *inputs, precision=precision)
    return program, [layer for layer in find_layers(program) if layer.channels and not layer.in_while]


def _measure(
    spec: PermutationSpec,
    apply_fn: Static,
    batches: Batches,
    params: Any,
    targets: list[_Moments] | None,
    inputs: Any,
) -> list[_Moments]:
    """Measure the moments of each layer in each batch, with the layers before it brought to their targets."""

    def of_batch(batch: Any, targets: list[_Moments] | None) -> list[_Moments]:
        program, layers = _trace(spec, apply_fn, params, batch)
        by_end = {layer.end: layer for layer in layers}

        def measure(address: Address, eqn: Any, operands: Sequence[Any], target: Any) -> tuple[Any, _Moments]:
            (y,) = bind(eqn, operands)
            layer = by_end[address]
            own = _moments(layer, y)
            return [y if target is None else _scale_and_shift(layer, y, *_correction(own, target))], own

        extras = dict(zip(by_end, targets or [None] * len(layers), strict=True))
        _, found = evaluate(program.closed, _arguments(params, batch), measure, extras)
        return [found[layer.end] for layer in layers]

    return map_batches(of_batch, inputs, batches, extras=targets)


def _arguments(params: Any, inputs: Sequence[Any]) -> list[jax.Array]:
    """Return the arguments of a traced program: the leaves of the tree, then those of the inputs."""
    return [jnp.asarray(x) for x in jax.tree.leaves((params, inputs))]


def _moments(layer: Layer, y: jax.Array) -> _Moments:
    """Measure the moments of each channel of a layer's output, in float32 at least."""
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    axes = tuple(i for i in range(y.ndim) if i not in layer.channels)
    return _Moments(jnp.mean(y, axis=axes), jnp.var(y, axis=axes))


def _pool(moments: _Moments, batches: Batches) -> _Moments:
    """Pool moments over all batches: add the variance of the means to the mean of the variances."""
    weights = jnp.asarray(batches.sizes / batches.sizes.sum(), moments.variance.dtype)
    mean = jnp.tensordot(weights, moments.mean, 1, precision="highest")
    spread = moments.variance + jnp.square(jnp.abs(moments.mean - mean[None]))
    return _Moments(mean, jnp.tensordot(weights, spread, 1, precision="highest"))


def _between(a: _Moments, b: _Moments, alpha: Any) -> _Moments:
    """Return the moments whose mean and standard deviation lie between those of A and B."""
    weight = jnp.asarray(alpha, a.variance.dtype)
    deviation = weight * jnp.sqrt(a.variance) + (1 - weight) * jnp.sqrt(b.variance)
    return _Moments(weight * a.mean + (1 - weight) * b.mean, jnp.square(deviation))


def _correction(own: _Moments, target: _Moments) -> tuple[jax.Array, jax.Array]:
    """Return the scale and the shift that turn the moments `own` into `target`."""
    constant = jnp.sqrt(own.variance) <= _CONSTANT * jnp.abs(own.mean)
    ratio = jnp.sqrt(target.variance / jnp.where(constant, 1, own.variance))
    scale = jnp.where(constant, 1, ratio)
    return scale, target.mean - scale * own.mean


def _scale_and_shift(layer: Layer, y: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Scale and shift each channel of a layer's output."""
    shape = [n if i in layer.channels else 1 for i, n in enumerate(y.shape)]
    return (y * scale.reshape(shape) + shift.reshape(shape)).astype(y.dtype)
