"""Primitives that hold other programs, and those of printing and platforms."""

from collections.abc import Sequence
from typing import Any

from rebasin.inference.axes import pinned, unite
from rebasin.inference.programs import program_of_call
from rebasin.inference.rule import (
    Equation,
    keeps_deferred_reshapes,
    reads_abstract_values,
    register_rule,
)
from rebasin.inference.values import Dims, Value

_CHANGES = "the loop changes the factors of a value"


@register_rule("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
@register_rule("call", "composite", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
@register_rule("cudnn_fusion", "custom_partitioning", "custom_vmap_call", "eval_jaxpr", "linear_call")
@reads_abstract_values
@keeps_deferred_reshapes
def call(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Run the inner program once, on the same operands; rules for its derivatives do not matter."""
    return equation.run(program_of_call(equation.params), inputs)


@register_rule("cond")
@reads_abstract_values
def cond(equation: Equation, index: Value, *operands: Value) -> Sequence[Dims]:
    """Run every branch on the same operands, and unite their outputs, since any of them may be taken.

    `jax.lax.platform_dependent` is a cond whose index names the platform, so a spec holds on every platform.
    """
    index.pin_named(equation.because("positions along it choose a branch"))
    first, *others = [equation.run(branch, operands) for branch in equation.params["branches"]]
    for outputs in others:
        _unite_all(first, outputs, equation.because("branches with incompatible factors"))
        _axes_alone(outputs, equation)
    return _axes_alone(first, equation) if others else first


@register_rule("debug_callback", "debug_print", "check", "inspect_sharding")
def debug(equation: Equation, *_: Dims) -> Sequence[Dims]:
    """Tie nothing: what is printed or checked is no result of the function."""
    return [() for _ in equation.shapes]


@register_rule("platform_index")
def platform_index(equation: Equation) -> Sequence[Dims]:
    """Return a scalar, which names the platform."""
    return [()]


@register_rule("while")
@reads_abstract_values
def while_loop(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Unite the carry with what the body returns, which is the carry of the next step."""
    params = equation.params
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    carry = _axes_alone(inputs[cond_consts + body_consts :], equation)
    equation.run(params["cond_jaxpr"], [*inputs[:cond_consts], *carry])
    results = equation.run(params["body_jaxpr"], [*inputs[cond_consts : cond_consts + body_consts], *carry])
    _unite_all(carry, _axes_alone(results, equation), equation.because(_CHANGES))
    return carry


@register_rule("scan")
@reads_abstract_values
def scan(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Unite the carry as in a while loop, and pin the axis scanned over, which is a sequence.

    A step sees only its own slice, so what is computed from slices alone may be permuted differently at each
    step. What comes back as carry may not: the carry is one value at all steps.
    """
    params: dict[str, Any] = equation.params
    consts, carries = params["num_consts"], params["num_carry"]
    carry, sequences = _axes_alone(inputs[consts : consts + carries], equation), inputs[consts + carries :]
    why = equation.because("the axis is scanned over in order")
    steps = pinned(params["length"], why, position_dependent=False)
    for dims in sequences:
        unite(dims[0], steps, "")
    slices = [
        Value(x[1:], (x.context or frozenset()) | {steps}, abstract=x.abstract, tie_free=x.tie_free)
        for x in sequences
    ]
    results = equation.run(params["jaxpr"], [*inputs[:consts], *carry, *slices])
    _unite_all(carry, _axes_alone(results[:carries], equation), equation.because(_CHANGES))
    stacked = [
        Value((steps, *x), (x.context or frozenset()) - {steps}, abstract=x.abstract, tie_free=x.tie_free)
        for x in results[carries:]
    ]
    return [*carry, *stacked]


def _axes_alone(values: Sequence[Value], equation: Equation) -> list[Value]:
    """Drop all that is known of some values beside their axes.

    It need not hold for the value at every step or in every branch: a carry may be constant at the first step
    of a loop and vary later.
    """
    for value in values:
        value.pin_named(equation.because("positions along it are carried through the program"))
    return [Value(value, value.context) for value in values]


def _unite_all(first: Sequence[Dims], second: Sequence[Dims], reason: str) -> None:
    for x, y in zip(first, second, strict=True):
        for a, b in zip(x, y, strict=True):
            unite(a, b, reason)
