"""Linear algebra and Fourier transforms: they act on the last axes, and on every batch position alike."""

from collections.abc import Sequence

from rebasin.inference.axes import pin, pinned, unite
from rebasin.inference.rule import Equation, register_rule
from rebasin.inference.values import Dims, Value


@register_rule(
    *("cholesky", "cholesky_update", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product"),
    *("lu", "lu_pivots_to_permutation", "ormqr", "qr", "schur", "svd", "symmetric_product", "tridiagonal"),
    effect="pools",
)
def decompose(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Pass on the batch axes of a decomposition, and pin rows and columns, whose order it depends on."""
    batch = len(inputs[0]) - (1 if equation.primitive == "lu_pivots_to_permutation" else 2)
    why = equation.because("rows and columns of a matrix depend on each other")
    for x in inputs:
        for node, first in zip(x[:batch], inputs[0], strict=False):
            unite(first, node, equation.because("operands with incompatible factors"))
        for node in x[batch:]:
            pin(node, why)
    first = inputs[0][:batch]
    return [(*first, *(pinned(size, why) for size in shape[batch:])) for shape in equation.shapes]


@register_rule("triangular_solve", effect="pools")
def triangular_solve(equation: Equation, a: Dims, b: Dims) -> Sequence[Dims]:
    """Pin the axes of a in ``a x = b`` or ``x a = b``; pass on the batch, and the right-hand sides of b."""
    why = equation.because("rows and columns of a matrix depend on each other")
    solved = -2 if equation.params["left_side"] else -1
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unite(x, y, equation.because("operands with incompatible factors"))
    for node in (*a[-2:], b[solved]):
        pin(node, why)
    return [tuple(b)]


@register_rule("custom_linear_solve")
def linear_solve(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Run the program that solves; those of products and derivatives do not matter."""
    lengths, programs = equation.params["const_lengths"], equation.params["jaxprs"]
    first = lengths.matvec + lengths.vecmat
    right = inputs[first + lengths.solve + lengths.transpose_solve :]
    return equation.run(programs.solve, [*inputs[first : first + lengths.solve], *right])


@register_rule("fft", effect="pools")
def fourier(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Pin the transformed axes, since every output depends on all their positions in order."""
    why = equation.because("a Fourier transform mixes its positions")
    (shape,) = equation.shapes
    first = len(x) - len(equation.params["fft_lengths"])
    for node in x[first:]:
        pin(node, why)
    return [(*x[:first], *(pinned(size, why) for size in shape[first:]))]
