"""What a layer is, and how far its output stays what it is but for a scale and a shift of each channel."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core

from rebasin.tracing.program import Address, Axes

__all__ = ["Layer", "Tails"]

_AFFINE = frozenset({"add", "sub", "mul", "div", "neg"})


class Layer(NamedTuple):
    """A contraction of data with a weight.

    Attributes:
      address: its equation.
      end: the last equation through which its output is only scaled and shifted, channel by channel, as by a
        bias and by BatchNorm in evaluation; its own, if there is none.
      data: which operand is the data.
      weight: which operand is the weight.
      leaf: path name of the leaf that the weight is, moved or not; `None` for a weight that is computed.
      axes: axes of the result, without those that scans stack it along.
      channels: which of them come from the weight and carry a group.
      contracted: groups of the weight that the contraction sums over.
      repeats: how often the same weight is used, by the scans around.
      in_while: whether it lies in a ``while`` loop, through which there is no gradient.
    """

    address: Address
    end: Address
    data: int
    weight: int
    leaf: str | None
    axes: Axes
    channels: tuple[int, ...]
    contracted: frozenset[str]
    repeats: int
    in_while: bool


class Tails:
    """Follows the layers of one program: through the bias, and the evaluation of BatchNorm, to what is not.

    An equation belongs to a layer's tail if it is the only one that reads the value before it, and adds or
    multiplies nothing but what does not depend on the batch and is the same wherever only other axes than the
    channels' differ. So a residual sum, a nonlinearity, LayerNorm, and positions that are added end it.

    Args:
      jaxpr: the program, whose equations `follow` is to get one after the other.
    """

    def __init__(self, jaxpr: Any) -> None:
        read = [atom for eqn in jaxpr.eqns for atom in eqn.invars] + list(jaxpr.outvars)
        self._uses = collections.Counter(atom for atom in read if not isinstance(atom, core.Literal))
        self._defined_by = {variable: eqn for eqn in jaxpr.eqns for variable in eqn.outvars}
        self._layers: dict[Any, Layer] = {}

    def follow(self, eqn: Any, here: Address, data: Sequence[bool], layer: Layer | None) -> Layer | None:
        """The layer whose output an equation computes, or whose tail it belongs to, with its new end.

        Args:
          eqn: the equation.
          here: its address.
          data: which of its operands depend on the batch.
          layer: the layer that it is, if it is one.
        """
        if layer is None:
            layer = self._continued(eqn, data)
        if layer is not None:
            layer = layer._replace(end=here)
            self._layers[eqn.outvars[0]] = layer
        return layer

    def _continued(self, eqn: Any, data: Sequence[bool]) -> Layer | None:
        if eqn.primitive.name not in _AFFINE or sum(data) != 1:
            return None
        value = eqn.invars[data.index(True)]
        layer = self._layers.get(value)
        divides = eqn.primitive.name == "div" and data[-1]
        reshapes = eqn.outvars[0].aval.shape != value.aval.shape
        if layer is None or self._uses[value] > 1 or divides or reshapes:
            return None
        others = [atom for atom, moves in zip(eqn.invars, data, strict=True) if not moves]
        return layer if all(self._differs_by(layer.channels, atom) for atom in others) else None

    def _differs_by(self, channels: Sequence[int], atom: Any) -> bool:
        """Whether a value is the same at all positions of every axis but these."""
        if all(n == 1 for i, n in enumerate(atom.aval.shape) if i not in channels):
            return True
        eqn = None if isinstance(atom, core.Literal) else self._defined_by.get(atom)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim":
            return False
        kept = zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True)
        return all(n == 1 or axis in channels for axis, n in kept)
