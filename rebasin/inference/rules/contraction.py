"""Matrix products and convolutions."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, factor, pin, pinned, product, unite
from rebasin.inference.registry import Dims, Equation, register_rule


@register_rule("dot_general")
def dot_general(equation: Equation, x: Dims, y: Dims, *_: Dims) -> Sequence[Dims]:
    """``out[b, i, j] = Σₖ x[b, i, k] y[b, k, j]``: k is permuted alike on both sides, and so is b."""
    (contract_x, contract_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    for i, j in (*zip(contract_x, contract_y, strict=True), *zip(batch_x, batch_y, strict=True)):
        unite(x[i], y[j], equation.because("operands with incompatible factors"))
    free_x = [node for i, node in enumerate(x) if i not in (*contract_x, *batch_x)]
    free_y = [node for j, node in enumerate(y) if j not in (*contract_y, *batch_y)]
    return [(*(x[i] for i in batch_x), *free_x, *free_y)]


@register_rule("conv_general_dilated")
def convolution(equation: Equation, x: Dims, kernel: Dims) -> Sequence[Dims]:
    """``out[n, s, o] = Σ x[n, s + t, c] kernel[t, c, o]``: channels contract, positions are neighbours.

    With G feature groups, the channels of x are G × c, those of the output G × o', and group g of the one
    goes to
    group g of the other: ``kernel[t, c, (g, o')]``. The examples of a batch may be permuted unless they form
    groups.
    """
    numbers = equation.params["dimension_numbers"]
    groups = equation.params["feature_group_count"]
    (shape,) = equation.shapes
    x_batch, x_channels, *x_space = (x[i] for i in numbers.lhs_spec)
    k_out, k_in, *k_space = (kernel[i] for i in numbers.rhs_spec)
    why = equation.because("neighbouring positions of a convolution")
    for node in (*x_space, *k_space):
        pin(node, why)
    if equation.params["batch_group_count"] != 1:
        why = equation.because("batch groups")
        for node in (x_batch, x_channels, k_in, k_out):
            pin(node, why)
        return [tuple(pinned(size, why) for size in shape)]

    incompatible = equation.because("channels with incompatible factors")
    x_group, x_inner = factor(x_channels, [groups, k_in.size], incompatible)
    k_group, k_inner = factor(k_out, [groups, k_out.size // groups], incompatible)
    unite(x_inner, k_in, incompatible)
    unite(x_group, k_group, incompatible)
    out: list[Node] = [Node(1)] * len(shape)
    out_batch, out_channels, *out_space = numbers.out_spec
    out[out_batch] = x_batch
    out[out_channels] = product([k_group, k_inner])
    for axis in out_space:
        out[axis] = pinned(shape[axis], why)
    return [tuple(out)]
