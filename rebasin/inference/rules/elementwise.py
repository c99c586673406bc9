"""Primitives that act on each position by itself."""

from collections.abc import Sequence

import jax.numpy as jnp

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.rule import Equation, reads_abstract_values, register_rule
from rebasin.inference.traits import combine
from rebasin.inference.values import NEVER, AbstractValue, Dims, Never, Number, Positions, Value

# fmt: off
# Functions of one operand that hand its entries on, at most as another type.
_HANDED_ON = [
    "convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint",
    "stop_gradient",
]

_UNARY = [
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt",
    "ceil", "clz", "conj", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "imag", "integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic", "neg", "not",
    "population_count", "real", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
]

_MANY = [
    "add", "add_any", "and", "atan2", "clamp", "complex", "div", "eq", "eq_to", "ge", "gt", "igamma",
    "igamma_grad_a", "igammac", "le", "le_to", "lt", "lt_to", "max", "min", "mul", "mulhi", "ne", "nextafter",
    "or", "polygamma", "pow", "regularized_incomplete_beta", "rem", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sub", "xor", "zeta",
]
# fmt: on


@register_rule(*_HANDED_ON, effect="moves")
@register_rule(*_UNARY, *_MANY)
@reads_abstract_values
def elementwise(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Unite the axes of all operands of ``out[i] = f(x[i], y[i], …)``.

    Scalar operands (literals, the bounds of clamp, the predicate of select) go with every position, and so
    does an axis of size 1 that is repeated.
    """
    (shape,) = equation.shapes
    assert all(len(x) in (0, len(shape)) for x in inputs), f"{equation.where}: not elementwise"
    traits, tie_free = combine(equation.primitive, equation.params, inputs)
    abstract = _abstract_value(equation, inputs)
    dims = []
    for axis, size in enumerate(shape):
        tied = [x for x in inputs if len(x) == len(shape) and x[axis].size == size]
        for x in tied[1:]:
            unite(tied[0][axis], x[axis], equation.because("operands with incompatible factors"))
        dims.append(tied[0][axis] if tied else Node(size))
    return [Value(dims, abstract=abstract, tie_free=[dims[axis] for axis in tie_free], traits=traits)]


def _abstract_value(equation: Equation, inputs: Sequence[Value]) -> AbstractValue:
    """Return what is known of the result; positions used in a way that is not listed here pin their axis."""
    match equation.primitive, [x.abstract for x in inputs]:
        case "copy" | "name" | "stop_gradient" | "sharding_constraint", [known]:
            return known
        case "convert_element_type", [Positions(axis) as known] if _can_count(equation, axis.size):
            return known
        case "eq" | "ne", [Positions(x, beyond=False), Positions(y, beyond=False)] if x.size == y.size:
            unite(x, y, equation.because("positions of axes with incompatible factors"))  # one-hot
            return None
        # JAX reads x[i] as x[select(i < 0, i + n, i)], although a position is never negative. The next three
        # cases see through that.
        case "lt", [Positions(_, beyond=False), Number(value)] if value <= 0:
            return NEVER
        case "add", [Positions() as known, Number(value)] if value == 0:  # `jnp.eye` adds its offset
            return known
        case "add", [Positions(axis), Number()]:
            return Positions(axis, beyond=True)
        case "select_n", [Never(), known, _]:
            return known
        case "clamp", [Number(low), Positions(axis, beyond=False) as known, Number(high)] if (
            low <= 0 and high >= axis.size - 1
        ):
            return known
    for x in inputs:
        x.pin_named(equation.because("positions along it are computed with"))
    return None


def _can_count(equation: Equation, size: int) -> bool:
    """Tell whether the dtype of a conversion can hold every position of an axis of `size`."""
    kind = equation.params["new_dtype"]
    if jnp.issubdtype(kind, jnp.integer):
        return size - 1 <= jnp.iinfo(kind).max
    return jnp.issubdtype(kind, jnp.floating) and size <= 2 ** jnp.finfo(kind).nmant


@register_rule("bitcast_convert_type")
def bitcast(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Pass the axes on; a type of another width adds or drops a last axis of parts, which is pinned."""
    (shape,) = equation.shapes
    why = equation.because("the parts of a number")
    for node in x[len(shape) :]:
        pin(node, why)
    return [(*x[: len(shape)], *(pinned(size, why) for size in shape[len(x) :]))]


@register_rule("optimization_barrier", "device_put", effect="moves")
@reads_abstract_values
def identities(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Return the inputs: every output is the input at its place."""
    return inputs
