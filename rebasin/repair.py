"""REPAIR: the statistics of interpolated networks brought between those of the endpoints.

Between two networks the variance of activations collapses: where units of A and B are not quite alike, their
average varies less than either (arXiv 2211.08403). REPAIR gives every channel of the network at α the mean
and the deviation that lie between those of the endpoints,

    E[Y] ← α E[Y_A] + (1−α) E[Y_B],    std[Y] ← α std[Y_A] + (1−α) std[Y_B].

*Where.* Y is the output of each layer that leads to units that can be permuted: of a matrix product or
convolution of the data with a weight, and of whatever follows that only scales and shifts its channels, such
as a bias. A channel is one output of that weight; its statistics are over examples and positions, for each
step of a scan by itself. Layers whose outputs are pinned, such as the logits, and layers in ``while`` loops
are left as they are.

*BatchNorm* in evaluation only scales and shifts channels, so that Y is what it puts out, as in the authors'
code: mean and deviation, β and |γ| at the ends, are brought between those of the ends, and the running
statistics that an interpolated network happens to have cancel. New ones in place of REPAIR are much the same
and cost less, but leave layers without BatchNorm alone, and move the ends: see `rebasin.batchnorm`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rebasin.batches import Batches, batch_shapes, check_data, map_batches
from rebasin.errors import InferenceError
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import bind, evaluate
from rebasin.tracing.program import Address, Program, Static, trace_program
from rebasin.tracing.sites import Layer, find_layers
from rebasin.trees import check_finite, check_same_shapes

__all__ = ["Correction", "Repair", "build_repair"]

# For each layer the scale and the shift of its channels, in the order of the program.
Correction: TypeAlias = tuple[tuple[jax.Array, jax.Array], ...]

# A channel whose deviation is below this share of its mean is constant, and only shifted.
_CONSTANT = 1e-6


class _Moments(NamedTuple):
    """Mean and variance of each channel, of one batch or stacked over batches."""

    mean: jax.Array
    variance: jax.Array


class Repair:
    """What `build_repair` returns: how to find a correction, and how to run a network with one."""

    def __init__(
        self,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        function: Callable[[Any, Any], Any],
        data: Any,
        batch_size: int,
    ) -> None:
        check_same_shapes(params_a, params_b)
        for tree, name in ((params_a, "params_a"), (params_b, "params_b")):
            spec.group_sizes(tree, name=name)
            check_finite(tree, name)
        check_data(data, batch_size)
        self._data = jax.tree.map(jnp.asarray, data)
        check_finite(self._data, "data")
        self._spec, self._function = spec, Static(function)
        self._batches = Batches.of(data, batch_size)
        _, layers = self._trace(params_a, batch_shapes(data, self._batches.size))
        self.layers = tuple(layer.leaf or f"layer {i}" for i, layer in enumerate(layers))
        measure = jax.jit(self._measure)
        self._ends = tuple(measure(tree, None, self._data) for tree in (params_a, params_b))

    @property
    def prepare(self) -> Callable[[Any, Any], Correction]:
        """``prepare(params, alpha) -> correction``, of the network at `alpha` between the endpoints.

        It takes the interpolated tree and the weight of A, and returns scale and shift of each layer's
        channels. It fits `build_sweep`'s ``prepare`` and runs under ``jit``; as a `jax.tree_util.Partial`
        that holds the data it can be an argument of a function under ``jit``, while one that closes over it
        is compiled with a copy of the data inside.
        """
        return Partial(self._prepare, self._data, self._ends)

    def _prepare(self, data: Any, ends: Any, params: Any, alpha: Any) -> Correction:
        # On the way a batch is brought to targets of its own, so that nothing moves at the ends.
        targets = [_between(a, b, alpha) for a, b in zip(*ends, strict=True)]
        measured = self._measure(params, targets, data)
        corrections = []
        for here, a, b in zip(measured, *ends, strict=True):
            target = _between(self._pool(a), self._pool(b), alpha)
            corrections.append(_correction(self._pool(here), target))
        return tuple(corrections)

    def apply(self, params: Any, batch: Any, correction: Correction) -> Any:
        """The function's outputs with every layer corrected.

        Args:
          params: the tree.
          batch: a batch, of any number of examples.
          correction: what `prepare` returned for `params`.

        Returns:
          What the function returns.

        Raises:
          InferenceError: the function has other layers for such a batch than for those it was measured with.
        """
        program, layers = self._trace(params, batch, precision=None)
        if len(correction) != len(layers):
            raise InferenceError(
                f"the correction is for {len(correction)} layers, but with this batch there are {len(layers)}"
            )
        by_end = {layer.end: layer for layer in layers}

        def correct(address: Address, eqn: Any, operands: Sequence[Any], extra: Any) -> tuple[Any, None]:
            (y,) = bind(eqn, operands)
            return [_affine(by_end[address], y, *extra)], None

        extras = dict(zip(by_end, correction, strict=True))
        outputs, _ = evaluate(program.closed, _inputs(params, batch), correct, extras)
        return jax.tree.unflatten(program.outputs, outputs)

    def _trace(
        self, params: Any, batch: Any, precision: str | None = "highest"
    ) -> tuple[Program, list[Layer]]:
        """The program for such a batch, and the layers that are corrected."""
        program = trace_program(self._spec, self._function.function, params, batch, precision=precision)
        return program, [x for x in find_layers(program) if x.channels and not x.in_while]

    def _measure(self, params: Any, targets: list[_Moments] | None, data: Any) -> list[_Moments]:
        """Moments of each layer in each batch, with all earlier layers brought to their targets."""

        def of_batch(batch: Any, targets: list[_Moments] | None) -> list[_Moments]:
            program, layers = self._trace(params, batch)
            by_end = {layer.end: layer for layer in layers}

            def note(
                address: Address, eqn: Any, operands: Sequence[Any], target: Any
            ) -> tuple[Any, _Moments]:
                (y,) = bind(eqn, operands)
                layer = by_end[address]
                own = _moments(layer, y)
                return [y if target is None else _affine(layer, y, *_correction(own, target))], own

            extras = dict(zip(by_end, targets or [None] * len(layers), strict=True))
            _, found = evaluate(program.closed, _inputs(params, batch), note, extras)
            return [found[layer.end] for layer in layers]

        return map_batches(of_batch, data, self._batches, extras=targets)

    def _pool(self, moments: _Moments) -> _Moments:
        """Moments over all batches: the variance is the mean variance and the variance of the means."""
        weights = jnp.asarray(self._batches.sizes / self._batches.sizes.sum(), moments.mean.dtype)
        mean = jnp.tensordot(weights, moments.mean, 1, precision="highest")
        spread = moments.variance + jnp.square(moments.mean - mean[None])
        return _Moments(mean, jnp.tensordot(weights, spread, 1, precision="highest"))


def build_repair(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    function: Callable[[Any, Any], Any],
    data: Any,
    *,
    batch_size: int = 1000,
) -> Repair:
    """Prepares REPAIR for the segment between two networks, aligned already.

    Layers are corrected in their order, each measured with those before it corrected. With more than one
    batch the earlier ones are corrected by the statistics of the batch on the way, as the authors' code does,
    and the correction that is returned has those of all batches together; with a single batch it is exact. At
    the ends of the segment nothing changes, up to rounding.

    Args:
      spec: the symmetries.
      params_a: tree of A.
      params_b: tree of B.
      function: ``(tree, batch) -> outputs``.
      data: tree of arrays ``[n, …]`` with one common n, on which statistics are taken.
      batch_size: examples evaluated at once.

    Returns:
      The repair: ``build_sweep(metrics_fn, prepare=repair.prepare)`` with a `metrics_fn` that calls
      ``repair.apply(params, inputs, correction)`` in place of the function. ``repair.layers`` names the
      weights of the layers that are corrected.

    Raises:
      ConfigError: an empty batch.
      DataError: the data are empty, or of different lengths.
      InferenceError: the function cannot be traced with such a batch, or allows less than `spec`.
      NonFiniteError: a leaf or an input is NaN or infinite.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": jnp.array([[1.0, 0.0]]), "v": jnp.ones((2, 1))}
      >>> b = {"w": jnp.array([[-1.0, 2.0]]), "v": jnp.ones((2, 1))}
      >>> network = lambda tree, x: x @ tree["w"] @ tree["v"]
      >>> x = jnp.array([[1.0], [-1.0], [2.0], [-2.0]])
      >>> repair = build_repair(spec, a, b, network, x)
      >>> middle = {"w": jnp.array([[0.5, 1.0]]), "v": jnp.ones((2, 1))}
      >>> (scale, shift), = repair.prepare(middle, 0.5)  # deviations of 1 and 1 between A's 1, 0 and B's 1, 2
      >>> scale.tolist(), shift.tolist()
      ([2.0, 1.0], [0.0, 0.0])
    """
    return Repair(spec, params_a, params_b, function, data, batch_size)


def _inputs(params: Any, batch: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves((params, batch))]


def _moments(layer: Layer, y: jax.Array) -> _Moments:
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    axes = tuple(i for i in range(y.ndim) if i not in layer.channels)
    return _Moments(jnp.mean(y, axis=axes), jnp.var(y, axis=axes))


def _between(a: _Moments, b: _Moments, alpha: Any) -> _Moments:
    """The moments whose mean and deviation lie between those of A and B."""
    weight = jnp.asarray(alpha, a.mean.dtype)
    deviation = weight * jnp.sqrt(a.variance) + (1 - weight) * jnp.sqrt(b.variance)
    return _Moments(weight * a.mean + (1 - weight) * b.mean, jnp.square(deviation))


def _correction(own: _Moments, target: _Moments) -> tuple[jax.Array, jax.Array]:
    """Scale and shift that turn the one's mean and deviation into the other's."""
    constant = jnp.sqrt(own.variance) <= _CONSTANT * jnp.abs(own.mean)
    ratio = jnp.sqrt(target.variance / jnp.where(constant, 1, own.variance))
    scale = jnp.where(constant, 1, ratio)
    return scale, target.mean - scale * own.mean


def _affine(layer: Layer, y: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    shape = [n if i in layer.channels else 1 for i, n in enumerate(y.shape)]
    return (y * scale.reshape(shape) + shift.reshape(shape)).astype(y.dtype)
