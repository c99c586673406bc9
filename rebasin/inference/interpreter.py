"""Reads a jaxpr equation by equation and keeps the axes of every value."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rebasin.inference.axes import Node, pin, pinned
from rebasin.inference.registry import Dims, Equation, find_rule

__all__ = ["interpret"]

# Frames inside these packages are not what the user wrote.
_LIBRARIES = tuple(os.sep + name + os.sep for name in ("jax", "jaxlib", "flax", "equinox", "haiku"))


def interpret(
    closed: Any,
    inputs: Sequence[Dims],
    on_use: Callable[[Dims], None] = lambda dims: None,
    caller: str | None = None,
) -> list[Dims]:
    """Runs a program on axes in place of values.

    Args:
      closed: a closed jaxpr, or a jaxpr without constants.
      inputs: axes of each input.
      on_use: called with the axes of each operand as it is used, in the order of the program.
      caller: source line of the equation that holds this program, for programs that lie in a library.

    Returns:
      Axes of each output.
    """
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "jaxpr") else (closed, ())
    env: dict[Any, Dims] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    # Programs of a library (`jax.nn.relu`) are traced once, and name the line of whoever called them first.
    in_library = _is_library(str(getattr(jaxpr.debug_info, "func_src_info", "")))

    def read(atom: Any) -> Dims:
        return _constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        line = caller if caller is not None and in_library else _source_line(eqn) or caller
        run = functools.partial(_run, on_use=on_use, caller=line)
        operands = [read(atom) for atom in eqn.invars]
        shapes = tuple(tuple(var.aval.shape) for var in eqn.outvars)
        where = f"{eqn.primitive.name} ({line})" if line else eqn.primitive.name
        equation = Equation(eqn.primitive.name, eqn.params, shapes, where, run)
        rule = find_rule(equation.primitive)
        if not _holds_programs(equation):
            for dims in operands:
                on_use(dims)
        outputs = _pin_all(equation, operands) if rule is None else rule(equation, *operands)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(
    inner: Any, operands: Sequence[Dims], *, on_use: Callable[[Dims], None], caller: str | None
) -> list[Dims]:
    return interpret(inner, operands, on_use, caller)


def _holds_programs(equation: Equation) -> bool:
    return any("jaxpr" in name or name == "branches" for name in equation.params)


def _pin_all(equation: Equation, operands: Sequence[Dims]) -> list[Dims]:
    """What happens to a primitive without a rule: nothing that it touches may move."""
    reason = equation.because("this primitive has no rule")
    for dims in operands:
        for node in dims:
            pin(node, reason)
    return [tuple(pinned(size, reason) for size in shape) for shape in equation.shapes]


def _constant(value: Any) -> Dims:
    """Axes of a constant: free where it does not vary along the axis, else pinned."""
    shape = np.shape(value)
    if not shape:
        return ()
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return tuple(pinned(size, "a constant of an opaque type") for size in shape)
    array = np.asarray(value)
    nodes = []
    for axis, size in enumerate(shape):
        varies = size > 1 and not (array == array.take([0], axis=axis)).all()
        nodes.append(pinned(size, "a constant array varies along it") if varies else Node(size))
    return tuple(nodes)


def _source_line(eqn: Any) -> str | None:
    """The user's file and line that an equation comes from, for example ``model.py:12``."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not _is_library(frame.file_name) and not frame.file_name.startswith("<"):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return None


def _is_library(file_name: str) -> bool:
    return any(library in file_name for library in _LIBRARIES)
