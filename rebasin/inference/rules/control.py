"""Primitives that hold other programs, and those of printing and platforms."""

from collections.abc import Callable, Sequence
from typing import Any

from rebasin.inference.axes import Node, pinned, unite
from rebasin.inference.programs import open_program, program_of_call
from rebasin.inference.rule import (
    Equation,
    keeps_deferred_reshapes,
    reads_abstract_values,
    register_rule,
)
from rebasin.inference.values import NO_TRAITS, Dims, Traits, Value

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
    if not others:
        return first
    common = [frozenset.intersection(*(x.traits for x in same)) for same in zip(first, *others, strict=True)]
    return _axes_alone(first, equation, common)


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
    first = inputs[cond_consts + body_consts :]

    def step(carry: Sequence[Value]) -> list[Value]:
        equation.run(params["cond_jaxpr"], [*inputs[:cond_consts], *carry])
        return equation.run(params["body_jaxpr"], [*inputs[cond_consts : cond_consts + body_consts], *carry])

    handed_on = _handed_on(params["body_jaxpr"], body_consts, len(first))
    return _repeat(equation, step, first, handed_on)[0]


@register_rule("scan")
@reads_abstract_values
def scan(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Unite the carry as in a while loop, and pin the axis scanned over, which is a sequence.

    A step sees only its own slice, so what is computed from slices alone may be permuted differently at each
    step. What comes back as carry may not: the carry is one value at all steps.
    """
    params: dict[str, Any] = equation.params
    consts, carries = params["num_consts"], params["num_carry"]
    first, sequences = inputs[consts : consts + carries], inputs[consts + carries :]
    why = equation.because("the axis is scanned over in order")
    steps = pinned(params["length"], why, position_dependent=False)
    for dims in sequences:
        unite(dims[0], steps, "")
    slices = [_replace(x, x[1:], (x.context or frozenset()) | {steps}) for x in sequences]

    def step(carry: Sequence[Value]) -> list[Value]:
        return equation.run(params["jaxpr"], [*inputs[:consts], *carry, *slices])

    carry, results = _repeat(equation, step, first, _handed_on(params["jaxpr"], consts, carries))
    stacked = [_replace(x, (steps, *x), (x.context or frozenset()) - {steps}) for x in results[carries:]]
    return [*carry, *stacked]


def _replace(x: Value, dims: Dims, context: frozenset[Node]) -> Value:
    """Return a value with other axes, of which all else that is known holds still."""
    return Value(dims, context, x.constant, abstract=x.abstract, tie_free=x.tie_free, traits=x.traits)


def _handed_on(body: Any, consts: int, carries: int) -> list[bool]:
    """Tell which parts of the carry a loop's body hands on as they are, as it does with a constant."""
    jaxpr, _ = open_program(body)
    return [jaxpr.invars[consts + i] is jaxpr.outvars[i] for i in range(carries)]


def _repeat(
    equation: Equation,
    step: Callable[[Sequence[Value]], list[Value]],
    first: Sequence[Value],
    handed_on: Sequence[bool],
) -> tuple[list[Value], list[Value]]:
    """Run the body of a loop on a carry that stands for the carry of every step.

    Args:
      equation: the loop.
      step: runs the body on a carry and returns its results, the next carry first.
      first: the carry of the first step.
      handed_on: which parts of the carry are the same at every step.

    Returns:
      The carry after the last step, and all results of the body.
    """
    changing = [i for i, same in enumerate(handed_on) if not same]
    traits = [first[i].traits for i in changing]
    while True:
        carry = list(first)
        for i, x in zip(changing, _axes_alone([first[i] for i in changing], equation, traits), strict=True):
            carry[i] = x
        results = step(carry)
        following = [results[i] for i in changing]
        kept = [own & x.traits for own, x in zip(traits, following, strict=True)]
        _unite_all([carry[i] for i in changing], _axes_alone(following, equation), equation.because(_CHANGES))
        if kept == traits:
            return carry, results
        # The numbers of a later step lack traits of the first, so what was concluded from these is void.
        traits = kept


def _axes_alone(
    values: Sequence[Value], equation: Equation, traits: Sequence[Traits] | None = None
) -> list[Value]:
    """Drop all that is known of some values beside their axes, and beside `traits` if these are given.

    It need not hold for the value at every step or in every branch: a carry may be constant at the first step
    of a loop and vary later.
    """
    for value in values:
        value.pin_named(equation.because("positions along it are carried through the program"))
    known = traits or [NO_TRAITS] * len(values)
    return [Value(value, value.context, traits=own) for value, own in zip(values, known, strict=True)]


def _unite_all(first: Sequence[Dims], second: Sequence[Dims], reason: str) -> None:
    for x, y in zip(first, second, strict=True):
        for a, b in zip(x, y, strict=True):
            unite(a, b, reason)
