"""Infers the permutation symmetries of a function from its jaxpr."""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import rebasin.inference.rules  # noqa: F401  # registers every rule
from rebasin.axis import Axis
from rebasin.errors import InferenceError
from rebasin.inference.axes import Node, atoms, factors, pin, reasons, unite, write_axis
from rebasin.inference.indexing import Equations, find_outer_groups
from rebasin.inference.interpreter import interpret
from rebasin.inference.programs import live_program
from rebasin.inference.rule import Equation, Rule, register_rule
from rebasin.inference.values import Dims, Value
from rebasin.roles import leaf_roles
from rebasin.spec import PermutationSpec, Pin
from rebasin.trees import is_below, leaf_table, state_leaves

__all__ = ["Equation", "Rule", "infer_spec", "register_rule"]


def infer_spec(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    state_outputs: Mapping[str, str] | None = None,
    pin: Sequence[str] = (),
) -> PermutationSpec:
    """Find which axes of which leaves can be permuted together without changing a function.

    The function is traced, never run, and its jaxpr is read equation by equation. Every axis of every value
    is an unknown permutation. Each primitive's rule unites axes that must be permuted alike, reads reshaped
    axes as products and concatenated ones as segments, and pins what it does not cover. Inputs and outputs
    are pinned too. So whatever is left unpinned in `params` moves freely: the answer is sound by
    construction, and every pin keeps its reason.

    Args:
      apply_fn: the function, called as ``apply_fn(params, *inputs)``: any JAX function, for example a Flax
        model's ``apply``. Bind arguments that are not arrays beforehand (`functools.partial`).
      params: the tree of parameters, or their shapes (`jax.eval_shape`); usually Flax ``variables`` whole.
      *inputs: example inputs, or their shapes.
      state_outputs: the outputs that are the next values of leaves of `params` and move with them: path name
        of an output, or of a subtree of outputs, to that in `params` (``{"1/batch_stats": "batch_stats"}``
        for Flax' ``apply(…, mutable=["batch_stats"])``; ``""`` is the whole tree).
      pin: path names of leaves, or of subtrees, that are to stay put.

    Returns:
      A spec for every leaf of `params`, with the leaves in the order in which the function uses them. Leaves
      that it does not use stay put, but for the state of an optimiser and averages of weights (``ema``): what
      has the shape and the end of the path name of one weight moves with that weight. Groups are named after
      the first leaf that carries them; a second group of the same leaf gets ``#2``.

    Raises:
      InferenceError: the function cannot be traced with these arguments, or a leaf to be pinned is unknown.
      TreeError: a leaf of `params` is neither an array nor a number.
      TreeMismatchError: `state_outputs` do not fit the function.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 8)), "b": jnp.ones((8,)), "v": jnp.ones((8, 2))}
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]
      >>> print(infer_spec(apply_fn, params, jnp.ones((5, 3))))
      1 group, 3 leaves
        w: -, w
        b: w
        v: w, -
    """
    paths = list(leaf_table(params))
    try:
        closed, output_shapes = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
    except Exception as error:  # whatever the function raises: Flax has errors of its own
        raise InferenceError(f"the function cannot be traced: {error}") from error
    closed = live_program(closed)
    values = []
    for i, aval in enumerate(var.aval for var in closed.jaxpr.invars):
        nodes = [Node(size) for size in aval.shape]
        is_leaf = i < len(paths)
        values.append(Value.of_leaf(nodes, aval.dtype) if is_leaf else Value(nodes, frozenset()))
        if not is_leaf:
            _pin_each(nodes, f"meets an axis of input {i - len(paths)}")
    of_leaf = dict(zip(paths, values, strict=False))
    _pin_by_name(of_leaf, pin)

    seen = _Observations(of_leaf.values())
    outputs = interpret(closed, values, seen.add)
    next_values = state_leaves(state_outputs or {}, output_shapes, params)
    output_of = dict(zip(leaf_table(output_shapes), outputs, strict=True))
    _tie_outputs(output_of, {path: (leaf, of_leaf[leaf]) for path, leaf in next_values.items()})
    seen.add_outputs(output_of, next_values)
    used = {path for path, value in of_leaf.items() if seen.first_use(value) < math.inf}
    followed = _followed_weights(params, used.union(next_values.values()))
    of_leaf |= {path: of_leaf[weight] for path, weight in followed.items()}
    used = {path for path, value in of_leaf.items() if seen.first_use(value) < math.inf}
    _pin_unused(of_leaf, used, set(next_values.values()))
    _pin_unread(of_leaf.values(), seen)
    order = sorted(of_leaf, key=lambda path: seen.first_use(of_leaf[path]))
    return _to_spec({path: of_leaf[path] for path in order}, seen.equations)


