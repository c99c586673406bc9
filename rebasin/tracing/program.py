"""A traced function whose every value knows which of its axes belong to which group of a spec."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.axis import Axis, Factor, SizedFactor
from rebasin.errors import InferenceError, problem_list
from rebasin.inference.axes import Node, concatenate, pin, pinned, product
from rebasin.inference.interpreter import interpret
from rebasin.inference.rule import Value
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table

__all__ = ["Address", "Axes", "Program", "Static", "trace_program"]

# Where an equation stands: equation i of the program is (i,), equation j of the k-th program inside it is
# (i, k, j), and so on.
Address: TypeAlias = tuple[int, ...]

Axes: TypeAlias = tuple[Axis, ...]  # one for each axis of a value, as the axes of a leaf in a spec

# Axes that fall into more segments than this carry no labels.
_MAX_SEGMENTS = 256


class Program(NamedTuple):
    """A function traced for trees and batches of given shapes.

    Attributes:
      closed: its jaxpr, a function of the leaves of the tree and then of those of the batch.
      leaves: path names of the leaves of the tree.
      operands: axes of each operand of each equation.
      results: axes of each result of each equation. These know the size of every part, whole axes included.
      fixed: labels that never move, and only serve as an index.
      outputs: structure of what the function returns.
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
    """Traces a function and labels the axes of its values with the groups of a spec.

    The program of the same spec, function and shapes is remembered, so that a function is traced once.

    Args:
      spec: the groups; it must be one that the trace confirms, as what `infer_spec` returns is.
      apply_fn: ``(params, *inputs) -> outputs``.
      params: parameters, or their shapes.
      *inputs: the inputs of a batch, or their shapes.
      precision: of the products for which the function sets none; `None` leaves it to JAX.

    Returns:
      The program.

    Raises:
      SpecMismatchError: the tree does not fit the spec.
      InferenceError: the function cannot be traced with these arguments, or ties or pins what the spec lets
        move.
    """
    spec.group_sizes(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), (params, inputs))
    leaves, structure = jax.tree.flatten(shapes)
    return _trace(spec, Static(apply_fn), tuple(leaves), structure, precision)


class Static:
    """A function as a static argument of ``jit``: equal to itself, and to equal ones if it has a hash."""

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
    function: Static,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
    precision: str | None,
) -> Program:
    tree, batch = jax.tree.unflatten(structure, shapes)
    leaves, inputs = leaf_table(tree), leaf_table(batch[0] if len(batch) == 1 else batch)
    try:
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
            closed, returned = jax.make_jaxpr(function.function, return_shape=True)(tree, *batch)
    except (TypeError, ValueError) as error:
        described = ", ".join(f"{path or 'batch'} {x.dtype}{list(x.shape)}" for path, x in inputs.items())
        raise InferenceError(f"the function cannot be traced with {described}: {error}") from error

    lengths = _lengths(spec, {path: np.shape(leaf) for path, leaf in leaves.items()})
    nodes = {group: Node(length) for group, length in lengths.items()}
    for group in spec.fixed:
        pin(nodes[group], "the spec keeps it as an index", mixed=False)
    table = spec.table
    dims = [
        Value.of_leaf([_node(axis, n, nodes) for axis, n in zip(table[path], x.shape, strict=True)], x.dtype)
        for path, x in leaves.items()
    ]
    for path, x in inputs.items():
        reason = f"an axis of the batch{path and ' at '}{path}"
        dims.append(Value((pinned(n, reason, mixed=False) for n in np.shape(x)), frozenset()))
    seen: dict[Address, tuple[Sequence[Value], Sequence[Value]]] = {}

    def locate(address: Address, operands: Sequence[Value], results: Sequence[Value]) -> None:
        seen[address] = operands, results

    interpret(closed, dims, locate=locate)
    _check_groups(spec, nodes)
    labels = {nodes[group].root: group for group in reversed((*spec.groups, *spec.fixed))}
    cache: dict[Node, Axis] = {}

    def axes(values: Iterable[Value]) -> tuple[Axes, ...]:
        return tuple(tuple(_labelled(node, labels, cache) for node in value) for value in values)

    return Program(
        closed,
        tuple(leaves),
        {address: axes(operands) for address, (operands, _) in seen.items()},
        {address: axes(results) for address, (_, results) in seen.items()},
        frozenset(spec.fixed),
        jax.tree.structure(returned),
    )


def _lengths(spec: PermutationSpec, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The number of positions of each group, those that never move included."""
    return {
        factor.group: factor.size
        for path, axes in spec.leaves
        for axis, length in zip(axes, shapes[path], strict=True)
        for factor in itertools.chain.from_iterable(axis.sized(length))
        if factor.group is not None
    }


def _node(axis: Axis, length: int, nodes: Mapping[str, Node]) -> Node:
    """An axis of a leaf, made of the nodes of its groups; what the spec keeps is pinned."""

    def part(factor: SizedFactor) -> Node:
        if factor.group is not None:
            return nodes[factor.group]
        return pinned(factor.size, "the spec keeps it", mixed=False)

    return concatenate([product([part(factor) for factor in segment]) for segment in axis.sized(length)])


def _check_groups(spec: PermutationSpec, nodes: Mapping[str, Node]) -> None:
    """Whether every group is still free, and a group of its own; single positions do not matter."""
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
    root = node.root
    if root not in cache:
        cache[root] = Axis(
            tuple(tuple(Factor(*factor) for factor in segment) for segment in _segments(root, labels))
        )
    return cache[root]


def _segments(node: Node, labels: Mapping[Node, str]) -> list[list[SizedFactor]]:
    """The parts of a node with their labels; one part without a label where they cannot be written so."""
    root = node.root
    if root in labels or not root.parts:
        return [[SizedFactor(root.size, labels.get(root))]]
    parts = [_segments(part, labels) for part in root.parts]
    if root.form == "sum":
        return list(itertools.chain.from_iterable(parts))
    unlabelled = [[SizedFactor(root.size, None)]]
    result: list[list[SizedFactor]] = [[]]
    for inner in parts:
        if len(inner) == 1:
            result = [segment + inner[0] for segment in result]
            continue
        # Concatenated axes inside a product: written once for each position outside.
        copies = sum(math.prod(factor.size for factor in segment) for segment in result)
        if any(factor.group for segment in result for factor in segment):
            return unlabelled
        if copies * len(inner) > _MAX_SEGMENTS:
            return unlabelled
        result = [list(segment) for _ in range(copies) for segment in inner]
    return result
