"""Traces a function and says of every value which of its axes belong to which group of a spec."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import Axis, SizedFactor
from rebasin.errors import InferenceError, problem_list
from rebasin.inference.axes import Node, concatenate, pin, pinned, product, write_axis
from rebasin.inference.interpreter import interpret
from rebasin.inference.programs import live_program
from rebasin.inference.values import Value
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table

__all__ = ["Address", "Axes", "Program", "Static", "trace_program"]

# Where an equation stands: equation i of the program is (i,), equation j of the k-th program inside it is
# (i, k, j), and so on.
Address: TypeAlias = tuple[int, ...]

Axes: TypeAlias = tuple[Axis, ...]  # one for each axis of a value, like the axes of a leaf in a spec


class Program(NamedTuple):
    """A function traced for parameters and inputs of given shapes.

    Attributes:
      closed: the closed jaxpr, a function of the leaves of the parameters and then of those of the inputs.
      leaves: path names of the leaves of the parameters.
      operands: axes of each operand, by the address of the equation.
      results: axes of each result, by the address of the equation. These know the size of every part, also of
        a part that is a whole axis.
      fixed: groups that never move, and only serve as outer groups.
      outputs: tree structure of what the function returns.
    """

    closed: Any
    leaves: tuple[str, ...]
    operands: Mapping[Address, tuple[Axes, ...]]
    results: Mapping[Address, tuple[Axes, ...]]
    fixed: frozenset[str]
    outputs: Any


def trace_program(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    precision: str | None = "highest",
) -> Program:
    """Trace a function and label the axes of its values with the groups of a spec.

    The program of the same spec, function and shapes is remembered, so that a function is traced once.

    Args:
      spec: the groups. The trace must confirm them, as it does for what `infer_spec` returns.
      apply_fn: the function, called as ``apply_fn(params, *inputs)``.
      params: the tree of parameters, or their shapes.
      *inputs: the inputs, or their shapes.
      precision: precision of the products for which the function sets none; `None` leaves it to JAX.

    Returns:
      The program.

    Raises:
      SpecMismatchError: the parameters do not fit the spec.
      InferenceError: the function cannot be traced with these arguments, or ties or pins what the spec lets
        move.
    """
    spec.group_sizes(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), (params, inputs))
    leaves, structure = jax.tree.flatten(shapes)
    return _trace(spec, Static(apply_fn), tuple(leaves), structure, precision)


class Static:
    """A function as a static argument of ``jit``; it equals any function that compares and hashes equal."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        try:
            self._hash = hash(function)
        except TypeError:
            self._hash = None

    def __hash__(self) -> int:
        return id(self.function) if self._hash is None else self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return NotImplemented
        return self.function is other.function or (self._hash is not None and self.function == other.function)


@functools.lru_cache(maxsize=64)
def _trace(
    spec: PermutationSpec,
    apply_fn: Static,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
    precision: str | None,
) -> Program:
    """Trace a program as `trace_program` does, from arguments that can be remembered."""
    params, inputs = jax.tree.unflatten(structure, shapes)
    closed, returned = _make_jaxpr(apply_fn.function, params, inputs, precision)
    nodes = _group_nodes(spec, params)
    values = [*_leaf_values(spec, params, nodes), *_input_values(inputs)]
    seen: dict[Address, tuple[Sequence[Value], Sequence[Value]]] = {}

    def locate(address: Address, operands: Sequence[Value], results: Sequence[Value]) -> None:
        seen[address] = operands, results

    interpret(closed, values, locate=locate)
    _check_groups(spec, nodes)
    # Where a later group has been united with an earlier one, the name of the earlier one counts.
    labels = {nodes[group].root: group for group in reversed((*spec.groups, *spec.fixed))}
    cache: dict[Node, Axis] = {}

    def axes(values: Iterable[Value]) -> tuple[Axes, ...]:
        return tuple(tuple(_labelled(node, labels, cache) for node in value) for value in values)

    return Program(
        closed,
        tuple(leaf_table(params)),
        {address: axes(operands) for address, (operands, _) in seen.items()},
        {address: axes(results) for address, (_, results) in seen.items()},
        frozenset(spec.fixed),
        jax.tree.structure(returned),
    )