def _pin_by_name(of_leaf: Mapping[str, Dims], names: Sequence[str]) -> None:
    """Pin the leaves at or below some path names."""
    unknown = [name for name in names if not any(is_below(path, name) for path in of_leaf)]
    if unknown:
        raise InferenceError(f"cannot pin {unknown}: no such leaves; the tree has {list(of_leaf)}")
    for path, dims in of_leaf.items():
        if any(is_below(path, name) for name in names):
            _pin_each(dims, "pinned by the caller")


# Names of averages of weights, such as ``ema``, ``ema_params`` or ``params_ema``.
_EMA = re.compile(r"(^|[/_])ema(?=[/_])")


def _followed_weights(params: Any, others: Collection[str]) -> dict[str, str]:
    """Pair leaves that the function does not use with the weights that they belong to.

    These are leaves of an optimiser's state, such as moments of gradients, and averages of weights over the
    training (``ema``). They have the shape of their weight, and the end of its path name:
    ``opt_state/0/mu/Dense_0/kernel`` belongs to ``params/Dense_0/kernel``. Where two weights fit equally
    well, the leaf belongs to neither.

    Args:
      params: the tree, or its shapes.
      others: leaves whose axes are known from the function.

    Returns:
      The path name of the weight, by that of the leaf that belongs to it.
    """
    roles = leaf_roles(params)
    shapes = {path: np.shape(leaf) for path, leaf in leaf_table(params).items()}
    weights_by_end: dict[str, list[str]] = {}
    for path in (path for path in roles if roles[path] == "weight" and path in others):
        weights_by_end.setdefault(path.removesuffix("/value").rpartition("/")[2], []).append(path)
    found = {}
    for path, role in roles.items():
        if path in others or not (role == "optimiser state" or _EMA.search(path)):
            continue
        end = path.removesuffix("/value").rpartition("/")[2]
        fitting = [w for w in weights_by_end.get(end, ()) if shapes[w] == shapes[path]]
        lengths = [_common_end(path, weight) for weight in fitting]
        if fitting and lengths.count(max(lengths)) == 1:
            found[path] = fitting[lengths.index(max(lengths))]
    return found


