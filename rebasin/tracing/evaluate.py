"""Evaluates a jaxpr equation by equation, with a hook at chosen equations, however deep they lie.

`rebasin.inference.programs` says which other readers of jaxprs there are, and why.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from rebasin.inference.programs import bind, called_program, open_program
from rebasin.tracing.program import Address

__all__ = ["Hook", "evaluate"]

# For each address with a hook, what to hand to the hook there.
_Extras = Mapping[Address, Any]


class Hook(Protocol):
    """A function that is called in place of an equation."""

    def __call__(self, address: Address, eqn: Any, operands: Sequence[Any], extra: Any, /) -> tuple[Any, Any]:
        """Return the results of the equation, as a list, and whatever is to be handed out."""
        ...


def evaluate(
    closed: Any, inputs: Sequence[Any], hook: Hook, extras: _Extras
) -> tuple[list[Any], dict[Address, Any]]:
    """Run a program and call a hook at some of its equations.

    Programs inside calls (``jit``, ``remat``, custom derivatives) are run as part of the whole, scans and
    conditionals as scans and conditionals. What a hook hands out inside a scan comes back stacked along a
    first axis of steps. A branch that is not taken hands out zeros. A while loop hands out what its last step
    did, or zeros if there was none.

    Args:
      closed: a closed jaxpr, or a jaxpr without constants.
      inputs: the inputs of the program.
      hook: the function to call at each address in `extras`.
      extras: what to hand to the hook at each address: `None`, or a tree of arrays that are stacked along the
        steps of every scan around the equation, as results are.

    Returns:
      The outputs, and what the hook handed out at each address.
    """
    return _run(closed, inputs, hook, extras, ())


def _run(
    closed: Any, inputs: Sequence[Any], hook: Hook, extras: _Extras, address: Address
) -> tuple[list[Any], dict[Address, Any]]:
    """Run the program at an address; the addresses of `extras` all lie in it."""
    jaxpr, consts = open_program(closed)
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    handed_out: dict[Address, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        here = (*address, i)
        operands = [read(atom) for atom in eqn.invars]
        inside = {at: extra for at, extra in extras.items() if at[: len(here)] == here}
        with eqn.ctx.manager:
            if here in extras:
                results, handed_out[here] = hook(here, eqn, operands, extras[here])
            elif inside:
                results, out = _run_inside(eqn, operands, hook, inside, here)
                handed_out |= out
            else:
                results = bind(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars], handed_out


def _run_inside(
    eqn: Any, operands: Sequence[Any], hook: Hook, extras: _Extras, here: Address
) -> tuple[list[Any], dict[Address, Any]]:
    """Run an equation that holds a program with hooks inside."""
    forms: dict[str, Callable[..., Any]] = {"scan": _scan, "while": _while, "cond": _cond}
    if eqn.primitive.name in forms:
        return forms[eqn.primitive.name](eqn, operands, hook, extras, here)
    return _run(called_program(eqn), operands, hook, extras, (*here, 0))


def _scan(
    eqn: Any, operands: Sequence[Any], hook: Hook, extras: _Extras, here: Address
) -> tuple[list[Any], dict[Address, Any]]:
    params = eqn.params
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]

    def step(carry: Any, slices: Any) -> Any:
        sequences, extra = slices
        results, out = _run(params["jaxpr"], [*consts, *carry, *sequences], hook, extra, (*here, 0))
        return results[:num_carry], (results[num_carry:], out)

    slices = (list(operands[num_consts + num_carry :]), dict(extras))
    final, (stacked, out) = lax.scan(
        step, list(carry), slices, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*final, *stacked], out


def _while(
    eqn: Any, operands: Sequence[Any], hook: Hook, extras: _Extras, here: Address
) -> tuple[list[Any], dict[Address, Any]]:
    params = eqn.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = operands[: split[0]], operands[split[0] : split[1]]

    def condition(state: Any) -> Any:
        return _run(params["cond_jaxpr"], [*cond_consts, *state[0]], hook, {}, (*here, 0))[0][0]

    def body(state: Any) -> Any:
        return _run(params["body_jaxpr"], [*body_consts, *state[0]], hook, extras, (*here, 1))

    carry = list(operands[split[1] :])
    _, out = jax.eval_shape(lambda carry: body((carry, None)), carry)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)
    return lax.while_loop(condition, body, (carry, nothing))


def _cond(
    eqn: Any, operands: Sequence[Any], hook: Hook, extras: _Extras, here: Address
) -> tuple[list[Any], dict[Address, Any]]:
    def branch(k: int) -> Callable[..., Any]:
        inside = {at: at[: len(here) + 1] == (*here, k) for at in extras}

        def run(extras: _Extras, *values: Any) -> Any:
            own = {at: extra for at, extra in extras.items() if inside[at]}
            return _run(eqn.params["branches"][k], values, hook, own, (*here, k))

        return run

    index, *values = operands
    runs = [branch(k) for k in range(len(eqn.params["branches"]))]
    shapes: dict[Address, Any] = {}
    for run in runs:
        shapes |= jax.eval_shape(run, dict(extras), *values)[1]

    def padded(run: Callable[..., Any]) -> Callable[..., Any]:
        def complete(*arguments: Any) -> Any:
            results, out = run(*arguments)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return results, nothing | out

        return complete

    return lax.switch(index, [padded(run) for run in runs], dict(extras), *values)
