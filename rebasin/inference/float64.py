"""Rewrites a program so that it computes in float64 and complex128, whatever types it names.

A model that computes in bfloat16 says so in many places: in conversions, in the result types of products, in
constants, in the carries of its loops. Given wider arguments it would still round at each of them, or could
not be traced at all. So the model is traced with its own types, and its jaxpr is rewritten equation by
equation: every floating value becomes wider, and with it the types among the parameters of each equation and
the programs inside it. Random bits, integers and booleans stay as they are.

`rebasin.inference.programs` says which other readers of jaxprs there are, and why.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rebasin.inference.programs import bind, called_program, is_program, open_program

__all__ = ["Float64Program", "NativeEquation", "as_float64", "rewrite_in_float64"]


class NativeEquation(NamedTuple):
    """An equation that computes in the model's own types even in the rewritten program.

    Attributes:
      primitive: name of the primitive, for example a callback.
      dtype: the narrowest floating type among the operands, to which they are rounded.
    """

    primitive: str
    dtype: np.dtype


class Float64Program(NamedTuple):
    """A program in float64.

    Attributes:
      closed: the closed jaxpr.
      native: the equations that still round to the model's own types.
    """

    closed: Any
    native: tuple[NativeEquation, ...]


def as_float64(x: Any, dtype: Any) -> Any:
    """Convert an array to the widest type of the kind of `dtype`: float64, complex128, or `dtype` itself.

    Arrays of an opaque type, such as PRNG keys, are returned as they are.
    """
    return x if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(x, _widest(dtype))


def rewrite_in_float64(closed: Any) -> Float64Program:
    """Rewrite a program in float64; rewrite and run it under ``jax.enable_x64(True)``.

    Args:
      closed: a closed jaxpr.

    Returns:
      The program, which takes and returns float64 where the given one has any floating type, and complex128
      where that has any complex type.
    """
    native: list[NativeEquation] = []
    return Float64Program(_rewrite(closed, native), tuple(dict.fromkeys(native)))


def _widest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    return np.dtype(np.complex128) if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _rewrite(program: Any, native: list[NativeEquation]) -> Any:
    """Return a program in float64 as a closed jaxpr; enter what stays in the model's own types."""
    avals = [var.aval for var in open_program(program)[0].invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, _widest(aval.dtype)) for aval in avals]
    return jax.make_jaxpr(lambda *inputs: _run(program, inputs, native))(*shapes)


def _run(program: Any, inputs: Sequence[Any], native: list[NativeEquation]) -> list[Any]:
    """Evaluate a program in float64."""
    jaxpr, consts = open_program(program)
    env: dict[Any, Any] = {
        var: as_float64(const, var.aval.dtype) for var, const in zip(jaxpr.constvars, consts, strict=True)
    }
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        if not isinstance(atom, core.Literal):
            return env[atom]
        aval: Any = atom.aval
        # NumPy's scalars become literals again, arrays would become constants.
        return np.dtype(_widest(aval.dtype)).type(atom.val)

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            results = _evaluate(eqn, [read(atom) for atom in eqn.invars], native)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(eqn: Any, operands: list[Any], native: list[NativeEquation]) -> list[Any]:
    """Evaluate an equation in float64 if its primitive allows that, else in the model's own types."""
    if eqn.primitive.name == "reduce_precision":
        return operands
    called = called_program(eqn)
    inside: list[NativeEquation] = []
    try:
        if called is not None:
            results = _run(called, operands, inside)
        else:
            params = {name: _rewrite_parameter(name, value, inside) for name, value in eqn.params.items()}
            results = bind(eqn, operands, params)
    except Exception:  # every primitive refuses types in a way of its own
        results = []
    wanted = [(var.aval.shape, _widest(var.aval.dtype)) for var in eqn.outvars]
    if [(x.shape, x.dtype) for x in results] == wanted:
        native += inside
        return results
    return _evaluate_natively(eqn, operands, native)


def _evaluate_natively(eqn: Any, operands: list[Any], native: list[NativeEquation]) -> list[Any]:
    """Evaluate an equation in the model's own types, as for example a cast between floats and bits needs."""
    rounded = []
    for atom, x in zip(eqn.invars, operands, strict=True):
        dtype = atom.aval.dtype
        rounded.append(jnp.asarray(x, dtype) if _is_inexact(dtype) else x)
    narrow = [atom.aval.dtype for atom in eqn.invars if _is_inexact(atom.aval.dtype)]
    if narrow:
        native.append(NativeEquation(eqn.primitive.name, max(narrow, key=lambda x: jnp.finfo(x).eps)))
    results = bind(eqn, rounded)
    return [as_float64(x, var.aval.dtype) for x, var in zip(results, eqn.outvars, strict=True)]


def _rewrite_parameter(name: str, value: Any, native: list[NativeEquation]) -> Any:
    """Replace floating types and programs in a parameter of an equation."""
    if isinstance(value, np.dtype):
        return _widest(value)
    if name == "precision":
        return None  # a precision may name the types of a product
    leaves = jax.tree.leaves(value, is_leaf=is_program)
    if not any(map(is_program, leaves)):
        return value
    return jax.tree.map(
        lambda x: _rewrite_inner(x, native) if is_program(x) else x, value, is_leaf=is_program
    )


def _rewrite_inner(program: Any, native: list[NativeEquation]) -> Any:
    """Rewrite a program among the parameters of an equation, as a closed or an open jaxpr like the given."""
    closed = _rewrite(program, native)
    if hasattr(program, "jaxpr"):
        return closed
    if closed.consts:
        raise ValueError("an open jaxpr has no place for constants")  # so the equation is evaluated natively
    return closed.jaxpr
