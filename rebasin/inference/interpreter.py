"""Reads a jaxpr equation by equation, on axes in place of values.

`rebasin.inference.programs` says which other readers of jaxprs there are, and why.
"""

import functools
import itertools
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rebasin.inference.axes import Node, atoms, concatenate, pin, pinned
from rebasin.inference.programs import open_program
from rebasin.inference.rule import Equation, find_effect, find_rule, prepare
from rebasin.inference.static import evaluate_static, static_constant
from rebasin.inference.traits import is_wide_float, moved, of_array
from rebasin.inference.values import Dims, Number, Value
from rebasin.spec import NO_RULE

__all__ = ["Locate", "Observe", "interpret"]

# Called after an equation with its operands, its results, and whether it only moves entries.
Observe: TypeAlias = Callable[[Sequence[Value], Sequence[Value], bool], None]

# Called after an equation with its address, its operands and its results. Equation i of the program is at
# (i,); equation j of the k-th program that the rule of equation i runs is at (i, k, j), and so on.
Locate: TypeAlias = Callable[[tuple[int, ...], Sequence[Value], Sequence[Value]], None]

# A constant with more runs of equal entries than this is taken to vary everywhere, as a spec of so many
# segments helps nobody.
_MAX_RUNS = 64

# The user did not write what lies in these packages, so reasons never name its lines.
_LIBRARIES = tuple(os.sep + name + os.sep for name in ("jax", "jaxlib", "flax", "equinox", "haiku"))


def interpret(
    closed: Any,
    inputs: Sequence[Value],
    observe: Observe = lambda operands, results, moves: None,
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
        return _constant(atom.val) if isinstance(atom, core.Literal) else env[atom].renewed()

    for i, eqn in enumerate(jaxpr.eqns):
        line = caller if caller is not None and in_library else _source_line(eqn) or caller
        run = _Runner(observe, line, locate, (*address, i))
        operands = [read(atom) for atom in eqn.invars]
        shapes = tuple(tuple(var.aval.shape) for var in eqn.outvars)
        where = f"{eqn.primitive.name} ({line})" if line else eqn.primitive.name
        equation = Equation(eqn.primitive.name, eqn.params, shapes, where, run)
        rule = find_rule(equation.primitive)
        prepare(rule, operands, equation.because("positions along it are computed with"))
        varying = [node for value in operands for node in value.varying]
        outputs = _pin_all(equation, operands) if rule is None else rule(equation, *operands)
        results = _complete(eqn, operands, outputs, varying)
        if not run.has_run:
            results = [
                _with_static(value, eqn, operands, var.aval)
                for value, var in zip(results, eqn.outvars, strict=True)
            ]
            observe(operands, results, find_effect(equation.primitive) == "moves")
        if locate is not None:
            locate((*address, i), operands, results)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _complete(
    eqn: Any, operands: Sequence[Value], outputs: Sequence[Dims], varying: Sequence[Node]
) -> list[Value]:
    """Turn what a rule returned into values, with all that follows from the operands whatever the rule.

    Args:
      eqn: the equation.
      operands: its operands.
      outputs: what the rule returned.
      varying: the nodes that the operands say something about, from before the rule tied them to others.

    Returns:
      The value of each output.
    """
    context: frozenset[Node] = frozenset().union(*[value.context for value in operands if value.context])
    roots = {node.root for node in varying}
    moves = find_effect(eqn.primitive.name) == "moves"
    results = []
    for output, var in zip(outputs, eqn.outvars, strict=True):
        value = output if isinstance(output, Value) else Value(output)
        traits = value.traits
        if moves and not value.states_traits:
            traits = moved(eqn, operands, var.aval.dtype)
        tie_free = value.tie_free if value.tie_free and is_wide_float(var.aval.dtype) else ()
        results.append(
            Value(
                value,
                context if value.context is None else value.context,
                _constant_nodes(value, roots),
                abstract=value.abstract,
                tie_free=tie_free,
                traits=traits,
                deferred=value.deferred,
                static=value.static,
            )
        )
    return results


def _constant_nodes(value: Value, roots: Collection[Node]) -> list[Node]:
    """Find the nodes of a result, or of their parts, that no operand says anything about.

    By the sentence that every rule fulfils (see `rebasin.inference.rule.Rule`), permuting the operands along
    such a node permutes the result. But the operands stay what they are, so the result does too.

    Args:
      value: the result.
      roots: the roots of the nodes that the operands say something about.
    """
    if all(node.root in roots or node.is_pinned for node in value):
        return []
    varying = frozenset().union(*map(atoms, roots))
    # The parts of a reshape that is still deferred are those of its source.
    hidden = {node for reshape in value.deferred for node in (*reshape.parts, *atoms(reshape.source))}
    found: list[Node] = []
    for node in value:
        if not (node.root in varying or node.is_pinned):
            free = [a for a in atoms(node) if not (a in varying or a in hidden or a.is_pinned)]
            if free and node.parts and all(a in free or a.is_pinned for a in atoms(node)):
                found.append(node)
            found += free if node.parts else [node] * len(free)
    return found


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
            self.observe((), (value,), True)
        return results


def _pin_all(equation: Equation, operands: Sequence[Dims]) -> list[Dims]:
    """Pin all operands and results of a primitive without a rule: nothing that it touches may move."""
    reason = equation.where + NO_RULE
    for dims in operands:
        for node in dims:
            pin(node, reason)
    return [tuple(pinned(size, reason) for size in shape) for shape in equation.shapes]


def _constant(value: Any) -> Value:
    """Return the value of a constant: an axis is free if the constant does not vary along it, else pinned.

    Positions in a run of equal entries are free among themselves, and so are the two axes of an identity
    matrix if they are permuted alike.
    """
    shape = np.shape(value)
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.extended):
        why = "a constant of an opaque type"
        return Value((pinned(size, why) for size in shape), frozenset())
    array = np.asarray(value)
    traits = of_array(array)
    if not shape:
        is_real = array.dtype.kind in "iuf" or jnp.issubdtype(array.dtype, jnp.floating)
        number = Number(float(array)) if is_real else None
        return Value((), frozenset(), abstract=number, traits=traits, static=static_constant(array))
    if _is_identity(array):
        nodes = [Node(shape[0])] * 2
    else:
        nodes = [_constant_axis(array, axis) for axis in range(array.ndim)]
    free = [part for node in nodes for part in (node, *atoms(node)) if not part.is_pinned]
    return Value(nodes, frozenset(), free, traits=traits, static=static_constant(array))


