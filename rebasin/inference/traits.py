"""Follows whether numbers can tie: what is known of the entries of a value, for every value of the inputs.

`top_k`, `argmax` and their like choose the first of equal numbers, so an axis that they choose along may move
only if no two positions along it hold equal numbers. That has to hold for *every* input, at least for almost
all weights: a padded token is a row of zeros, and a mask multiplies by zero or adds a number so large that
everything else is rounded away.

So values have traits beside their tie-free axes, and inputs have none. The functions below say which traits
and axes a computation keeps. They rest on two assumptions: sums in which weights take part do not cancel
exactly, and what comes out of a layer is of ordinary size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rebasin.inference.values import CONSTANT, NO_TRAITS, WEIGHT, Number, Traits, Value

__all__ = ["combine", "contract", "is_wide_float", "moved", "of_array", "reduced"]

# Larger constants, as masks add them, would leave of a float32 number of ordinary size too little to differ.
_LARGEST = 1e3

# A factor that is smaller than this is taken to be zero, since a product with it may round to zero.
_SMALLEST = 1e-9

# fmt: off
# Functions under which different numbers of ordinary size stay different: no rounding, clipping or comparing.
_SMOOTH = frozenset([
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "copy", "copy_p", "cos", "cosh", "erf", "erfc",
    "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "name", "neg", "rsqrt",
    "sharding_constraint", "sin", "sinh", "sqrt", "square", "stop_gradient", "tan", "tanh",
])
_SUMS = frozenset(["add", "add_any", "sub"])
_PRODUCTS = frozenset(["mul", "div", "pow"])
_COMPARISONS = frozenset(["eq", "eq_to", "ge", "gt", "is_finite", "le", "le_to", "lt", "lt_to", "ne"])

# Functions whose values are bounded whatever their operand is, and functions that are nowhere zero.
_SATURATING = frozenset(["atan", "cos", "erf", "erfc", "logistic", "sign", "sin", "tanh"])
_NOWHERE_ZERO = frozenset(["cosh", "exp", "exp2", "logistic", "rsqrt"])
# fmt: on


def of_array(array: np.ndarray) -> Traits:
    """Return the traits of a constant."""
    if array.dtype == bool:
        array = array.astype(np.int8)
    if array.dtype.kind not in "iuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        return NO_TRAITS
    if not array.size or not (array.min() >= -_LARGEST and array.max() <= _LARGEST):  # NaN is refused too
        return NO_TRAITS
    return CONSTANT if (abs(array) >= _SMALLEST).all() else CONSTANT - {"nonzero"}


def is_wide_float(dtype: Any) -> bool:
    """Tell whether a dtype has so many digits that different numbers hardly ever round to the same."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32


def moved(eqn: Any, operands: Sequence[Value], dtype: Any) -> Traits:
    """Return the traits of a result of an equation that only moves the entries of operands of one dtype."""
    known = [x.traits for atom, x in zip(eqn.invars, operands, strict=True) if atom.aval.dtype == dtype]
    traits = frozenset.intersection(*known) if known else NO_TRAITS
    # What a gather returns out of bounds is usually zero where it is not NaN.
    return traits if eqn.params.get("fill_value") is None else traits - {"nonzero"}


def combine(primitive: str, params: Mapping[str, Any], inputs: Sequence[Value]) -> tuple[Traits, list[int]]:
    """Find what an elementwise primitive keeps.

    Args:
      primitive: name of the primitive.
      params: its parameters.
      inputs: its operands.

    Returns:
      The traits of the result, and the numbers of its tie-free axes.
    """
    known = [x.traits for x in inputs]
    every = frozenset.intersection(*known)
    weighted = {"weighted"} if any("weighted" in traits for traits in known) else set()
    if primitive == "convert_element_type":
        return _converted(params["new_dtype"], inputs[0])
    if primitive in _COMPARISONS:
        return frozenset({"bounded"}), []
    if primitive in _SMOOTH:
        (x,) = inputs
        return _function(primitive, x.traits), _axes(inputs, lambda i: x.is_tie_free(i))
    if primitive in _SUMS:
        traits: Traits = (every - {"nonzero"}) | weighted
        # Only a weight that nothing rounded keeps a sum from being zero.
        if "smooth" in every and any(traits >= WEIGHT for traits in known):
            traits |= {"nonzero"}
        return traits, _axes(inputs, lambda i: _sum_is_tie_free(inputs, i))
    if primitive in _PRODUCTS:
        return every | weighted, _axes(inputs, lambda i: _product_is_tie_free(primitive, inputs, i))
    return _clipped(primitive, inputs) | weighted, []


def _converted(dtype: Any, x: Value) -> tuple[Traits, list[int]]:
    """Keep everything in a wide floating type; rounding to fewer digits, or to integers, makes ties."""
    if not is_wide_float(dtype):
        is_float = jnp.issubdtype(dtype, jnp.floating)
        return x.traits - ({"smooth"} if is_float else {"smooth", "nonzero"}), []
    return x.traits, _axes([x], x.is_tie_free)


