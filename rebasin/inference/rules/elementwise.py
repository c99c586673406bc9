"""Primitives that act on each position by itself."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.registry import Dims, Equation, register_rule

# fmt: off
_UNARY = [
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt",
    "ceil", "clz", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "imag", "integer_pow", "is_finite", "lgamma",
    "log", "log1p", "logistic", "name", "neg", "not", "population_count", "real", "reduce_precision",
    "round", "rsqrt", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient",
    "tan", "tanh",
]

_MANY = [
    "add", "add_any", "and", "atan2", "clamp", "complex", "div", "eq", "eq_to", "ge", "gt", "igamma",
    "igamma_grad_a", "igammac", "le", "le_to", "lt", "lt_to", "max", "min", "mul", "mulhi", "ne", "nextafter",
    "or", "polygamma", "pow", "regularized_incomplete_beta", "rem", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sub", "xor", "zeta",
]
# fmt: on


@register_rule(*_UNARY, *_MANY)
def elementwise(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """``out[i] = f(x[i], y[i], …)``: all operands are permuted alike.

    Scalar operands (literals, the bounds of clamp, the predicate of select) go with every position, and so
    does an axis of size 1 that is repeated.
    """
    (shape,) = equation.shapes
    assert all(len(x) in (0, len(shape)) for x in inputs), f"{equation.where}: not elementwise"
    dims = []
    for axis, size in enumerate(shape):
        tied = [x[axis] for x in inputs if len(x) == len(shape) and x[axis].size == size]
        for node in tied[1:]:
            unite(tied[0], node, equation.because("operands with incompatible factors"))
        dims.append(tied[0] if tied else Node(size))
    return [tuple(dims)]


@register_rule("bitcast_convert_type")
def bitcast(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Bits are read as another type; a narrower or wider one adds or drops a last axis of parts, in order."""
    (shape,) = equation.shapes
    why = equation.because("the parts of a number")
    for node in x[len(shape) :]:
        pin(node, why)
    return [(*x[: len(shape)], *(pinned(size, why) for size in shape[len(x) :]))]


@register_rule("optimization_barrier", "device_put")
def identities(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Every output is the input at its place."""
    return inputs