def _make_jaxpr(
    apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], precision: str | None
) -> tuple[Any, Any]:
    """Return the closed jaxpr of a function, and the shapes of its outputs."""
    try:
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
            closed, returned = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
            return live_program(closed), returned
    except Exception as error:  # whatever the function raises: Flax has errors of its own
        described = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in _named(inputs).items())
        raise InferenceError(f"the function cannot be traced with {described}: {error}") from error


def _named(inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return the arrays of the inputs by a name for messages; a single array is called the batch."""
    if len(inputs) == 1:
        return {path or "batch": x for path, x in leaf_table(inputs[0]).items()}
    return {f"input {path}": x for path, x in leaf_table(inputs).items()}


def _group_nodes(spec: PermutationSpec, params: Any) -> dict[str, Node]:
    """Make a node for each group, and a pinned one for each group that never moves."""
    shapes = {path: np.shape(leaf) for path, leaf in leaf_table(params).items()}
    lengths = {
        factor.group: factor.size
        for path, axes in spec.leaves
        for axis, length in zip(axes, shapes[path], strict=True)
        for factor in axis.sized(length)
        if factor.group is not None
    }
    nodes = {group: Node(length) for group, length in lengths.items()}
    for group in spec.fixed:
        pin(nodes[group], "the spec keeps it as an outer group", position_dependent=False)
    return nodes


def _leaf_values(spec: PermutationSpec, params: Any, nodes: Mapping[str, Node]) -> list[Value]:
    """Make the value of each leaf, its axes composed of the nodes of their groups."""
    table = spec.table
    return [
        Value.of_leaf([_node(axis, n, nodes) for axis, n in zip(table[path], x.shape, strict=True)], x.dtype)
        for path, x in leaf_table(params).items()
    ]


def _input_values(inputs: tuple[Any, ...]) -> list[Value]:
    """Make the value of each input, its axes pinned."""
    return [
        Value(
            (pinned(n, f"meets an axis of {name}", position_dependent=False) for n in x.shape),
            frozenset(),
        )
        for name, x in _named(inputs).items()
    ]


def _node(axis: Axis, length: int, nodes: Mapping[str, Node]) -> Node:
    """Make the node of an axis of a leaf out of the nodes of its groups; what the spec keeps is pinned."""

    def part(factor: SizedFactor) -> Node:
        if factor.group is not None:
            return nodes[factor.group]
        return pinned(factor.size, "the spec keeps it", position_dependent=False)

    return axis.fold(length, part, product, concatenate)


def _check_groups(spec: PermutationSpec, nodes: Mapping[str, Node]) -> None:
    """Check that every group is still free and a group of its own; groups of one position do not matter."""
    owner: dict[Node, str] = {}
    problems = []
    for group in (group for group in spec.groups if nodes[group].size > 1):
        node = nodes[group]
        first = owner.setdefault(node.root, group)
        if node.reason is not None:
            problems.append(f"group {group!r} has to stay: {node.reason}")
        elif node.form != "whole":
            problems.append(f"group {group!r} is read as {node!r}, and moves as that only")
        elif first != group:
            problems.append(f"groups {first!r} and {group!r} move together")
    if problems:
        raise InferenceError(problem_list("the spec allows more than the function does:", problems))


def _labelled(node: Node, labels: Mapping[Node, str], cache: dict[Node, Axis]) -> Axis:
    """Write a node as an axis whose factors have the labels of their groups."""
    root = node.root
    if root not in cache:
        cache[root] = write_axis(root, labels.get, is_factor=lambda node: node in labels or not node.parts)
    return cache[root]