def _function(primitive: str, traits: Traits) -> Traits:
    """Return the traits of a smooth function of one operand."""
    if primitive == "log" and "nonzero" not in traits:
        return traits - {"bounded", "smooth"}  # log 0 is infinite, as masks have it
    if primitive in _SATURATING:
        traits |= {"bounded"}
    return traits | {"nonzero"} if primitive in _NOWHERE_ZERO and "bounded" in traits else traits


def _clipped(primitive: str, inputs: Sequence[Value]) -> Traits:
    """Return the traits of a rounded, clipped, compared or selected number: at most its size is known."""
    if primitive in _SATURATING:
        return frozenset({"bounded"})
    operands = inputs[1:] if primitive == "select_n" else inputs
    if primitive in ("max", "min", "clamp"):
        operands = [x for x in inputs if not _is_idle_bound(primitive, x)]
    return frozenset({"bounded"}) if all("bounded" in x.traits for x in operands) else NO_TRAITS


def _is_idle_bound(primitive: str, x: Value) -> bool:
    """Tell whether an operand of max or min is the infinite number that changes nothing."""
    idle = {"max": -np.inf, "min": np.inf}
    return isinstance(x.abstract, Number) and x.abstract.value == idle.get(primitive)


def _axes(inputs: Sequence[Value], test: Callable[[int], bool]) -> list[int]:
    if not any(x.tie_free for x in inputs):
        return []
    return [i for i in range(max(map(len, inputs))) if test(i)]


def _apart(inputs: Sequence[Value], axis: int) -> tuple[list[Value], list[Value]]:
    """Tell operands that vary along an axis from those that are the same at all of its positions."""
    size = max(x[axis].size for x in inputs if x)
    varying, same = [], []
    for x in inputs:
        is_same = not x or x[axis].size != size or x.is_constant(axis)
        (same if is_same else varying).append(x)
    return varying, same


def _sum_is_tie_free(inputs: Sequence[Value], axis: int) -> bool:
    """Tell whether a sum is tie-free: one tie-free operand is enough, if no other can undo its differences.

    Another operand could be so large that the differences are rounded away, or could round a number in two
    steps: ``x + (round(x) − x)``. A smooth operand does neither.
    """
    varying, same = _apart(inputs, axis)
    free = [x.is_tie_free(axis) for x in varying]
    return (
        any(free)
        and all(
            is_free or {"bounded", "smooth"} <= x.traits for is_free, x in zip(free, varying, strict=True)
        )
        and all("bounded" in x.traits for x in same)
    )


def _product_is_tie_free(primitive: str, inputs: Sequence[Value], axis: int) -> bool:
    """Tell whether a product is tie-free: all operands that vary are, and no other can be zero."""
    varying, same = _apart(inputs, axis)
    base, exponent = inputs
    if primitive == "pow" and exponent in varying:
        return False
    # Division by zero is left out: its results are not finite whatever the order.
    harmless = {"bounded"} if primitive == "div" and base in varying else {"bounded", "nonzero"}
    return (
        bool(varying)
        and all(x.is_tie_free(axis) for x in varying)
        and all(harmless <= x.traits for x in same)
    )


def contract(
    x: Value, y: Value, contract_x: Sequence[int], contract_y: Sequence[int]
) -> tuple[Traits, bool, bool]:
    """Find what a sum of products ``Σₖ x[…, k] y[k, …]`` keeps.

    Args:
      x: the first operand.
      y: the second operand.
      contract_x: axes of x that are summed over.
      contract_y: axes of y that are summed over.

    Returns:
      The traits of the result, whether tie-free axes of x stay tie-free, and whether those of y do. They do
      unless the other operand may be zero along the contracted axes, as a padded token is.
    """
    smooth = any({"smooth", "weighted"} <= v.traits for v in (x, y))
    traits = {"bounded", "smooth", "weighted"} if smooth else set(x.traits & y.traits) - {"nonzero"}
    x_counts, y_counts = _is_never_all_zero(x, contract_x), _is_never_all_zero(y, contract_y)
    if smooth and x_counts and y_counts:
        traits.add("nonzero")
    return frozenset(traits), y_counts, x_counts


def _is_never_all_zero(x: Value, axes: Sequence[int]) -> bool:
    """Tell whether some entry along the axes is not zero; numbers that differ are not all zero."""
    return "nonzero" in x.traits or any(x[i].size > 1 and x.is_tie_free(i) for i in axes)


def reduced(primitive: str, traits: Traits) -> Traits:
    """Return the traits of a reduction; the largest of numbers may be the same one at two places."""
    return traits if primitive in ("reduce_sum", "reduce_prod") else traits - {"smooth"}
