"""The places of a program that matter: the values that carry a group, and the layers.

*Sites.* A value carries a group if one of its axes, or a part of one, is the group's. It is a site if

1. it depends on the batch;
2. it was computed there: by a contraction or an operation on each position, as opposed to a value that was
   only moved, joined, cut, selected from or pooled (its sites are those it was made of), or that comes
   from pooled values alone;
3. a contraction reads it, directly or after moving, flattening, selecting or pooling: the next layer's, or
   that of attention. A statistic that is combined with the value again, as those of norms and of a softmax
   are, does not count as reading.

A row of a table looked up by the batch, such as an embedding, carries a group that has no other site; and
a group that nothing reads as in 3 is carried by its last value. Sites stand in the order of the program.
The last one is thus the group's value after its last nonlinearity, before pooling or flattening: the ReLU
before a max pool, the last norm of a transformer before its mean, the product of a gated unit, attention's
output for heads and for the dimensions of values. A value inside a `scan` carries at all steps; inside a
``while`` loop, at the last one; in a branch, where that is taken, and is zero elsewhere.

*Layers.* A layer is a contraction of a value that depends on the batch with a weight: a value that does not.
A contraction behind a choice of platform, or with a derivative of its own, is one layer as a whole.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core

from rebasin.axis import Axis, iter_blocks
from rebasin.tracing.evaluate import inner_program
from rebasin.tracing.layers import Layer, Tails
from rebasin.tracing.program import Address, Axes, Program

__all__ = [
    "Site",
    "Layer",
    "MOVES",
    "REDUCTIONS",
    "WINDOWS",
    "Walk",
    "find_sites",
    "find_layers",
    "is_contraction",
    "walk",
]


_CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})


# What moves positions without computing anything.
MOVES = frozenset(
    {
        *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "tile", "pad", "rev", "copy"),
        *("concatenate", "stack", "unstack", "split", "slice", "dynamic_slice", "dynamic_update_slice"),
        *("gather", "scatter", "convert_element_type", "reduce_precision", "stop_gradient", "name", "copy_p"),
        *("sharding_constraint", "optimization_barrier", "device_put"),
    }
)


REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"}
)


WINDOWS = frozenset(
    {
        *("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window", "sort", "top_k"),
        *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "argmax", "argmin", "approx_top_k"),
        *("select_and_gather_add", "select_and_scatter_add", "scatter-add", "scatter-mul", "scatter-max"),
        *("scatter-min", "scatter-sub"),
    }
)


def is_contraction(eqn: Any, data: Sequence[bool], weights: Sequence[bool]) -> bool:
    """Whether an equation is a contraction of data, or wraps one of data with one weight.

    Args:
      eqn: the equation.
      data: which of its operands depend on the batch.
      weights: which of them depend on the tree.
    """
    if eqn.primitive.name in _CONTRACTIONS:
        return any(data)
    if eqn.primitive.name == "cond":
        wraps = "branches_platforms" in eqn.params
    else:
        wraps = eqn.primitive.name.startswith("custom_vjp_call")
    return (
        wraps
        and len(eqn.outvars) == 1
        and sum(data) == 1
        and sum(weight and not own for weight, own in zip(weights, data, strict=True)) == 1
        and _holds_contraction(eqn)
    )


def _holds_contraction(eqn: Any) -> bool:
    if eqn.primitive.name in _CONTRACTIONS:
        return True
    programs = eqn.params["branches"] if eqn.primitive.name == "cond" else [inner_program(eqn)]
    return any(
        _holds_contraction(inner)
        for program in programs
        if program is not None
        for inner in getattr(program, "jaxpr", program).eqns
    )


class Site(NamedTuple):
    """A value that carries groups.

    Attributes:
      address: the equation that computes it.
      output: which of its results.
      axes: axes of the value, those that scans stack it along first.
    """

    address: Address
    output: int
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return _shape(self.axes)


def walk(program: Program) -> "Walk":
    """Walks a program from its first equation to its last."""
    found = Walk(program)
    count = len(program.leaves)
    infos = [_Info(weight=True, leaf=leaf) for leaf in program.leaves]
    infos += [_Info(data=True) for _ in program.closed.jaxpr.invars[count:]]
    found.run(program.closed, infos, (), ())
    return found


class _Info(NamedTuple):
    """What is known of a value beside its axes.

    Attributes:
      data: whether it depends on the batch.
      weight: whether it depends on the tree.
      leaf: the leaf that it is, moved, whole or in part.
      origins: the candidates that it is, moved, whole or in part, or pooled.
      pooled: the groups that it carries after a pooling or a selection only.
      sliced: the scans that hand out a slice of it for each step.
    """

    data: bool = False
    weight: bool = False
    leaf: str | None = None
    origins: frozenset[tuple[Address, int]] = frozenset()
    pooled: frozenset[str] = frozenset()
    sliced: frozenset[Address] = frozenset()

    def merge(self, other: "_Info") -> "_Info":
        """What is known of a value that may be either."""
        if self.data and other.data:
            pooled = self.pooled & other.pooled
        else:
            pooled = self.pooled if self.data else other.pooled
        leaf = self.leaf if self.leaf == other.leaf else None
        origins, sliced = self.origins | other.origins, self.sliced | other.sliced
        return _Info(self.data or other.data, self.weight or other.weight, leaf, origins, pooled, sliced)


class _Loop(NamedTuple):
    """A loop around an equation: where it is, the axis along which a scan stacks, and how many steps it has.

    A ``while`` loop has no axis.
    """

    address: Address
    axis: Axis | None
    length: int


class _Candidate(NamedTuple):
    """A value that may be a site: its axes, and the groups for which it was computed, and read."""

    axes: Axes
    computed: frozenset[str]
    read: set[str]
    looked_up: bool


class Walk:
    """One walk through a program, in its order. Loop bodies are walked until nothing new is learnt."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.candidates: dict[tuple[Address, int], _Candidate] = {}
        self.layers: dict[Address, Layer] = {}

    def run(
        self, closed: Any, infos: Sequence[_Info], address: Address, loops: tuple[_Loop, ...]
    ) -> list[_Info]:
        """Walks one program."""
        jaxpr = getattr(closed, "jaxpr", closed)
        env = dict.fromkeys(jaxpr.constvars, _Info()) | dict(zip(jaxpr.invars, infos, strict=True))

        def read(atom: Any) -> _Info:
            return _Info() if isinstance(atom, core.Literal) else env[atom]

        tails = Tails(jaxpr)
        for i, eqn in enumerate(jaxpr.eqns):
            here, operands = (*address, i), [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, operands, here, loops), strict=True))
            layer = tails.follow(eqn, here, [info.data for info in operands], self.layers.get(here))
            if layer is not None:
                self.layers[layer.address] = layer
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: Any, operands: list[_Info], here: Address, loops: tuple[_Loop, ...]
    ) -> list[_Info]:
        name = eqn.primitive.name
        if is_contraction(eqn, [x.data for x in operands], [x.weight for x in operands]):
            self._enter_layer(operands, here, loops)
            self._read(operands, here)
            return self._computed(operands, here, loops, fresh=True)
        if name == "scan":
            return self._scan(eqn, operands, here, loops)
        if name == "while":
            return self._while(eqn, operands, here, loops)
        if name == "cond" and "branches_platforms" not in eqn.params:
            branches = enumerate(eqn.params["branches"])
            outcomes = [self.run(branch, operands[1:], (*here, k), loops) for k, branch in branches]
            merged = [functools.reduce(_Info.merge, infos) for infos in zip(*outcomes, strict=True)]
            return [info._replace(data=info.data or operands[0].data) for info in merged]
        if inner_program(eqn) is not None:
            return self.run(inner_program(eqn), operands, (*here, 0), loops)
        if name in MOVES or name in REDUCTIONS or name in WINDOWS:
            return self._moved(name, operands, here, loops)
        return self._computed(operands, here, loops, fresh=False)

    def _computed(
        self, operands: list[_Info], here: Address, loops: tuple[_Loop, ...], *, fresh: bool
    ) -> list[_Info]:
        """Results of an equation that computes; what it makes of pooled values alone stays pooled."""
        data, weight = any(x.data for x in operands), any(x.weight for x in operands)
        infos = []
        for output, axes in enumerate(self.program.results[here]):
            groups = self._groups(axes)
            pooled = frozenset() if fresh else frozenset(g for g in groups if self._pooled(g, operands, here))
            origins = frozenset()
            if pooled:
                origins = frozenset(at for x in operands for at in x.origins if x.pooled)
            if data:
                origins |= self._enter(here, output, axes, groups - pooled, loops)
            infos.append(_Info(data, weight, None, origins, pooled))
        return infos

    def _enter(
        self,
        here: Address,
        output: int,
        axes: Axes,
        groups: frozenset[str],
        loops: tuple[_Loop, ...],
        *,
        looked_up: bool = False,
    ) -> frozenset[tuple[Address, int]]:
        """Makes a value a candidate for `groups`."""
        if not groups:
            return frozenset()
        known = self.candidates.get((here, output))
        stacked = (*(loop.axis for loop in loops if loop.axis is not None), *axes)
        self.candidates[here, output] = _Candidate(stacked, groups, known.read if known else set(), looked_up)
        return frozenset({(here, output)})

    def _pooled(self, group: str, operands: list[_Info], here: Address) -> bool:
        """Whether all that brings a group here from the batch is pooled."""
        carrying = [
            info
            for info, axes in zip(operands, self.program.operands[here], strict=True)
            if info.data and group in self._groups(axes)
        ]
        return bool(carrying) and all(group in info.pooled for info in carrying)

    def _moved(
        self, name: str, operands: list[_Info], here: Address, loops: tuple[_Loop, ...]
    ) -> list[_Info]:
        """Results of an equation that moves, selects, reduces or pools."""
        counts = [self._positions(axes) for axes in self.program.operands[here]]
        before: dict[str, int] = {}
        for info, count in zip(operands, counts, strict=True):
            if info.data:
                before |= {group: max(n, before.get(group, 0)) for group, n in count.items()}
        data, weight = any(x.data for x in operands), any(x.weight for x in operands)
        leaves = [x.leaf for x in operands if x.weight or x.data]
        sliced = frozenset(at for x in operands for at in x.sliced)
        moves = name in MOVES
        infos = []
        for output, axes in enumerate(self.program.results[here]):
            after = self._positions(axes)
            fewer = {g for g, n in after.items() if g in before and (n < before[g] or name in WINDOWS)}
            pooled = frozenset(
                g for g in after if g in fewer or (g in before and self._pooled(g, operands, here))
            )
            # A table looked up with the batch is new to the groups it brings; and so is a reduction over
            # other groups, such as a maximum over pieces.
            fresh = frozenset(after.keys() - pooled if not moves else after.keys() - pooled - before.keys())
            origins = frozenset()
            if moves or pooled:
                origins = frozenset(at for x in operands for at in x.origins)
            if data and fresh:
                origins |= self._enter(here, output, axes, fresh, loops, looked_up=moves)
            leaf = leaves[0] if moves and not data and len(leaves) == 1 else None
            infos.append(_Info(data, weight, leaf, origins, pooled, sliced))
        return infos

    def _read(self, operands: list[_Info], here: Address) -> None:
        """Notes that a contraction reads the candidates among its operands, for the groups they bring."""
        for info, axes in zip(operands, self.program.operands[here], strict=True):
            for at in info.origins:
                self.candidates[at].read.update(self._groups(axes))

    def _groups(self, axes: Axes) -> frozenset[str]:
        """The groups that a value carries."""
        return frozenset(itertools.chain.from_iterable(a.groups for a in axes)) - self.program.fixed

    def _positions(self, axes: Axes) -> dict[str, int]:
        """For each group of a value, at how many positions it is carried; other groups do not count."""
        counts: dict[str, int] = {}
        for block in iter_blocks(axes, _shape(axes)) if self._groups(axes) else ():
            moving = [None if label in self.program.fixed else label for label in block.labels]
            count = math.prod(n for n, label in zip(block.shape, moving, strict=True) if label is None)
            counts |= {label: max(count, counts.get(label, 0)) for label in moving if label is not None}
        return counts

    def _scan(self, eqn: Any, operands: list[_Info], here: Address, loops: tuple[_Loop, ...]) -> list[_Info]:
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        stacked = [axes[0] for axes in self.program.operands[here][num_consts + num_carry :]]
        stacked += [axes[0] for axes in self.program.results[here][num_carry:]]
        length = eqn.params["length"]
        axis = next((axis for axis in stacked if axis.groups), Axis.product(length))
        inside = (*loops, _Loop(here, axis, length))
        carry = operands[num_consts : num_consts + num_carry]
        while True:
            slices = [x._replace(sliced=x.sliced | {here}) for x in operands[num_consts + num_carry :]]
            infos = [*operands[:num_consts], *carry, *slices]
            results = self.run(eqn.params["jaxpr"], infos, (*here, 0), inside)
            merged = [x.merge(y) for x, y in zip(carry, results[:num_carry], strict=True)]
            if merged == carry:
                return [*carry, *results[num_carry:]]
            carry = merged

    def _while(self, eqn: Any, operands: list[_Info], here: Address, loops: tuple[_Loop, ...]) -> list[_Info]:
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        carry = operands[second:]
        while True:
            infos = [*operands[first:second], *carry]
            results = self.run(eqn.params["body_jaxpr"], infos, (*here, 1), (*loops, _Loop(here, None, 1)))
            merged = [x.merge(y) for x, y in zip(carry, results, strict=True)]
            if merged == carry:
                return carry
            carry = merged

    def _enter_layer(self, operands: list[_Info], here: Address, loops: tuple[_Loop, ...]) -> None:
        data = [i for i, info in enumerate(operands) if info.data]
        weights = [i for i, info in enumerate(operands) if info.weight and not info.data]
        if len(data) != 1 or len(weights) != 1:
            return
        (axes,), weight = self.program.results[here], self.program.operands[here][weights[0]]
        own = self._groups(weight)
        channels = tuple(i for i, axis in enumerate(axes) if own.intersection(axis.groups))
        info = operands[weights[0]]
        repeats = math.prod(loop.length for loop in loops if loop.address not in info.sliced)
        in_while = any(loop.axis is None for loop in loops)
        contracted = own - self._groups(axes)
        self.layers[here] = Layer(
            here, here, data[0], weights[0], info.leaf, axes, channels, contracted, repeats, in_while
        )


def _shape(axes: Axes) -> tuple[int, ...]:
    return tuple(sum(math.prod(f.size or 0 for f in segment) for segment in axis.segments) for axis in axes)


def find_sites(program: Program, groups: Sequence[str]) -> dict[str, tuple[Site, ...]]:
    """The sites of each group, as the module's docstring defines them; none for a group without."""
    found_in = walk(program)
    found: dict[str, tuple[Site, ...]] = {}
    for group in groups:
        computed = [at for at, candidate in found_in.candidates.items() if group in candidate.computed]
        read = [at for at in computed if group in found_in.candidates[at].read]
        chosen = [at for at in read if not found_in.candidates[at].looked_up] or read or computed[-1:]
        found[group] = tuple(Site(*at, found_in.candidates[at].axes) for at in chosen)
    return found


def find_layers(program: Program) -> tuple[Layer, ...]:
    """The layers in the order of the program."""
    return tuple(walk(program).layers.values())
