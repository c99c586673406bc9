"""Infers the permutation symmetries of a function from its jaxpr."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import rebasin.inference.rules  # noqa: F401  # registers every rule
from rebasin.axis import Axis, Factor, SizedFactor
from rebasin.errors import InferenceError
from rebasin.inference.axes import Node, pin, segments, unite
from rebasin.inference.indexing import Equations, find_indices
from rebasin.inference.interpreter import interpret
from rebasin.inference.rule import Equation, Rule, register_rule
from rebasin.inference.values import Dims, Value
from rebasin.spec import PermutationSpec, Pin
from rebasin.trees import is_below, leaf_table, state_leaves

__all__ = ["Equation", "Rule", "infer_spec", "register_rule"]


def infer_spec(
    function: Any,
    tree: Any,
    *inputs: Any,
    state_outputs: Mapping[str, str] | None = None,
    pin: Sequence[str] = (),
) -> PermutationSpec:
    """Finds which axes of which leaves can be permuted together without changing a function.

    The function is traced, never run, and its jaxpr is read equation by equation. Every axis of every value
    is an unknown permutation; each primitive's rule ties those that must be equal, reads reshaped axes as
    products and concatenated ones as segments, and pins what it does not cover. Inputs and outputs are
    pinned, so whatever is left unpinned in `tree` moves freely: the answer is sound by construction, and each
    pin keeps its reason.

    Args:
      function: ``function(tree, *inputs)``, any JAX function, for example a Flax model's ``apply``. Close
        over arguments that are not arrays (`functools.partial`).
      tree: the parameters, or their shapes (`jax.eval_shape`); usually Flax ``variables`` whole.
      *inputs: example inputs, or their shapes.
      state_outputs: outputs that are the next values of leaves of `tree` and move with them: path name of an
        output, or of a subtree of outputs, to that in `tree` (``{"1/batch_stats": "batch_stats"}`` for Flax'
        ``apply(…, mutable=["batch_stats"])``; ``""`` is the whole tree).
      pin: path names of leaves, or of subtrees, that are to stay put.

    Returns:
      A spec for every leaf of `tree`, leaves in the order in which the function uses them. Groups are named
      after the first leaf that carries them; a second group of the same leaf gets ``#2``.

    Raises:
      InferenceError: the function cannot be traced with these arguments, or a leaf to be pinned is unknown.
      TreeMismatchError: `state_outputs` do not fit the function.

    Examples:
      >>> import jax.numpy as jnp
      >>> tree = {"w": jnp.ones((3, 8)), "b": jnp.ones((8,)), "v": jnp.ones((8, 2))}
      >>> print(infer_spec(lambda t, x: jnp.tanh(x @ t["w"] + t["b"][None]) @ t["v"], tree, jnp.ones((5, 3))))
      1 group, 3 leaves
        w: -, w
        b: w
        v: w, -
    """
    leaves = leaf_table(tree)
    try:
        closed, output_shapes = jax.make_jaxpr(function, return_shape=True)(tree, *inputs)
    except (TypeError, ValueError) as error:
        raise InferenceError(f"the function cannot be traced: {error}") from error
    avals = [var.aval for var in closed.jaxpr.invars]
    dims = [Value.of_leaf([Node(size) for size in aval.shape], aval.dtype) for aval in avals]
    for i, input_dims in enumerate(dims[len(leaves) :]):
        _pin_each(input_dims, f"meets an axis of input {i}")
    of_leaf = dict(zip(leaves, dims, strict=False))
    _pin_by_name(of_leaf, pin)

    uses = _Uses()
    # A leaf is a value of its own: one that a loop takes apart is no operand of any equation as a whole.
    equations: list[Sequence[Value]] = [(leaf_dims,) for leaf_dims in of_leaf.values()]

    def observe(operands: Sequence[Value], results: Sequence[Value]) -> None:
        for operand in operands:
            uses.note(operand)
        equations.append((*operands, *results))

    outputs = interpret(closed, dims, observe)
    state = state_leaves(state_outputs or {}, output_shapes, tree)
    for i, (path, output_dims) in enumerate(zip(leaf_table(output_shapes), outputs, strict=True)):
        if path in state:
            for node, next_node in zip(of_leaf[state[path]], output_dims, strict=True):
                unite(node, next_node, f"output {path} has other factors than {state[path]}")
        else:
            _pin_each(output_dims, f"reaches an axis of output {i}")
        output_dims.pin_named(f"output {i} names positions along it")
        for fold in output_dims.folds:
            fold.open()
        uses.note(output_dims)  # a leaf that is itself an output is used although no equation reads it
    for leaf_dims in of_leaf.values():
        if uses.rank(leaf_dims) == math.inf:
            _pin_each(leaf_dims, "the function does not use this leaf")
    order = sorted(of_leaf, key=lambda path: uses.rank(of_leaf[path]))
    return _to_spec({path: of_leaf[path] for path in order}, equations)


def _pin_by_name(of_leaf: Mapping[str, Dims], names: Sequence[str]) -> None:
    unknown = [name for name in names if not any(is_below(path, name) for path in of_leaf)]
    if unknown:
        raise InferenceError(f"cannot pin {unknown}: no such leaves; the tree has {list(of_leaf)}")
    for path, dims in of_leaf.items():
        if any(is_below(path, name) for name in names):
            _pin_each(dims, "pinned by the caller")


def _pin_each(dims: Dims, reason: str) -> None:
    for node in dims:
        pin(node, reason, mixed=False)


class _Uses:
    """The order in which leaves are first used, told by their axes: a loop strips the first of them."""

    def __init__(self) -> None:
        self.seen: dict[Node, int] = {}

    def note(self, dims: Dims) -> None:
        """Enters an operand."""
        for node in dims:
            self.seen.setdefault(node, len(self.seen))

    def rank(self, dims: Dims) -> float:
        """When a leaf was first used; infinity if it never was, and for a scalar, which has no axes."""
        return min((self.seen[node] for node in dims if node in self.seen), default=math.inf)


def _to_spec(of_leaf: Mapping[str, Dims], equations: Equations) -> PermutationSpec:
    """Names the groups and writes the axes of every leaf."""
    table = _settled(of_leaf)
    names: dict[Node, str] = {}
    for path, axes in table.items():
        fresh = [
            factor
            for axis in axes
            for segment in axis
            for factor in segment
            if not factor.is_pinned and factor.root not in names
        ]
        numbers = itertools.count(2)
        for i, node in enumerate(dict.fromkeys(node.root for node in fresh)):
            later = (f"{path}#{n}" for n in numbers)
            names[node] = path if i == 0 else next(name for name in later if name not in of_leaf)
    index = find_indices([[value.unfolded for value in values] for values in equations], list(names))
    # An axis that stays gets a name where it is the index of a group.
    fixed = dict.fromkeys(node for nodes in index.values() for node in nodes if node.is_pinned)
    labels = names | {node: f"index_{i}" for i, node in enumerate(fixed)}
    indexed = tuple((names[group], tuple(labels[node] for node in nodes)) for group, nodes in index.items())
    leaves = tuple((path, tuple(_axis(axis, labels) for axis in axes)) for path, axes in table.items())
    pins = tuple(
        Pin(path, i, reason)
        for path, axes in table.items()
        for i, axis in enumerate(axes)
        for reason in dict.fromkeys(f.reason for segment in axis for f in segment if f.reason is not None)
    )
    return PermutationSpec(leaves, indexed, tuple(labels[node] for node in fixed), pins)


def _settled(of_leaf: Mapping[str, Dims]) -> dict[str, list[list[list[Node]]]]:
    """Segments of every axis, once writing one of them pins nothing more."""
    while True:
        before = [node.is_pinned for dims in of_leaf.values() for node in _parts(dims)]
        table = {path: [segments(node) for node in dims] for path, dims in of_leaf.items()}
        if before == [node.is_pinned for dims in of_leaf.values() for node in _parts(dims)]:
            return table


def _parts(nodes: Dims) -> list[Node]:
    """All nodes and their parts, at every depth."""
    found = []
    for node in nodes:
        found += [node, *_parts(node.parts)]
    return found


def _axis(axis: list[list[Node]], names: dict[Node, str]) -> Axis:
    """An axis of the spec: neighbouring pinned factors, and neighbouring pinned segments, become one."""
    parts: list[list[SizedFactor]] = []
    for segment in axis:
        factors: list[SizedFactor] = []
        for node in segment:
            group = names.get(node.root)
            if group is None and factors and factors[-1].group is None:
                factors[-1] = SizedFactor(factors[-1].size * node.size, None)
            elif node.size > 1 or len(segment) == 1:
                factors.append(SizedFactor(node.size, group))
        if parts and _stays(parts[-1]) and _stays(factors):
            parts[-1] = [SizedFactor(parts[-1][0].size + factors[0].size, None)]
        else:
            parts.append(factors)
    if len(parts) == 1 and len(parts[0]) == 1:
        return Axis.whole(parts[0][0].group)
    return Axis(tuple(tuple(Factor(*factor) for factor in segment) for segment in parts))


def _stays(segment: list[SizedFactor]) -> bool:
    return len(segment) == 1 and segment[0].group is None
