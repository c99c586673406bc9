"""Primitives that summarise positions along axes or in windows."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.rule import Equation, reads_notes, register_rule
from rebasin.inference.values import Dims, Positions, Value


@register_rule(
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"
)
def reduce(equation: Equation, x: Value) -> Sequence[Dims]:
    """The reduction does not depend on the order of positions, so the reduced axes stay free."""
    kept = [i for i in range(len(x)) if i not in equation.params["axes"]]
    return [Value((x[i] for i in kept), distinct=(x[i] for i in kept if x.is_distinct(i)))]


# Of equal numbers the first is chosen, whatever the others' fate.
_TIES = "of equal values the first along it is chosen"


@register_rule("argmax", "argmin")
def arg_reduce(equation: Equation, x: Value) -> Sequence[Dims]:
    """The answer is a position along the axis, which is pinned only where values could be equal."""
    (axis,) = equation.params["axes"]
    if not x.is_distinct(axis):
        pin(x[axis], equation.because(_TIES), mixed=False)
    dims = [node for i, node in enumerate(x) if i != axis]
    return [Value(dims, note=Positions(x[axis]))]


@register_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Each position depends on those before it."""
    pin(x[equation.params["axis"]], equation.because("positions depend on those before them"))
    return [x]


@register_rule("sort")
@reads_notes
def sort(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """``out[i]`` is the i-th smallest, whatever the order of the operand: symmetric, as a reduction is.

    So the sorted axis stays free and the sorted output is pinned. Several operands move together, along the
    other axes too. Where some of them are no keys (`argsort` carries positions), equal keys keep the order of
    the operands, which is pinned unless the first keys all differ.
    """
    axis = equation.params["dimension"]
    keys, rest = inputs[: equation.params["num_keys"]], inputs[equation.params["num_keys"] :]
    for x in keys:
        x.pin_named(equation.because("positions along it are compared"))
    for dims in inputs[1:]:
        for x, y in zip(inputs[0], dims, strict=True):
            unite(x, y, equation.because("operands with incompatible factors"))
    if rest and not keys[0].is_distinct(axis):
        pin(inputs[0][axis], equation.because("equal keys are sorted by position"), mixed=False)
    ranks = pinned(inputs[0][axis].size, equation.because("the axis is sorted"))
    sorted_dims = [(*x[:axis], ranks, *x[axis + 1 :]) for x in inputs]
    notes = [*(None for _ in keys), *(x.note for x in rest)]
    return [Value(dims, note=note) for dims, note in zip(sorted_dims, notes, strict=True)]


@register_rule("top_k", "approx_top_k")
def top_k(equation: Equation, x: Value) -> Sequence[Dims]:
    """The largest values, in order, and their positions along the axis; pinned where there may be ties.

    Values alone would be symmetric, as in `sort`.
    """
    axis = equation.params.get("axis", equation.params.get("reduction_dimension", -1)) % len(x)
    if not x.is_distinct(axis):
        pin(x[axis], equation.because(_TIES), mixed=False)
    ranks = pinned(equation.shapes[0][axis], equation.because("the largest come first"))
    dims = (*x[:axis], ranks, *x[axis + 1 :])
    return [dims, Value(dims, note=Positions(x[axis]))]


@register_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
@register_rule("select_and_gather_add", "select_and_scatter_add")
def windows(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Each output position depends on a window of the operands: neighbours, which are pinned.

    An axis with windows of one position passes through, and operands move together along it. The others are
    the initial values, scalars.
    """
    operands = [x for x in inputs if x]
    first = operands[0] if operands else ()
    outputs: list[list[Node]] = [[] for _ in equation.shapes]
    for i, node in enumerate(first):
        why = equation.because("windows of neighbouring positions")
        if _passes_windows(equation, i):
            for x in operands[1:]:
                unite(node, x[i], equation.because("operands with incompatible factors"))
        else:
            for x in operands:
                pin(x[i], why)
        for dims, shape in zip(outputs, equation.shapes, strict=True):
            dims.append(node if _passes_windows(equation, i) else pinned(shape[i], why))
    return [tuple(dims) for dims in outputs]


def _passes_windows(equation: Equation, i: int) -> bool:
    params = equation.params
    return (
        params["window_dimensions"][i] == 1
        and params["window_strides"][i] == 1
        and tuple(params["padding"][i]) == (0, 0)
        and params.get("base_dilation", {i: 1})[i] == 1
    )
