"""Primitives that act on each position by itself."""

from collections.abc import Sequence

import jax.numpy as jnp

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.rule import Equation, reads_notes, register_rule
from rebasin.inference.values import NEVER, Dims, Never, Note, Number, Positions, Value

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

# Operations under which different numbers stay different, unless weights conspire: no rounding, clipping or
# comparing. (A sum of positions with their own negatives, x − x, is not thought of.)
_ANALYTIC = frozenset([
    "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atanh", "cbrt", "copy", "cos", "cosh", "div",
    "erf", "erfc", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "mul", "name", "neg",
    "pow", "rsqrt", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
])
# fmt: on


@register_rule(*_UNARY, *_MANY)
@reads_notes
def elementwise(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """``out[i] = f(x[i], y[i], …)``: all operands are permuted alike.

    Scalar operands (literals, the bounds of clamp, the predicate of select) go with every position, and so
    does an axis of size 1 that is repeated.
    """
    (shape,) = equation.shapes
    assert all(len(x) in (0, len(shape)) for x in inputs), f"{equation.where}: not elementwise"
    note = _note(equation, inputs)
    dims, distinct = [], []
    for axis, size in enumerate(shape):
        tied = [x for x in inputs if len(x) == len(shape) and x[axis].size == size]
        for x in tied[1:]:
            unite(tied[0][axis], x[axis], equation.because("operands with incompatible factors"))
        dims.append(tied[0][axis] if tied else Node(size))
        varying = [x.is_distinct(axis) for x in tied if x[axis] not in x.constant]
        if varying and all(varying):
            distinct.append(dims[-1])
    return [Value(dims, note=note, distinct=distinct if _is_analytic(equation) else ())]


def _is_analytic(equation: Equation) -> bool:
    """Whether different numbers stay different; a conversion to few digits makes ties likely."""
    if equation.primitive == "convert_element_type":
        kind = equation.params["new_dtype"]
        return jnp.issubdtype(kind, jnp.floating) and jnp.finfo(kind).bits >= 32
    return equation.primitive in _ANALYTIC


def _note(equation: Equation, inputs: Sequence[Value]) -> Note:
    """What is known of the result; an axis is pinned if its positions are used in any other way than here."""
    match equation.primitive, [x.note for x in inputs]:
        case "copy" | "name" | "stop_gradient" | "sharding_constraint", [note]:
            return note
        case "convert_element_type", [Positions(axis) as note] if _can_count(equation, axis.size):
            return note
        case "eq" | "ne", [Positions(x, beyond=False), Positions(y, beyond=False)] if x.size == y.size:
            unite(x, y, equation.because("positions of axes with incompatible factors"))  # one-hot
            return None
        # x[i] reads i as x[select(i < 0, i + n, i)], although i is never negative here.
        case "lt", [Positions(_, beyond=False), Number(value)] if value <= 0:
            return NEVER
        case "add", [Positions(axis), Number()]:
            return Positions(axis, beyond=True)
        case "select_n", [Never(), note, _]:
            return note
        case "clamp", [Number(low), Positions(axis, beyond=False) as note, Number(high)] if (
            low <= 0 and high >= axis.size - 1
        ):
            return note
    for x in inputs:
        x.pin_named(equation.because("positions along it are computed with"))
    return None


def _can_count(equation: Equation, size: int) -> bool:
    """Whether a dtype holds every position of an axis."""
    kind = equation.params["new_dtype"]
    if jnp.issubdtype(kind, jnp.integer):
        return size - 1 <= jnp.iinfo(kind).max
    return jnp.issubdtype(kind, jnp.floating) and size <= 2 ** jnp.finfo(kind).nmant


@register_rule("bitcast_convert_type")
def bitcast(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Bits are read as another type; a narrower or wider one adds or drops a last axis of parts, in order."""
    (shape,) = equation.shapes
    why = equation.because("the parts of a number")
    for node in x[len(shape) :]:
        pin(node, why)
    return [(*x[: len(shape)], *(pinned(size, why) for size in shape[len(x) :]))]


@register_rule("optimization_barrier", "device_put")
@reads_notes
def identities(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Every output is the input at its place."""
    return inputs
