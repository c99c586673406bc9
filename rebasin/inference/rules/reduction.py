"""Primitives that summarise positions along axes or in windows."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.registry import Dims, Equation, register_rule


@register_rule(
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"
)
def reduce(equation: Equation, x: Dims) -> Sequence[Dims]:
    """The reduction does not depend on the order of positions, so the reduced axes stay free."""
    return [tuple(node for i, node in enumerate(x) if i not in equation.params["axes"])]


@register_rule("argmax", "argmin")
def arg_reduce(equation: Equation, x: Dims) -> Sequence[Dims]:
    """The answer is a position, so the axis is pinned."""
    for axis in equation.params["axes"]:
        pin(x[axis], equation.because("the result is a position along it"))
    return [tuple(node for i, node in enumerate(x) if i not in equation.params["axes"])]


@register_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Each position depends on those before it."""
    pin(x[equation.params["axis"]], equation.because("positions depend on those before them"))
    return [x]


@register_rule("sort")
def sort(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Operands move together along the other axes; the sorted axis is pinned."""
    axis = equation.params["dimension"]
    for dims in inputs:
        for i, (x, y) in enumerate(zip(inputs[0], dims, strict=True)):
            unite(x, y, equation.because("operands with incompatible factors"))
            if i == axis:
                pin(y, equation.because("the axis is sorted"))
    return inputs


@register_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def reduce_window(equation: Equation, x: Dims) -> Sequence[Dims]:
    """An axis with windows of one position passes through; any other is pinned."""
    params = equation.params
    (shape,) = equation.shapes
    dims: list[Node] = []
    for i, node in enumerate(x):
        trivial = (
            params["window_dimensions"][i] == 1
            and params["window_strides"][i] == 1
            and tuple(params["padding"][i]) == (0, 0)
            and params["base_dilation"][i] == 1
        )
        if trivial:
            dims.append(node)
        else:
            why = equation.because("windows of neighbouring positions")
            pin(node, why)
            dims.append(pinned(shape[i], why))
    return [tuple(dims)]
