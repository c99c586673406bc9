"""Primitives that hold other programs."""

from collections.abc import Sequence
from typing import Any

from rebasin.inference.axes import pinned, unite
from rebasin.inference.rule import Equation, keeps_folds, reads_notes, register_rule
from rebasin.inference.values import Dims, Value

_CHANGES = "the loop changes the factors of a value"


@register_rule("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
@register_rule("call", "composite", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
@reads_notes
@keeps_folds
def call(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """The inner program runs once on the same operands; rules for its derivatives do not matter."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(equation.params[name] for name in names if name in equation.params)
    return equation.run(inner, inputs)


@register_rule("cond")
@reads_notes
def cond(equation: Equation, index: Value, *operands: Value) -> Sequence[Dims]:
    """Whichever branch runs, the operands are the same, so all branches' outputs must be permuted alike.

    `jax.lax.platform_dependent` is this with an index that names the platform: a spec holds on all of them.
    """
    index.pin_named(equation.because("positions along it choose a branch"))
    first, *others = [equation.run(branch, operands) for branch in equation.params["branches"]]
    for outputs in others:
        _unite_all(first, outputs, equation.because("branches with incompatible factors"))
        _forget(outputs, equation)
    return _forget(first, equation) if others else first


@register_rule("debug_callback", "debug_print")
def debug(equation: Equation, *_: Dims) -> Sequence[Dims]:
    """What is printed is for the reader and no result of the function."""
    return [() for _ in equation.shapes]


@register_rule("platform_index")
def platform_index(equation: Equation) -> Sequence[Dims]:
    """A scalar that names the platform."""
    return [()]


@register_rule("while")
@reads_notes
def while_loop(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """What the body returns is what it gets next, so a carry is permuted alike before and after."""
    params = equation.params
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    carry = _forget(inputs[cond_consts + body_consts :], equation)
    equation.run(params["cond_jaxpr"], [*inputs[:cond_consts], *carry])
    results = equation.run(params["body_jaxpr"], [*inputs[cond_consts : cond_consts + body_consts], *carry])
    _unite_all(carry, _forget(results, equation), equation.because(_CHANGES))
    return carry


@register_rule("scan")
@reads_notes
def scan(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """As in a while loop; the axis scanned over is a sequence, and pinned.

    A step sees only its own slice, so that what comes from slices alone may be permuted differently at each
    step. What comes back as carry may not: the carry is one value at all steps.
    """
    params: dict[str, Any] = equation.params
    consts, carries = params["num_consts"], params["num_carry"]
    carry, sequences = _forget(inputs[consts : consts + carries], equation), inputs[consts + carries :]
    steps = pinned(params["length"], equation.because("the axis is scanned over in order"), mixed=False)
    for dims in sequences:
        unite(dims[0], steps, "")
    slices = [
        Value(x[1:], (x.context or frozenset()) | {steps}, note=x.note, distinct=x.distinct)
        for x in sequences
    ]
    results = equation.run(params["jaxpr"], [*inputs[:consts], *carry, *slices])
    _unite_all(carry, _forget(results[:carries], equation), equation.because(_CHANGES))
    stacked = [
        Value((steps, *x), (x.context or frozenset()) - {steps}, note=x.note, distinct=x.distinct)
        for x in results[carries:]
    ]
    return [*carry, *stacked]


def _forget(values: Sequence[Value], equation: Equation) -> list[Value]:
    """Values of which only the axes are known: constant at the first step of a loop, say, but not later."""
    for value in values:
        value.pin_named(equation.because("positions along it are carried through the program"))
    return [Value(value, value.context) for value in values]


def _unite_all(first: Sequence[Dims], second: Sequence[Dims], reason: str) -> None:
    for x, y in zip(first, second, strict=True):
        for a, b in zip(x, y, strict=True):
            unite(a, b, reason)
