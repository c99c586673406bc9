"""Primitives that hold other programs."""

from collections.abc import Sequence
from typing import Any

from rebasin.inference.axes import Node, pin, unite
from rebasin.inference.registry import Dims, Equation, register_rule


@register_rule("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
@register_rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def call(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """The inner program runs once on the same operands; rules for its derivatives do not matter."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(equation.params[name] for name in names if name in equation.params)
    return equation.run(inner, inputs)


@register_rule("cond")
def cond(equation: Equation, index: Dims, *operands: Dims) -> Sequence[Dims]:
    """Whichever branch runs, the operands are the same, so all branches' outputs must be permuted alike.

    `jax.lax.platform_dependent` is this with an index that names the platform: a spec holds on all of them.
    """
    first, *others = [equation.run(branch, operands) for branch in equation.params["branches"]]
    for outputs in others:
        _unite_all(first, outputs, equation.because("branches with incompatible factors"))
    return first


@register_rule("platform_index")
def platform_index(equation: Equation) -> Sequence[Dims]:
    """A scalar that names the platform."""
    return [()]


@register_rule("while")
def while_loop(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """What the body returns is what it gets next, so a carry is permuted alike before and after."""
    params = equation.params
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    carry = inputs[cond_consts + body_consts :]
    equation.run(params["cond_jaxpr"], [*inputs[:cond_consts], *carry])
    results = equation.run(params["body_jaxpr"], [*inputs[cond_consts : cond_consts + body_consts], *carry])
    _unite_all(carry, results, equation.because("the loop changes the factors of a value"))
    return carry


@register_rule("scan")
def scan(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """As in a while loop; the axis scanned over is a sequence, and pinned."""
    params: dict[str, Any] = equation.params
    consts, carries = params["num_consts"], params["num_carry"]
    carry, sequences = inputs[consts : consts + carries], inputs[consts + carries :]
    for dims in sequences:
        pin(dims[0], equation.because("the axis is scanned over in order"))
    results = equation.run(params["jaxpr"], [*inputs[:consts], *carry, *(dims[1:] for dims in sequences)])
    _unite_all(carry, results[:carries], equation.because("the loop changes the factors of a value"))
    stacked = []
    for dims in results[carries:]:
        steps = Node(params["length"])
        pin(steps, equation.because("the axis is scanned over in order"))
        stacked.append((steps, *dims))
    return [*carry, *stacked]


def _unite_all(first: Sequence[Dims], second: Sequence[Dims], reason: str) -> None:
    for x, y in zip(first, second, strict=True):
        for a, b in zip(x, y, strict=True):
            unite(a, b, reason)
