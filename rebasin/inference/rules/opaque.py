"""Primitives without a rule of their own: those pinned on purpose, and those that no jaxpr should hold."""

from collections.abc import Sequence

from rebasin.inference.axes import pin, pinned
from rebasin.inference.rule import Equation, register_rule
from rebasin.inference.values import Dims

__all__ = ["INTERNAL", "PINNED_ON_PURPOSE"]

_CALLBACK = "Python code outside of the program may do anything with the positions"
_FOREIGN = "code in another language may do anything with the positions"
_REFERENCE = "a mutable array may be read and written anywhere"
_KERNEL = "a kernel that reads and writes blocks of memory by itself"
_EIGHT_BITS = "an attention kernel in 8 bits, which runs on few devices, so no rule for it was tested"
_ASYNCHRONOUS = "a collective in two parts; the plain one has a rule"
_MESSAGE = "a message between single devices"

# Reason by primitive; docs/primitives.md is made of this table and the next.
PINNED_ON_PURPOSE: dict[str, str] = {
    "pure_callback": _CALLBACK,
    "io_callback": _CALLBACK,
    "ffi_call": _FOREIGN,
    "call_exported": "an exported program is stored as bytes that inference does not read",
    **dict.fromkeys(("pallas_call", "core_map"), _KERNEL),
    **dict.fromkeys(
        ("new_ref", "empty_ref", "free_ref", "freeze", "get", "swap", "addupdate", "accum_grad_in_ref"),
        _REFERENCE,
    ),
    "run_state": _REFERENCE,
    "empty": "memory that nothing was written to holds any numbers",
    **dict.fromkeys(
        (
            *("dot_product_attention_fp8_fwd", "dot_product_attention_fp8_fwd_wrapper"),
            *("dot_product_attention_fp8_bwd", "dot_product_attention_fp8_bwd_wrapper"),
        ),
        _EIGHT_BITS,
    ),
    "tridiagonal_solve": "rows of a system depend on each other; CONTRIBUTING.md shows a rule for this",
    "ragged_all_to_all": "pieces of different lengths are exchanged between devices",
    **dict.fromkeys(("psend", "precv"), _MESSAGE),
    **dict.fromkeys(
        (
            *("all_gather_start", "all_gather_done", "all_gather_reduced_start"),
            *("psum_start", "psum_done", "psum_invariant_start", "unreduced_psum_start"),
            *("reduce_scatter_start", "reduce_scatter_done", "unreduced_reduce_scatter_start"),
            *("all_to_all_start", "all_to_all_done", "pbroadcast_start", "pbroadcast_done"),
            *("ppermute_start", "ppermute_done"),
        ),
        _ASYNCHRONOUS,
    ),
}


_DERIVATIVES = "stands for a value or a program while derivatives are taken"
_EXPERIMENTAL = "belongs to kinds of values that are experimental in JAX"
_ORDER = "keeps the order of effects, or the use of a value, until the program is compiled"
_SIZES = "occurs in programs that are exported for unknown sizes"

# Primitives that are not met in the jaxpr of a function on arrays, each with the place where it occurs. If
# one is met nevertheless, it pins, as any primitive without a rule does.
INTERNAL: dict[str, str] = {
    **dict.fromkeys(
        ("zeros_like", "custom_lin", "custom_jvp_call_jaxpr", "remat_opt", "unreachable"), _DERIVATIVES
    ),
    **dict.fromkeys(
        (
            *("new_box", "box_get", "box_set", "new_log", "log_extend", "log_read"),
            *("call_hi_primitive", "call_hi_primitive_linearized", "create_linear", "pin", "unpin"),
            *("to_edtype", "from_edtype"),
        ),
        _EXPERIMENTAL,
    ),
    **dict.fromkeys(("create_token", "after_all", "dce_sink", "tie"), _ORDER),
    **dict.fromkeys(("shape_assertion", "dim_as_value", "dimension_size"), _SIZES),
    **dict.fromkeys(("broadcast_to", "empty2", "with_memory_space_constraint"), "occurs inside of kernels"),
}


@register_rule(*PINNED_ON_PURPOSE)
def pin_on_purpose(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Pin all axes of operands and results, for the reason that the table gives."""
    why = equation.because(PINNED_ON_PURPOSE[equation.primitive])
    for node in (node for x in inputs for node in x):
        pin(node, why)
    return [tuple(pinned(size, why) for size in shape) for shape in equation.shapes]
