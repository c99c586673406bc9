"""Attention as one kernel of a GPU.

`jax.nn.dot_product_attention` calls it with ``implementation="cudnn"``.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rebasin.inference.axes import Node, factor, pin, pinned, unite
from rebasin.inference.rule import Equation, register_rule
from rebasin.inference.rules.random import DIFFER
from rebasin.inference.values import Dims

# Operands by their place: queries, keys, values, bias, lengths of queries and keys, and four that say how
# several sequences are packed into one. Operands that are not given have no entries.
_LENGTHS, _PACKING, _FORWARD = slice(4, 6), slice(6, 10), 10

_PACKED = "several sequences packed into one"
_ALIBI = 4  # the mask whose slope depends on the number of the head


@register_rule("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper", effect="contracts")
def attention(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Tie the axes of ``out[b, t, h, d] = Σₛ softmax(Σᵢ q[b, t, h, i] k[b, s, h, i] + bias) v[b, s, h, d]``.

    With fewer heads of keys than of queries, the heads of queries are (heads of keys, queries of each). If
    gradients follow, a second output holds the statistics of the softmax.
    """
    axes, why = _tie(equation, inputs), equation.because(_PACKED)
    outputs = [axes.of_output(equation), (axes.batch, axes.heads, axes.queries)][: len(equation.shapes)]
    # The statistics of packed sequences have a row for each sequence instead of each example.
    return [
        tuple(
            node if node.size == size else pinned(size, why) for node, size in zip(dims, shape, strict=True)
        )
        for dims, shape in zip(outputs, equation.shapes, strict=True)
    ]


@register_rule("dot_product_attention_bwd", "dot_product_attention_bwd_wrapper", effect="contracts")
def attention_gradients(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Give the gradients of queries, keys, values and bias the axes of these, tied as in `attention`."""
    axes = _tie(equation, inputs)
    statistics, output, gradient = inputs[_FORWARD : _FORWARD + 3]
    wanted = axes.of_output(equation)
    for x, y in ((statistics, (axes.batch, axes.heads, axes.queries)), (output, wanted), (gradient, wanted)):
        for a, b in zip(x, y, strict=True):
            if a.size == b.size:
                unite(a, b, equation.because("operands with incompatible factors"))
            else:
                pin(a, equation.because(_PACKED))
    return [tuple(x) for x in inputs[: len(equation.shapes)]]


class _Axes(NamedTuple):
    """The axes of attention: examples, queries, heads of the queries, dimensions of the values."""

    batch: Node
    queries: Node
    heads: Node
    dims: Node

    def of_output(self, equation: Equation) -> Dims:
        """Return the axes of the output in the layout of the kernel."""
        return _laid_out(equation, self)


def _laid_out(equation: Equation, axes: Sequence[Node]) -> Dims:
    """Turn axes ``[b, t, h, d]`` into those of the layout of the kernel, or back."""
    batch, second, third, dims = axes
    return (batch, third, second, dims) if equation.params["layout"] == 1 else (batch, second, third, dims)


def _tie(equation: Equation, inputs: Sequence[Dims]) -> _Axes:
    """Tie the axes of the operands, and return those that outputs have."""
    q, k, v = (_laid_out(equation, x) for x in inputs[:3])
    bias = inputs[3]
    incompatible = equation.because("operands with incompatible factors")
    heads, _ = factor(q[2], [k[2].size, q[2].size // k[2].size], incompatible)
    for a, b in ((q[0], k[0]), (k[0], v[0]), (k[1], v[1]), (heads, k[2]), (k[2], v[2]), (q[3], k[3])):
        unite(a, b, incompatible)
    for a, b in zip(bias, (q[0], q[2], q[1], k[1]), strict=False):
        if a.size == b.size:
            unite(a, b, incompatible)
    _pin_by_params(equation, inputs, (q[0], q[1], k[1], q[2]))
    return _Axes(q[0], q[1], q[2], v[3])


def _pin_by_params(equation: Equation, inputs: Sequence[Dims], axes: tuple[Node, Node, Node, Node]) -> None:
    """Pin what masks, dropout and packing tell apart, among examples, queries, keys and heads."""
    batch, queries, keys, heads = axes
    params = equation.params
    mask = getattr(params["mask_type"], "value", params["mask_type"])
    lengths = [x[0] for x in inputs[_LENGTHS] if x[0].size]
    for node in lengths:
        unite(batch, node, equation.because("operands with incompatible factors"))
    if mask or params["sliding_window_length"] or lengths:
        for node in (queries, keys, *([heads] if mask == _ALIBI else [])):
            pin(node, equation.because("a mask by position"))
    is_packed = any(node.size for x in inputs[_PACKING] for node in x)
    if params["dropout_rate"] or is_packed:
        why = equation.because(_PACKED if is_packed else DIFFER)
        for node in (node for x in inputs for node in x):
            pin(node, why)
