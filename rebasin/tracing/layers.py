"""Layers and their affine epilogues, the operations behind a layer that only scale and shift its channels."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core

from rebasin.tracing.program import Address, Axes

__all__ = ["AffineEpilogues", "Layer"]

_AFFINE = frozenset({"add", "sub", "mul", "div", "neg"})


class Layer(NamedTuple):
    """A contraction of data with a weight, and the affine epilogue behind it.

    The affine epilogue consists of the equations right behind the contraction that only scale and shift its
    output channel by channel: a bias, BatchNorm in evaluation. It may be empty.

    Attributes:
      address: address of the contraction.
      end: address of the last equation of the affine epilogue; `address` if the epilogue is empty.
      data: number of the operand that is the data.
      weight: number of the operand that is the weight.
      leaf: path name of the leaf that the weight is, possibly moved; `None` for a weight that is computed.
      axes: axes of the result, without those along which scans stack it.
      channels: numbers of the axes of the result that come from the weight and carry a group.
      contracted: groups of the weight that the contraction sums over.
      repeats: number of times that the same weight is used, by the scans around.
      in_while: whether the layer lies in a ``while`` loop, through which there is no gradient.
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


class AffineEpilogues:
    """Finds the affine epilogues of the layers of one program.

    An equation belongs to the affine epilogue of a layer under two conditions: it is the only one that reads
    the value before it, and what it adds or multiplies does not depend on the inputs and varies along no axes
    but those of channels. So an epilogue ends at a residual sum, a nonlinearity, a LayerNorm, or the addition
    of positions.

    Args:
      jaxpr: the program, whose equations `follow` is to get one after the other.
    """

    def __init__(self, jaxpr: Any) -> None:
        read = [atom for eqn in jaxpr.eqns for atom in eqn.invars] + list(jaxpr.outvars)
        self._uses = collections.Counter(atom for atom in read if not isinstance(atom, core.Literal))
        self._defined_by = {variable: eqn for eqn in jaxpr.eqns for variable in eqn.outvars}
        self._layers: dict[Any, Layer] = {}

    def follow(self, eqn: Any, here: Address, data: Sequence[bool], layer: Layer | None) -> Layer | None:
        """Find the layer that an equation computes, or to whose affine epilogue it belongs.

        Args:
          eqn: the equation.
          here: address of the equation.
          data: for each operand, whether it depends on the inputs of the network.
          layer: the layer that the equation computes, if it computes one.

        Returns:
          The layer with this equation as its end; `None` if the equation belongs to no layer.
        """
        if layer is None:
            layer = self._extended(eqn, data)
        if layer is not None:
            layer = layer._replace(end=here)
            self._layers[eqn.outvars[0]] = layer
        return layer

    def _extended(self, eqn: Any, data: Sequence[bool]) -> Layer | None:
        """Return the layer whose affine epilogue goes on with an equation, if there is one."""
        if eqn.primitive.name not in _AFFINE or sum(data) != 1:
            return None
        value = eqn.invars[data.index(True)]
        layer = self._layers.get(value)
        divides = eqn.primitive.name == "div" and data[-1]
        reshapes = eqn.outvars[0].aval.shape != value.aval.shape
        if layer is None or self._uses[value] > 1 or divides or reshapes:
            return None
        others = [atom for atom, moves in zip(eqn.invars, data, strict=True) if not moves]
        return layer if all(self._varies_only_along(layer.channels, atom) for atom in others) else None

    def _varies_only_along(self, channels: Sequence[int], atom: Any) -> bool:
        """Tell whether a value is the same at all positions of every axis but the channels."""
        if all(n == 1 for i, n in enumerate(atom.aval.shape) if i not in channels):
            return True
        eqn = None if isinstance(atom, core.Literal) else self._defined_by.get(atom)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim":
            return False
        kept = zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True)
        return all(n == 1 or axis in channels for axis, n in kept)
