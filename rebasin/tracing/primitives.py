"""What primitives do to the values that carry a group: contract, move, reduce or pool; others compute."""

from collections.abc import Sequence
from typing import Any

from rebasin.tracing.evaluation import inner_program

__all__ = ["MOVES", "REDUCTIONS", "WINDOWS", "is_contraction"]

_CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})

# What moves positions without computing anything.
MOVES = frozenset(
    {
        *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "tile", "pad", "rev", "copy"),
        *("concatenate", "stack", "unstack", "split", "slice", "dynamic_slice", "dynamic_update_slice"),
        *("gather", "scatter", "convert_element_type", "reduce_precision", "stop_gradient", "name", "copy_p"),
        *("sharding_constraint", "optimization_barrier", "device_put"),
    }
)

REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"}
)

WINDOWS = frozenset(
    {
        *("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window", "sort", "top_k"),
        *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "argmax", "argmin", "approx_top_k"),
        *("select_and_gather_add", "select_and_scatter_add", "scatter-add", "scatter-mul", "scatter-max"),
        *("scatter-min", "scatter-sub"),
    }
)


def is_contraction(eqn: Any, data: Sequence[bool], weights: Sequence[bool]) -> bool:
    """Whether an equation is a contraction of data, or wraps one of data with one weight.

    Args:
      eqn: the equation.
      data: which of its operands depend on the batch.
      weights: which of them depend on the tree.
    """
    if eqn.primitive.name in _CONTRACTIONS:
        return any(data)
    if eqn.primitive.name == "cond":
        wraps = "branches_platforms" in eqn.params
    else:
        wraps = eqn.primitive.name.startswith("custom_vjp_call")
    return (
        wraps
        and len(eqn.outvars) == 1
        and sum(data) == 1
        and sum(weight and not own for weight, own in zip(weights, data, strict=True)) == 1
        and _holds_contraction(eqn)
    )


def _holds_contraction(eqn: Any) -> bool:
    if eqn.primitive.name in _CONTRACTIONS:
        return True
    programs = eqn.params["branches"] if eqn.primitive.name == "cond" else [inner_program(eqn)]
    return any(
        _holds_contraction(inner)
        for program in programs
        if program is not None
        for inner in getattr(program, "jaxpr", program).eqns
    )
