"""Primitives that summarise positions along axes or in windows."""

from collections.abc import Sequence
from typing import Any

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.programs import open_program
from rebasin.inference.rule import Equation, reads_abstract_values, register_rule
from rebasin.inference.traits import reduced
from rebasin.inference.values import Dims, Positions, Value


@register_rule(
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"),
    effect="reduces",
)
def reduce(equation: Equation, x: Value) -> Sequence[Dims]:
    """Drop the reduced axes, which stay free: the reduction does not depend on the order of positions."""
    kept = [i for i in range(len(x)) if i not in equation.params["axes"]]
    tie_free = [x[i] for i in kept if x.is_tie_free(i)]
    return [Value((x[i] for i in kept), tie_free=tie_free, traits=reduced(equation.primitive, x.traits))]


_COMMUTATIVE = frozenset(["add", "mul", "max", "min", "and", "or", "xor"])


@register_rule("reduce", effect="reduces")
def reduce_by_program(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Unite the operands, and drop the reduced axes; they are pinned unless the reducer has no order.

    The operands come first, then as many initial values. A reducer is taken to have no order if it combines
    each operand with itself, by one commutative operation.
    """
    axes = equation.params["dimensions"]
    operands = inputs[: len(inputs) // 2]
    for x in operands[1:]:
        for first, node in zip(operands[0], x, strict=True):
            unite(first, node, equation.because("operands with incompatible factors"))
    if not _is_commutative(equation.params["jaxpr"], len(operands)):
        for axis in axes:
            pin(operands[0][axis], equation.because("the reducer may depend on the order of positions"))
    return [tuple(node for i, node in enumerate(x) if i not in axes) for x in operands]


def _is_commutative(reducer: Any, count: int) -> bool:
    """Tell whether a reducer of `count` values is, for each of them, ``acc ∘ value`` with a commutative ∘."""
    jaxpr, _ = open_program(reducer)
    made = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive.name in _COMMUTATIVE}
    pairs = zip(jaxpr.outvars, jaxpr.invars[:count], jaxpr.invars[count:], strict=True)
    return len(made) == len(jaxpr.eqns) == count and all(
        out in made and {*made[out].invars} == {acc, value} for out, acc, value in pairs
    )


# Of equal numbers the first is chosen, so another order of the positions would choose another one.
_TIES = "of equal values the first along it is chosen"


@register_rule("argmax", "argmin", effect="pools")
def arg_reduce(equation: Equation, x: Value) -> Sequence[Dims]:
    """Return positions along the reduced axis, which is pinned only if its values could be equal."""
    (axis,) = equation.params["axes"]
    if not x.is_tie_free(axis):
        pin(x[axis], equation.because(_TIES), position_dependent=False)
    dims = [node for i, node in enumerate(x) if i != axis]
    return [Value(dims, abstract=Positions(x[axis]))]


@register_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", effect="pools")
def cumulative(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Pin the axis, along which each position depends on those before it."""
    pin(x[equation.params["axis"]], equation.because("positions depend on those before them"))
    return [x]


@register_rule("sort", effect="pools")
@reads_abstract_values
def sort(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Leave the sorted axis of the operands free and pin it in the outputs.

    ``out[i]`` is the i-th smallest number whatever the order of the operand, so sorting is symmetric, as a
    reduction is. Several operands move together, along the other axes too. If some of them are not keys
    (`argsort` carries positions along), equal keys keep the order of the operands, and the sorted axis is
    pinned unless the first keys are tie-free.
    """
    axis = equation.params["dimension"]
    keys, rest = inputs[: equation.params["num_keys"]], inputs[equation.params["num_keys"] :]
    for x in keys:
        x.pin_named(equation.because("positions along it are compared"))
    for dims in inputs[1:]:
        for x, y in zip(inputs[0], dims, strict=True):
            unite(x, y, equation.because("operands with incompatible factors"))
    if rest and not keys[0].is_tie_free(axis):
        why = equation.because("equal keys are sorted by position")
        pin(inputs[0][axis], why, position_dependent=False)
    ranks = pinned(inputs[0][axis].size, equation.because("the axis is sorted"))
    sorted_dims = [(*x[:axis], ranks, *x[axis + 1 :]) for x in inputs]
    known = [*(None for _ in keys), *(x.abstract for x in rest)]
    return [Value(dims, abstract=abstract) for dims, abstract in zip(sorted_dims, known, strict=True)]


@register_rule("top_k", "approx_top_k", effect="pools")
def top_k(equation: Equation, x: Value) -> Sequence[Dims]:
    """Return the largest values, in order, and their positions along the axis, pinned if there may be ties.

    The values alone would be symmetric, as in `sort`.
    """
    axis = equation.params.get("axis", equation.params.get("reduction_dimension", -1)) % len(x)
    if not x.is_tie_free(axis):
        pin(x[axis], equation.because(_TIES), position_dependent=False)
    ranks = pinned(equation.shapes[0][axis], equation.because("the largest come first"))
    dims = (*x[:axis], ranks, *x[axis + 1 :])
    return [dims, Value(dims, abstract=Positions(x[axis]))]


@register_rule(
    *("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"),
    *("select_and_gather_add", "select_and_scatter", "select_and_scatter_add"),
    effect="pools",
)
def windows(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Pin the axes along which an output position depends on a window of neighbours in the operands.

    An axis with windows of one position passes through, and operands move together along it. Scalar operands
    are initial values.
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
    """Tell whether position s along axis i of the output depends on position s of the operands alone."""
    params = equation.params
    return (
        params["window_dimensions"][i] == 1
        and params["window_strides"][i] == 1
        and tuple(params["padding"][i]) == (0, 0)
        and params.get("base_dilation", {i: 1})[i] == 1
    )
