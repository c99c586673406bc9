"""Evaluates the integers of a program that are the same in every call, such as the indices of ``x.at[2:4]``.

Indices that the user writes as numbers reach a gather or a scatter through a chain of small equations: a
negative index is moved up by the size of its axis, a range becomes a count. Such a chain is evaluated with
NumPy, so that the rules of gathers and scatters see which positions are meant (`Value.static`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rebasin.inference.values import Value

__all__ = ["evaluate_static", "static_constant"]

# Larger arrays are not evaluated: masks of a long sequence would cost more than all rules together.
_MAX_SIZE = 2**14

# Computes entries from the parameters, the shape of the result and the operands.
_Evaluate = Callable[[Mapping[str, Any], tuple[int, ...], Sequence[np.ndarray]], np.ndarray]


def static_constant(array: np.ndarray) -> np.ndarray | None:
    """Return a small constant of integers or booleans, `None` for any other constant."""
    return array if array.dtype.kind in "iub" and array.size <= _MAX_SIZE else None


def evaluate_static(
    primitive: str, params: Mapping[str, Any], operands: Sequence[Value], aval: Any
) -> np.ndarray | None:
    """Evaluate an equation whose operands are all static.

    Args:
      primitive: name of the primitive.
      params: parameters of the primitive.
      operands: the operands.
      aval: shape and dtype of the result.

    Returns:
      The entries of the result; `None` if they depend on more than constants, or are no small array of
      integers or booleans, or if the primitive is none that computes indices.
    """
    evaluate = _EVALUATE.get(primitive)
    if evaluate is None:
        return None
    arrays = [operand.static for operand in operands if operand.static is not None]
    if len(arrays) < len(operands) or aval.dtype.kind not in "iub" or math.prod(aval.shape) > _MAX_SIZE:
        return None
    with np.errstate(all="ignore"):  # integers wrap around here as they do in XLA
        return np.asarray(evaluate(params, aval.shape, arrays)).astype(aval.dtype)


def _pointwise(function: Callable[..., Any]) -> _Evaluate:
    return lambda params, shape, arrays: function(*arrays)


def _broadcast_in_dim(params: Mapping[str, Any], shape: Any, arrays: Any) -> np.ndarray:
    expanded = [1] * len(shape)
    for d, size in zip(params["broadcast_dimensions"], arrays[0].shape, strict=True):
        expanded[d] = size
    return np.broadcast_to(arrays[0].reshape(expanded), shape)


def _iota(params: Mapping[str, Any], shape: Any, arrays: Any) -> np.ndarray:
    along = [1] * len(shape)
    along[params["dimension"]] = -1
    return np.broadcast_to(np.arange(shape[params["dimension"]]).reshape(along), shape)


def _slice(params: Mapping[str, Any], shape: Any, arrays: Any) -> np.ndarray:
    strides = params["strides"] or (1,) * len(shape)
    ranges = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return arrays[0][tuple(slice(*numbers) for numbers in ranges)]


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.choose(which.astype(int), cases)


_EVALUATE: dict[str, _Evaluate] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "iota": _iota,
    "slice": _slice,
    "reshape": lambda params, shape, arrays: arrays[0].reshape(shape),
    "squeeze": lambda params, shape, arrays: arrays[0].reshape(shape),
    "expand_dims": lambda params, shape, arrays: arrays[0].reshape(shape),
    "transpose": lambda params, shape, arrays: arrays[0].transpose(params["permutation"]),
    "rev": lambda params, shape, arrays: np.flip(arrays[0], params["dimensions"]),
    "concatenate": lambda params, shape, arrays: np.concatenate(arrays, params["dimension"]),
    "select_n": _pointwise(_select),
    "clamp": _pointwise(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    "neg": _pointwise(np.negative),
    "not": _pointwise(np.invert),
    "add": _pointwise(np.add),
    "sub": _pointwise(np.subtract),
    "mul": _pointwise(np.multiply),
    "max": _pointwise(np.maximum),
    "min": _pointwise(np.minimum),
    "and": _pointwise(np.bitwise_and),
    "or": _pointwise(np.bitwise_or),
    "lt": _pointwise(np.less),
    "le": _pointwise(np.less_equal),
    "gt": _pointwise(np.greater),
    "ge": _pointwise(np.greater_equal),
    "eq": _pointwise(np.equal),
    "ne": _pointwise(np.not_equal),
    "convert_element_type": _pointwise(lambda x: x),
    "copy": _pointwise(lambda x: x),
    "stop_gradient": _pointwise(lambda x: x),
}
