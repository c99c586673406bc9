"""Primitives that act on each position by itself."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, unite
from rebasin.inference.registry import Dims, Equation, register_rule

# fmt: off
_UNARY = [
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "clz", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "imag", "integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic",
    "name", "neg", "not", "population_count", "real", "reduce_precision", "round", "rsqrt",
    "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
]

_MANY = [
    "add", "add_any", "and", "atan2", "clamp", "complex", "div", "eq", "ge", "gt", "igamma", "igammac",
    "le", "lt", "max", "min", "mul", "ne", "nextafter", "or", "pow", "rem", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sub", "xor",
]
# fmt: on


@register_rule(*_UNARY, *_MANY)
def elementwise(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """``out[i] = f(x[i], y[i], …)``: all operands are permuted alike.

    Scalar operands (literals, the bounds of clamp, the predicate of select) go with every position, and so
    does an axis of size 1 that is repeated.
    """
    (shape,) = equation.shapes
    dims = []
    for axis, size in enumerate(shape):
        tied = [x[axis] for x in inputs if len(x) == len(shape) and x[axis].size == size]
        for node in tied[1:]:
            unite(tied[0], node, equation.because("operands with incompatible factors"))
        dims.append(tied[0] if tied else Node(size))
    return [tuple(dims)]


@register_rule("optimization_barrier", "device_put")
def identities(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Every output is the input at its place."""
    return inputs
