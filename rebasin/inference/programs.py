"""The programs that an equation of a jaxpr holds: found by the equation's parameters, whatever its rule.

Five readers of jaxprs use these functions, and remain apart because each needs something else of a program:

- `interpreter.interpret` runs on axes in place of values, equation by equation, and leaves it to the rule of
  an equation which of its programs run, and on what;
- `rebasin.tracing.evaluate` runs on arrays, and has to rebuild loops and branches as such;
- the walk in `rebasin.tracing.sites` follows where values come from. It needs the final groups of all axes,
  which are known only when the whole program has been interpreted, and walks a loop's body until nothing
  changes;
- `rebasin.inference.float64` runs on arrays too, but replaces types on its way, also in the programs that
  equations hold, and so rebuilds the equations themselves;
- `iter_equations` only enumerates equations, for questions such as "does it hold a product?".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval

__all__ = [
    "bind",
    "called_program",
    "inner_programs",
    "is_program",
    "iter_equations",
    "live_program",
    "open_program",
    "program_of_call",
]

# Primitives whose programs are loops or branches. A scan without sequences would pass for a call otherwise.
_LOOPS = frozenset({"scan", "while"})
_CONTROL = _LOOPS | {"cond"}

# The program of a `shard_map` names the axes of a mesh, so it cannot run outside of it, even on one device.
_NOT_CALLS = _CONTROL | {"shard_map"}

# The parameter that holds the program of a call, in whatever version of JAX.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call", "callee")


def open_program(program: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split a closed jaxpr, or a jaxpr without constants, into the jaxpr and the values of its constants."""
    return (program.jaxpr, tuple(program.consts)) if hasattr(program, "jaxpr") else (program, ())


def is_program(x: Any) -> bool:
    """Return whether a parameter of an equation is a program: a closed jaxpr, or a jaxpr."""
    return hasattr(x, "eqns")


def bind(eqn: Any, operands: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
    """Evaluate one equation as it is, or with other parameters."""
    prepared = eqn.primitive.get_bind_params(dict(eqn.params if params is None else params))
    # Older versions of JAX return the functions among the parameters separately.
    functions, prepared = prepared if isinstance(prepared, tuple) else ((), prepared)
    results = eqn.primitive.bind(*functions, *operands, **prepared)
    return list(results) if eqn.primitive.multiple_results else [results]


def live_program(closed: Any) -> Any:
    """Return a program without the equations that no output depends on, in the programs inside it too.

    Args:
      closed: a closed jaxpr.

    Returns:
      The closed jaxpr with all inputs, constants and outputs of the original.
    """
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, True, instantiate=True)
    return closed.replace(jaxpr=live)


def inner_programs(params: Mapping[str, Any]) -> list[Any]:
    """Return every program among the parameters of an equation: bodies, branches, reducers."""
    return [x for x in jax.tree.leaves(list(params.values()), is_leaf=is_program) if is_program(x)]


def program_of_call(params: Mapping[str, Any]) -> Any | None:
    """Return the program among the parameters of a call; `None` if none has a name that calls use."""
    return next((params[name] for name in _CALLED if name in params), None)


def called_program(eqn: Any) -> Any | None:
    """Return the program of an equation that runs it once on its own operands and returns its results.

    Such equations are ``jit``, ``remat``, composites, and functions with derivatives of their own. They are
    recognised by a program with the operands and results of the equation, since rules can be replaced.

    Args:
      eqn: the equation.

    Returns:
      The program; `None` for any other equation, loops, branches and `shard_map` included.
    """
    if eqn.primitive.name in _NOT_CALLS:
        return None
    program = program_of_call(eqn.params)
    if not is_program(program):
        return None
    jaxpr, _ = open_program(program)
    fits = _shapes(jaxpr.invars) == _shapes(eqn.invars) and _shapes(jaxpr.outvars) == _shapes(eqn.outvars)
    return program if fits else None


def iter_equations(program: Any, *, loops: bool = True) -> Iterator[Any]:
    """Iterate over the equations of a program and of all programs inside it.

    Args:
      program: a closed jaxpr, or a jaxpr.
      loops: whether to enter scans and while loops.

    Yields:
      The equations, those that hold programs included.
    """
    for eqn in open_program(program)[0].eqns:
        yield eqn
        if loops or eqn.primitive.name not in _LOOPS:
            for inner in inner_programs(eqn.params):
                yield from iter_equations(inner, loops=loops)


def _shapes(atoms: Any) -> list[Any]:
    return [getattr(atom.aval, "shape", None) for atom in atoms]