def _common_end(one: str, other: str) -> int:
    """Count the components at the end of two path names that are equal."""
    pairs = zip(reversed(one.split("/")), reversed(other.split("/")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _pin_unused(of_leaf: Mapping[str, Dims], used: set[str], written: set[str]) -> None:
    """Pin the leaves that the function does not use.

    A leaf that is only written, such as a bias-corrected average, has the axes of its next value. Those that
    no used leaf carries stay put, since nothing tells what their positions mean.

    Args:
      of_leaf: axes of every leaf, tied to those of its next value if it has one.
      used: paths of the leaves that are read, or that are themselves outputs.
      written: paths of the leaves that have a next value.
    """
    carried = {node.root for path in used for node in _with_parts(of_leaf[path])}
    for path, dims in of_leaf.items():
        if path in used:
            continue
        nodes = [node for node in _with_parts(dims) if node.is_atomic] if path in written else dims
        _pin_each([node for node in nodes if node.root not in carried], "the function does not use this leaf")


def _with_parts(nodes: Iterable[Node]) -> list[Node]:
    """Return some nodes and their parts at every depth."""
    found = []
    for node in nodes:
        found += [node, *_with_parts(node.parts)]
    return found


def _pin_each(dims: Iterable[Node], reason: str) -> None:
    for node in dims:
        pin(node, reason, position_dependent=False)


def _pin_unread(leaves: Iterable[Value], seen: "_Observations") -> None:
    """Pin the positions of leaves that the program drops unread, as the end of a table that it reads in part.

    Another program, for inputs of another size, may read them, and nothing is known of what it does then.
    """
    read = seen.read_atoms()
    for leaf in leaves:
        for atom in frozenset().union(*map(atoms, leaf)) - read:
            if not atom.is_pinned:
                pin(atom, "nothing reads these positions for inputs of this size", position_dependent=False)


class _Observations:
    """What is seen while a program is interpreted: the values of every equation, and the uses of axes."""

    def __init__(self, leaves: Iterable[Value]) -> None:
        # A leaf counts as an equation of its own, since one that a loop takes apart is an operand of no
        # equation as a whole.
        self.equations: list[Sequence[Value]] = [(leaf,) for leaf in leaves]
        self._computing: list[tuple[Sequence[Value], Sequence[Value]]] = []
        self._first_use: dict[Node, int] = {}

    def add(self, operands: Sequence[Value], results: Sequence[Value], moves: bool) -> None:
        """Enter an equation; `moves` tells whether it only moves entries."""
        for operand in operands:
            self.use(operand)
        self.equations.append((*operands, *results))
        if not moves:
            self._computing.append((operands, results))

    def add_outputs(self, outputs: Mapping[str, Value], next_values: Collection[str]) -> None:
        """Enter the outputs of the program, which are read although no equation does it.

        A leaf that is itself an output is used too, but not one that is only handed on as its next value.
        """
        for path, value in outputs.items():
            if path not in next_values:
                self.use(value)
        self._computing.append((tuple(outputs.values()), ()))

    def read_atoms(self) -> set[Node]:
        """Return the roots of the nodes whose positions meet each other or reach an output.

        Each position of a value that still carries a node depends on that position of the node alone. So
        positions are read where the node ends: in an equation that computes, or in an output. Where it ends
        in an equation that only moves entries, as a slice does, they are dropped.
        """
        read: set[Node] = set()
        for operands, results in self._computing:
            ends = {node.root for value in operands for node in value.before_reshapes}
            ends -= {node.root for value in results for node in value.before_reshapes}
            if not all(node.is_pinned for node in ends):
                kept = {atom for value in results for node in value.before_reshapes for atom in atoms(node)}
                read |= {atom for node in ends for atom in atoms(node)} - kept
        return read

    def use(self, dims: Dims) -> None:
        """Enter a value that is used."""
        for node in dims:
            self._first_use.setdefault(node, len(self._first_use))

    def first_use(self, dims: Dims) -> float:
        """Return a number that orders leaves by first use; infinite for an unused leaf and for a scalar.

        Leaves are recognised by any of their axes, since a loop hands on slices without the first axis.
        """
        return min((self._first_use[node] for node in dims if node in self._first_use), default=math.inf)


def _tie_outputs(outputs: Mapping[str, Value], next_values: Mapping[str, tuple[str, Value]]) -> None:
    """Unite the outputs that are next values with their leaves, and pin all others.

    Args:
      outputs: value of each output, by path.
      next_values: path and value of the leaf whose next value an output is, by the path of the output.
    """
    for i, (path, output) in enumerate(outputs.items()):
        if path in next_values:
            leaf, value = next_values[path]
            for node, next_node in zip(value, output, strict=True):
                unite(node, next_node, f"output {path} has other factors than {leaf}")
        else:
            _pin_each(output, f"reaches an axis of output {i}")
        output.pin_named(f"output {i} names positions along it")
        output.resolve_reshapes()


def _to_spec(of_leaf: Mapping[str, Dims], equations: Equations) -> PermutationSpec:
    """Name the groups and write down the axes of every leaf."""
    names = _group_names(of_leaf)
    # The parts of a reshape that is still deferred are in no group, so values count as they were before it.
    before_reshapes = [[value.before_reshapes for value in values] for values in equations]
    outer = find_outer_groups(before_reshapes, list(names))
    # An axis that stays gets a name where it is an outer group.
    fixed = dict.fromkeys(node for nodes in outer.values() for node in nodes if node.is_pinned)
    labels = names | {node: f"index_{i}" for i, node in enumerate(fixed)}
    indexed = tuple((names[group], tuple(labels[node] for node in nodes)) for group, nodes in outer.items())
    leaves = tuple((path, tuple(_axis(node, labels) for node in dims)) for path, dims in of_leaf.items())
    pins = tuple(
        Pin(path, i, reason)
        for path, dims in of_leaf.items()
        for i, node in enumerate(dims)
        for reason in reasons(node)
    )
    return PermutationSpec(leaves, indexed, tuple(labels[node] for node in fixed), pins)


def _group_names(of_leaf: Mapping[str, Dims]) -> dict[Node, str]:
    """Name each group after the first leaf that carries it; later groups of a leaf are numbered from 2."""
    names: dict[Node, str] = {}
    for path, dims in of_leaf.items():
        roots = dict.fromkeys(f for node in dims for f in factors(node) if not f.is_pinned)
        numbers = itertools.count(2)
        for i, node in enumerate([root for root in roots if root not in names]):
            later = (f"{path}#{n}" for n in numbers)
            names[node] = path if i == 0 else next(name for name in later if name not in of_leaf)
    return names


def _axis(node: Node, labels: Mapping[Node, str]) -> Axis:
    """Write an axis of a leaf; one that is a single factor gets no size."""
    axis = write_axis(node, labels.get)
    return Axis.whole(next(axis.factors).group) if axis.is_whole else axis
