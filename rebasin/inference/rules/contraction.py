"""Matrix products and convolutions."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, factor, pin, pinned, product, unite
from rebasin.inference.rule import Equation, register_rule
from rebasin.inference.traits import contract
from rebasin.inference.values import Dims, Value


@register_rule("dot_general", effect="contracts")
def dot_general(equation: Equation, x: Value, y: Value, *_: Dims) -> Sequence[Dims]:
    """Tie the axes of ``out[b, i, j] = Σₖ x[b, i, k] y[b, k, j]``: k and b are permuted alike in x and y."""
    (contract_x, contract_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    for i, j in (*zip(contract_x, contract_y, strict=True), *zip(batch_x, batch_y, strict=True)):
        unite(x[i], y[j], equation.because("operands with incompatible factors"))
    free_x = [i for i in range(len(x)) if i not in (*contract_x, *batch_x)]
    free_y = [j for j in range(len(y)) if j not in (*contract_y, *batch_y)]
    dims = [*(x[i] for i in (*batch_x, *free_x)), *(y[j] for j in free_y)]
    traits, x_stays, y_stays = contract(x, y, contract_x, contract_y)
    tie_free = [x[i] for i in free_x if x_stays and x.is_tie_free(i)]
    tie_free += [y[j] for j in free_y if y_stays and y.is_tie_free(j)]
    return [Value(dims, tie_free=tie_free, traits=traits)]


@register_rule("scaled_dot", "scaled_matmul", "scaled_matmul_wrapper", effect="contracts")
def scaled_product(equation: Equation, x: Value, y: Value, x_scale: Dims, y_scale: Dims) -> Sequence[Dims]:
    """Tie the axes of a product of ``x · x_scale`` and ``y · y_scale``, each scale being that of a block.

    Along a contracted axis a block is a run of neighbours, so the axis is (blocks, positions in a block).
    """
    matmul = (((2,), (2,)), ((0,), (0,)))
    numbers = equation.params.get("dimension_numbers", matmul)
    incompatible = equation.because("operands with incompatible factors")
    for dims, scale in ((x, x_scale), (y, y_scale)):
        for node, block in zip(dims, scale, strict=True):
            blocks, _ = factor(node, [block.size, node.size // block.size], incompatible)
            unite(blocks, block, incompatible)
    return dot_general(equation._replace(params={"dimension_numbers": numbers}), x, y)


@register_rule("conv_general_dilated", effect="contracts")
def convolution(equation: Equation, x: Value, kernel: Value) -> Sequence[Dims]:
    """Tie the axes of ``out[n, s, o] = Σ x[n, s + t, c] kernel[t, c, o]``; positions s and t are pinned.

    Along an axis with a window of one position that neither strides nor pads, positions are not neighbours
    of each other and stay free. With G feature groups, the channels of x are G × c and those of the output
    G × o', and feature group g of x goes to feature group g of the output: ``kernel[t, c, (g, o')]``. The
    examples n stay free unless there are batch groups, which pin them together with all channels.
    """
    numbers = equation.params["dimension_numbers"]
    groups = equation.params["feature_group_count"]
    (shape,) = equation.shapes
    x_batch, x_channels, *x_space = (x[i] for i in numbers.lhs_spec)
    k_out, k_in, *k_space = (kernel[i] for i in numbers.rhs_spec)
    why = equation.because("neighbouring positions of a convolution")
    untouched = [_is_pointwise(equation, i, node.size) for i, node in enumerate(k_space)]
    for i, pointwise in enumerate(untouched):
        if not pointwise:
            pin(x_space[i], why)
            pin(k_space[i], why)
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
    for axis, node, pointwise in zip(out_space, x_space, untouched, strict=True):
        out[axis] = node if pointwise else pinned(shape[axis], why)
    traits, _, kernel_stays = contract(x, kernel, numbers.lhs_spec[1:2], numbers.rhs_spec[1:])
    is_tie_free = groups == 1 and kernel_stays and kernel.is_tie_free(numbers.rhs_spec[0])
    return [Value(out, tie_free=[out[out_channels]] if is_tie_free else (), traits=traits)]


def _is_pointwise(equation: Equation, i: int, window: int) -> bool:
    """Tell whether positions along space axis i stay apart: ``out[s] = x[s] kernel[0]``."""
    params = equation.params
    padding, stride, dilation = params["padding"][i], params["window_strides"][i], params["lhs_dilation"][i]
    return window == 1 and tuple(padding) == (0, 0) and stride == 1 and dilation == 1


@register_rule("ragged_dot_general", effect="contracts")
def ragged_dot_general(equation: Equation, x: Dims, y: Dims, sizes: Dims, *_: Dims) -> Sequence[Dims]:
    """Tie the axes of ``out[i, j] = Σₖ x[i, k] y[g(i), k, j]``: runs of rows, one run for each matrix of y.

    `sizes` holds the lengths of the runs. Rows are counted out to the matrices in order, so rows and matrices
    are pinned; k and j are as in any product. Other ragged forms (the derivatives of this one) are pinned
    whole.
    """
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contract_x, contract_y), (batch_x, batch_y) = numbers.dot_dimension_numbers
    (ragged,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    (shape,) = equation.shapes
    if ragged in (*contract_x, *batch_x) or len(groups) != 1 or batch_x:
        why = equation.because("a ragged product of another form than rows by matrices")
        for node in (*x, *y, *sizes):
            pin(node, why)
        return [tuple(pinned(size, why) for size in shape)]
    for node in (x[ragged], y[groups[0]], *sizes):
        pin(node, equation.because("rows are counted out to the matrices in order"))
    for i, j in zip(contract_x, contract_y, strict=True):
        unite(x[i], y[j], equation.because("operands with incompatible factors"))
    free_x = [node for i, node in enumerate(x) if i not in contract_x]
    free_y = [node for j, node in enumerate(y) if j not in (*contract_y, *groups)]
    return [(*free_x, *free_y)]