def _constant_axis(array: np.ndarray, axis: int) -> Node:
    """Make the node of one axis of a constant: a sum of its runs of equal entries."""
    size, why = array.shape[axis], "a constant array varies along it"
    if size == 0 or (array == array.take([0], axis=axis)).all():
        return Node(size)
    along = np.moveaxis(array, axis, 0).reshape(size, -1)
    starts = [0, *(1 + np.flatnonzero((along[1:] != along[:-1]).any(axis=1)))]
    if len(starts) > _MAX_RUNS:
        return pinned(size, why, position_dependent=False)
    parts: list[Node] = []
    for start, stop in itertools.pairwise([*starts, size]):
        if stop - start > 1:
            parts.append(Node(stop - start))
        elif parts and parts[-1].is_pinned:
            parts[-1] = pinned(parts[-1].size + 1, why, position_dependent=False)
        else:
            parts.append(pinned(1, why, position_dependent=False))
    return concatenate(parts)


def _is_identity(array: np.ndarray) -> bool:
    """Tell whether a constant is a multiple of an identity matrix."""
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] < 2 or not array[0, 0]:
        return False
    return not array[0, 1] and np.array_equal(array, array[0, 0] * np.eye(len(array), dtype=array.dtype))


def _source_line(eqn: Any) -> str | None:
    """Return the user's file and line that an equation comes from, for example ``model.py:12``."""
    traceback = eqn.source_info.traceback
    return None if traceback is None else _line_of(traceback)


# Equations of the layers that a loop of the model builds have equal tracebacks.
@functools.lru_cache(maxsize=2**12)
def _line_of(traceback: Any) -> str | None:
    for frame in traceback.frames:
        if not _is_library(frame.file_name) and not frame.file_name.startswith("<"):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return None


@functools.lru_cache(maxsize=2**12)
def _is_library(file_name: str) -> bool:
    return any(library in file_name for library in _LIBRARIES)
