"""Reads a jaxpr equation by equation, on axes in place of values.

`rebasin.inference.programs` says which other readers of jaxprs there are, and why.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rebasin.inference.axes import Node, pin, pinned
from rebasin.inference.programs import open_program
from rebasin.inference.rule import Equation, find_rule, prepare
from rebasin.inference.static import evaluate_static, static_constant
from rebasin.inference.values import Dims, Number, Value
from rebasin.spec import NO_RULE

__all__ = ["Locate", "Observe", "interpret"]

# Called after an equation with its operands and its results.
Observe: TypeAlias = Callable[[Sequence[Value], Sequence[Value]], None]

# Called after an equation with its address, its operands and its results. Equation i of the program is at
# (i,); equation j of the k-th program that the rule of equation i runs is at (i, k, j), and so on.
Locate: TypeAlias = Callable[[tuple[int, ...], Sequence[Value], Sequence[Value]], None]

# The user did not write what lies in these packages, so reasons never name its lines.
_LIBRARIES = tuple(os.sep + name + os.sep for name in ("jax", "jaxlib", "flax", "equinox", "haiku"))


def interpret(
    closed: Any,
    inputs: Sequence[Value],
    observe: Observe = lambda operands, results: None,
    caller: str | None = None,
    locate: Locate | None = None,
    address: tuple[int, ...] = (),
) -> list[Value]:
    """Run a program on axes in place of values.

    Args:
      closed: a closed jaxpr, or a jaxpr without constants.
      inputs: the value of each input.
      observe: called with operands and results of each equation, in the order of the program. For an equation
        whose rule runs a program, it is called for the equations of that program instead, and for each input
        and output of the program by itself.
      caller: source line of the equation that holds this program, used where the program lies in a library.
      locate: called for every equation, whether or not it holds a program.
      address: address of the equation that holds this program and number of the program, for `locate`.

    Returns:
      The value of each output.
    """
    jaxpr, consts = open_program(closed)
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    # A jitted function of a library (`jax.nn.relu`) is traced once, so its equations name the line of the
    # first caller in this process. The line of the present caller is the one that helps.
    in_library = _is_library(str(getattr(jaxpr.debug_info, "func_src_info", "")))

    def read(atom: Any) -> Value:
        return _constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        line = caller if caller is not None and in_library else _source_line(eqn) or caller
        run = _Runner(observe, line, locate, (*address, i))
        operands = [read(atom) for atom in eqn.invars]
        shapes = tuple(tuple(var.aval.shape) for var in eqn.outvars)
        where = f"{eqn.primitive.name} ({line})" if line else eqn.primitive.name
        equation = Equation(eqn.primitive.name, eqn.params, shapes, where, run)
        rule = find_rule(equation.primitive)
        prepare(rule, operands, equation.because("positions along it are computed with"))
        outputs = _pin_all(equation, operands) if rule is None else rule(equation, *operands)
        context = frozenset(node for value in operands for node in value.context or ())
        results = [_complete(output, context) for output in outputs]
        if not run.has_run:
            results = [
                _with_static(value, eqn, operands, var.aval)
                for value, var in zip(results, eqn.outvars, strict=True)
            ]
            observe(operands, results)
        if locate is not None:
            locate((*address, i), operands, results)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _complete(output: Dims, context: frozenset[Node]) -> Value:
    """Turn what a rule returned into a value, in the context of the operands unless the rule sets one."""
    if not isinstance(output, Value):
        return Value(output, context)
    if output.context is not None:
        return output
    return Value(
        output,
        context,
        output.constant,
        abstract=output.abstract,
        tie_free=output.tie_free,
        deferred=output.deferred,
    )


def _with_static(value: Value, eqn: Any, operands: Sequence[Value], aval: Any) -> Value:
    """Return a result with its entries if they are static, and without those that a rule passed on."""
    entries = evaluate_static(eqn.primitive.name, eqn.params, operands, aval)
    return value if value.static is entries else value.with_static(entries)


class _Runner:
    """The `run` of one equation: it interprets programs, and remembers whether the rule asked for any."""

    def __init__(
        self,
        observe: Observe,
        caller: str | None,
        locate: Locate | None,
        address: tuple[int, ...],
    ) -> None:
        self.observe, self.caller, self.locate, self.address = observe, caller, locate, address
        self.count = 0

    @property
    def has_run(self) -> bool:
        """Tell whether any program was run."""
        return self.count > 0

    def __call__(self, inner: Any, operands: Sequence[Value]) -> list[Value]:
        address = (*self.address, self.count)
        self.count += 1
        results = interpret(inner, operands, self.observe, self.caller, self.locate, address)
        # A carry that a loop only hands on is an operand of no equation. Unless it is observed here, nothing
        # shows that it is one value at all steps.
        for value in (*operands, *results):
            self.observe((), (value,))
        return results


def _pin_all(equation: Equation, operands: Sequence[Dims]) -> list[Dims]:
    """Pin all operands and results of a primitive without a rule: nothing that it touches may move."""
    reason = equation.where + NO_RULE
    for dims in operands:
        for node in dims:
            pin(node, reason)
    return [tuple(pinned(size, reason) for size in shape) for shape in equation.shapes]


def _constant(value: Any) -> Value:
    """Return the value of a constant: an axis is free if the constant does not vary along it, else pinned."""
    shape, static = np.shape(value), static_constant(value)
    if not shape:
        is_real = any(jnp.issubdtype(jnp.result_type(value), kind) for kind in (jnp.integer, jnp.floating))
        return Value((), frozenset(), abstract=Number(float(value)) if is_real else None, static=static)
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return Value((pinned(size, "a constant of an opaque type") for size in shape), frozenset())
    array = np.asarray(value)
    nodes = []
    for axis, size in enumerate(shape):
        varies = size > 1 and not (array == array.take([0], axis=axis)).all()
        why = "a constant array varies along it"
        nodes.append(pinned(size, why, position_dependent=False) if varies else Node(size))
    return Value(nodes, frozenset(), (node for node in nodes if not node.is_pinned), static=static)


def _source_line(eqn: Any) -> str | None:
    """Return the user's file and line that an equation comes from, for example ``model.py:12``."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not _is_library(frame.file_name) and not frame.file_name.startswith("<"):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return None


def _is_library(file_name: str) -> bool:
    return any(library in file_name for library in _LIBRARIES)
