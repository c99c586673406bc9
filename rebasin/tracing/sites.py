"""Finds the activation sites of every group, and the layers, in a traced network.

*Activation sites.* A value carries a group if one of its axes, or a factor of one, belongs to the group. Many
values carry the same group: the output of a convolution, the same after its bias, after its norm, after the
ReLU, after pooling. To compare the units of two networks by what they do, one has to choose among these
values. The ones to choose from are the activation sites of the group. A value is an activation site if

1. it depends on the inputs of the network;
2. it was computed there, by a contraction or by an operation on each position. A value that was only moved,
   joined, cut, selected from or pooled is not: the values that it was made of are sites in its place. Nor is
   a value that was computed from pooled values alone;
3. a contraction reads it, directly or after it was moved, flattened, selected from or pooled. Usually that is
   the next layer, or a product inside attention. A statistic that is combined with the value again, such as
   the mean in a norm or the sum in a softmax, does not count as reading.

Two rules cover groups without such a value. A row that the inputs look up in a table, such as an embedding,
is a site of a group that has no other site. A group that has no value as in 3 has one site, the last value
that satisfies 1 and 2.

The sites of a group stand in the order of the program, so the last one is the value behind the group's last
nonlinearity and before pooling or flattening: the ReLU before a max pool, the last norm of a transformer
before its mean, the product of a gated unit, the output of attention for heads and for the dimensions of
values. A site inside a ``scan`` is read at all steps, a site inside a ``while`` loop at the last step. A site
in a branch of a ``cond`` is read where that branch is taken, and is zero elsewhere.

*Layers.* A layer is a contraction of a value that depends on the inputs with a weight, which is a value that
depends on the parameters and not on the inputs. A contraction behind a choice of platform, or with a
derivative of its own, is one layer as a whole.

What a primitive does to a value (moves, reduces, pools, contracts, or computes) stands in the table of rules,
`rebasin.inference.rule`. The walk through the program is one of its own, as `rebasin.inference.programs`
explains.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core

from rebasin.axis import Axis, iter_blocks
from rebasin.inference.programs import called_program, iter_equations, open_program
from rebasin.inference.rule import Effect, find_effect
from rebasin.tracing.layers import AffineEpilogues, Layer
from rebasin.tracing.program import Address, Axes, Program

__all__ = ["ActivationSite", "Layer", "find_layers", "find_sites"]


class ActivationSite(NamedTuple):
    """A value at which the activations of a group are read.

    Attributes:
      address: address of the equation that computes the value.
      output: number of the value among the results of the equation.
      axes: axes of the value, those along which scans stack it first.
    """

    address: Address
    output: int
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return _shape(self.axes)


def find_sites(program: Program, groups: Sequence[str]) -> dict[str, tuple[ActivationSite, ...]]:
    """Find the activation sites of each group, in the order of the program.

    Args:
      program: the traced network.
      groups: names of groups of its spec.

    Returns:
      The sites by group; none for a group that only values without the inputs carry, as weights do.
    """
    candidates = _walk(program).candidates
    found: dict[str, tuple[ActivationSite, ...]] = {}
    for group in groups:
        computed = [at for at, candidate in candidates.items() if group in candidate.computed]
        read = [at for at in computed if group in candidates[at].read]
        chosen = [at for at in read if not candidates[at].looked_up] or read or computed[-1:]
        found[group] = tuple(ActivationSite(*at, candidates[at].axes) for at in chosen)
    return found


def find_layers(program: Program) -> tuple[Layer, ...]:
    """Find the layers of a network, in the order of the program."""
    return tuple(_walk(program).layers.values())


def _is_contraction(eqn: Any, data: Sequence[bool], weights: Sequence[bool]) -> bool:
    """Tell whether an equation contracts data, or wraps a contraction of data with one weight.

    Args:
      eqn: the equation.
      data: for each operand, whether it depends on the inputs.
      weights: for each operand, whether it depends on the parameters.
    """
    name = eqn.primitive.name
    if find_effect(name) == "contracts":
        return any(data)
    wraps = "branches_platforms" in eqn.params if name == "cond" else name.startswith("custom_vjp_call")
    return (
        wraps
        and len(eqn.outvars) == 1
        and sum(data) == 1
        and sum(weight and not own for weight, own in zip(weights, data, strict=True)) == 1
        and _holds_contraction(eqn)
    )


def _holds_contraction(eqn: Any) -> bool:
    """Tell whether a branch or a called program of an equation holds a contraction outside of loops."""
    programs = eqn.params["branches"] if eqn.primitive.name == "cond" else [called_program(eqn)]
    return any(
        find_effect(inner.primitive.name) == "contracts"
        for program in programs
        if program is not None
        for inner in iter_equations(program, loops=False)
    )


class _Provenance(NamedTuple):
    """Where a value comes from.

    Attributes:
      data: whether it depends on the inputs.
      weight: whether it depends on the parameters.
      leaf: path name of the leaf that it is, possibly moved, whole or in part.
      origins: the candidates that it is, possibly moved or pooled, whole or in part.
      pooled: the groups that it carries only after a pooling or a selection.
      sliced: the scans that hand out a slice of it at each step.
    """

    data: bool = False
    weight: bool = False
    leaf: str | None = None
    origins: frozenset[tuple[Address, int]] = frozenset()
    pooled: frozenset[str] = frozenset()
    sliced: frozenset[Address] = frozenset()

    def merge(self, other: "_Provenance") -> "_Provenance":
        """Return the provenance of a value that may be either of two values."""
        if self.data and other.data:
            pooled = self.pooled & other.pooled
        else:
            pooled = self.pooled if self.data else other.pooled
        leaf = self.leaf if self.leaf == other.leaf else None
        origins, sliced = self.origins | other.origins, self.sliced | other.sliced
        return _Provenance(
            self.data or other.data, self.weight or other.weight, leaf, origins, pooled, sliced
        )


class _EnclosingLoop(NamedTuple):
    """A loop around an equation.

    Attributes:
      address: address of the loop.
      axis: the axis along which a scan stacks what its steps compute; `None` for a ``while`` loop.
      length: number of steps of a scan; 1 for a ``while`` loop.
    """

    address: Address
    axis: Axis | None
    length: int


class _SiteCandidate(NamedTuple):
    """A value that satisfies the first two conditions of an activation site.

    Attributes:
      axes: axes of the value, those along which scans stack it first.
      computed: the groups for which it satisfies these conditions.
      read: the groups for which a contraction reads it; filled in by the walk.
      looked_up: whether it is a row looked up in a table.
    """

    axes: Axes
    computed: frozenset[str]
    read: set[str]
    looked_up: bool


def _walk(program: Program) -> "_Walk":
    """Walk through a program from its first equation to its last."""
    walk = _Walk(program)
    weights = [_Provenance(weight=True, leaf=leaf) for leaf in program.leaves]
    inputs = [_Provenance(data=True) for _ in program.closed.jaxpr.invars[len(weights) :]]
    walk.run(program.closed, [*weights, *inputs], (), ())
    return walk


class _Walk:
    """One walk through a program, which collects candidates for sites, and layers.

    The body of a loop is walked until the provenance of the carry no longer changes.

    Attributes:
      program: the program.
      candidates: the candidates for activation sites, by address of the equation and number of the result.
      layers: the layers, by address.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.candidates: dict[tuple[Address, int], _SiteCandidate] = {}
        self.layers: dict[Address, Layer] = {}

    def run(
        self,
        closed: Any,
        inputs: Sequence[_Provenance],
        address: Address,
        loops: tuple[_EnclosingLoop, ...],
    ) -> list[_Provenance]:
        """Walk through the program at an address, given the provenance of its inputs; return its outputs'."""
        jaxpr, _ = open_program(closed)
        env = dict.fromkeys(jaxpr.constvars, _Provenance()) | dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Provenance:
            return _Provenance() if isinstance(atom, core.Literal) else env[atom]

        epilogues = AffineEpilogues(jaxpr)
        for i, eqn in enumerate(jaxpr.eqns):
            here, operands = (*address, i), [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, operands, here, loops), strict=True))
            layer = epilogues.follow(eqn, here, [x.data for x in operands], self.layers.get(here))
            if layer is not None:
                self.layers[layer.address] = layer
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: Any, operands: list[_Provenance], here: Address, loops: tuple[_EnclosingLoop, ...]
    ) -> list[_Provenance]:
        """Return the provenance of the results of an equation; enter what is found there."""
        if _is_contraction(eqn, [x.data for x in operands], [x.weight for x in operands]):
            self._enter_layer(operands, here, loops)
            self._read(operands, here)
            return self._computed(operands, here, loops, fresh=True)
        name = eqn.primitive.name
        if name == "scan" and self._knows(eqn.params["jaxpr"], (*here, 0)):
            return self._scan(eqn, operands, here, loops)
        if name == "while" and self._knows(eqn.params["body_jaxpr"], (*here, 1)):
            return self._while(eqn, operands, here, loops)
        # A choice of platform is not entered: all its branches compute the same.
        if name == "cond" and "branches_platforms" not in eqn.params:
            branches = [(program, (*here, k)) for k, program in enumerate(eqn.params["branches"])]
            if all(self._knows(program, at) for program, at in branches):
                return self._branches(branches, operands, loops)
        called = called_program(eqn)
        if called is not None and self._knows(called, (*here, 0)):
            return self.run(called, operands, (*here, 0), loops)
        effect = find_effect(name)
        if effect in ("moves", "reduces", "pools"):
            return self._moved(effect, operands, here, loops)
        return self._computed(operands, here, loops, fresh=False)

    def _knows(self, program: Any, address: Address) -> bool:
        """Tell whether the axes of the values inside a program are known.

        They are not if the equation that holds it has no rule, or one that does not run the program. Then the
        equation is one operation as a whole.
        """
        return not open_program(program)[0].eqns or (*address, 0) in self.program.results

    def _computed(
        self, operands: list[_Provenance], here: Address, loops: tuple[_EnclosingLoop, ...], *, fresh: bool
    ) -> list[_Provenance]:
        """Return the results of an equation that computes; what it makes of pooled values alone is pooled.

        Args:
          operands: provenance of the operands.
          here: address of the equation.
          loops: the loops around it, the outermost first.
          fresh: whether the results count as computed even from pooled values, as those of contractions do.
        """
        data, weight = any(x.data for x in operands), any(x.weight for x in operands)
        found = []
        for output, axes in enumerate(self.program.results[here]):
            groups = self._groups(axes)
            pooled = frozenset() if fresh else frozenset(g for g in groups if self._pooled(g, operands, here))
            origins = frozenset()
            if pooled:
                origins = frozenset(at for x in operands for at in x.origins if x.pooled)
            if data:
                origins |= self._enter(here, output, axes, groups - pooled, loops)
            found.append(_Provenance(data, weight, None, origins, pooled))
        return found

    def _enter(
        self,
        here: Address,
        output: int,
        axes: Axes,
        groups: frozenset[str],
        loops: tuple[_EnclosingLoop, ...],
        *,
        looked_up: bool = False,
    ) -> frozenset[tuple[Address, int]]:
        """Make a value a candidate for `groups`, and return it as an origin; none without groups."""
        if not groups:
            return frozenset()
        known = self.candidates.get((here, output))
        stacked = (*(loop.axis for loop in loops if loop.axis is not None), *axes)
        self.candidates[here, output] = _SiteCandidate(
            stacked, groups, known.read if known else set(), looked_up
        )
        return frozenset({(here, output)})

    def _pooled(self, group: str, operands: list[_Provenance], here: Address) -> bool:
        """Tell whether all operands that depend on the inputs and carry a group are pooled for it."""
        carrying = [
            operand
            for operand, axes in zip(operands, self.program.operands[here], strict=True)
            if operand.data and group in self._groups(axes)
        ]
        return bool(carrying) and all(group in operand.pooled for operand in carrying)

    def _moved(
        self, effect: Effect, operands: list[_Provenance], here: Address, loops: tuple[_EnclosingLoop, ...]
    ) -> list[_Provenance]:
        """Return the results of an equation that moves, reduces or pools."""
        counts = [self._positions(axes) for axes in self.program.operands[here]]
        before: dict[str, int] = {}
        for operand, count in zip(operands, counts, strict=True):
            if operand.data:
                before |= {group: max(n, before.get(group, 0)) for group, n in count.items()}
        data, weight = any(x.data for x in operands), any(x.weight for x in operands)
        leaves = [x.leaf for x in operands if x.weight or x.data]
        sliced = frozenset(at for x in operands for at in x.sliced)
        moves = effect == "moves"
        found = []
        for output, axes in enumerate(self.program.results[here]):
            after = self._positions(axes)
            fewer = {g for g, n in after.items() if g in before and (n < before[g] or effect == "pools")}
            pooled = frozenset(
                g for g in after if g in fewer or (g in before and self._pooled(g, operands, here))
            )
            # Groups are new here if they come from a table that the inputs look up. A reduction that leaves a
            # group at as many positions as before, such as a maximum over the pieces of each unit, computes a
            # new value of that group.
            fresh = frozenset(after.keys() - pooled if not moves else after.keys() - pooled - before.keys())
            origins = frozenset()
            if moves or pooled:
                origins = frozenset(at for x in operands for at in x.origins)
            if data and fresh:
                origins |= self._enter(here, output, axes, fresh, loops, looked_up=moves)
            leaf = leaves[0] if moves and not data and len(leaves) == 1 else None
            found.append(_Provenance(data, weight, leaf, origins, pooled, sliced))
        return found

    def _read(self, operands: list[_Provenance], here: Address) -> None:
        """Enter that a contraction reads the candidates among its operands, for the groups they carry."""
        for operand, axes in zip(operands, self.program.operands[here], strict=True):
            for at in operand.origins:
                self.candidates[at].read.update(self._groups(axes))

    def _groups(self, axes: Axes) -> frozenset[str]:
        """Return the groups that a value carries."""
        return frozenset(itertools.chain.from_iterable(a.groups for a in axes)) - self.program.fixed

    def _positions(self, axes: Axes) -> dict[str, int]:
        """Count the positions at which a value carries each group; axes of other groups do not count."""
        counts: dict[str, int] = {}
        for block in iter_blocks(axes, _shape(axes)) if self._groups(axes) else ():
            moving = [None if label in self.program.fixed else label for label in block.labels]
            count = math.prod(n for n, label in zip(block.shape, moving, strict=True) if label is None)
            counts |= {label: max(count, counts.get(label, 0)) for label in moving if label is not None}
        return counts

    def _branches(
        self,
        branches: Sequence[tuple[Any, Address]],
        operands: list[_Provenance],
        loops: tuple[_EnclosingLoop, ...],
    ) -> list[_Provenance]:
        """Walk through every branch of a cond; its results may be those of any branch."""
        index, *rest = operands
        outcomes = [self.run(program, rest, address, loops) for program, address in branches]
        merged = [functools.reduce(_Provenance.merge, results) for results in zip(*outcomes, strict=True)]
        return [result._replace(data=result.data or index.data) for result in merged]

    def _scan(
        self, eqn: Any, operands: list[_Provenance], here: Address, loops: tuple[_EnclosingLoop, ...]
    ) -> list[_Provenance]:
        """Walk through the body of a scan until the provenance of the carry no longer changes."""
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        stacked = [axes[0] for axes in self.program.operands[here][num_consts + num_carry :]]
        stacked += [axes[0] for axes in self.program.results[here][num_carry:]]
        length = eqn.params["length"]
        axis = next((axis for axis in stacked if axis.groups), Axis.product(length))
        inside = (*loops, _EnclosingLoop(here, axis, length))
        carry = operands[num_consts : num_consts + num_carry]
        while True:
            slices = [x._replace(sliced=x.sliced | {here}) for x in operands[num_consts + num_carry :]]
            inputs = [*operands[:num_consts], *carry, *slices]
            results = self.run(eqn.params["jaxpr"], inputs, (*here, 0), inside)
            merged = [x.merge(y) for x, y in zip(carry, results[:num_carry], strict=True)]
            if merged == carry:
                return [*carry, *results[num_carry:]]
            carry = merged

    def _while(
        self, eqn: Any, operands: list[_Provenance], here: Address, loops: tuple[_EnclosingLoop, ...]
    ) -> list[_Provenance]:
        """Walk through the body of a while loop until the provenance of the carry no longer changes."""
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        inside = (*loops, _EnclosingLoop(here, None, 1))
        carry = operands[second:]
        while True:
            inputs = [*operands[first:second], *carry]
            results = self.run(eqn.params["body_jaxpr"], inputs, (*here, 1), inside)
            merged = [x.merge(y) for x, y in zip(carry, results, strict=True)]
            if merged == carry:
                return carry
            carry = merged

    def _enter_layer(
        self, operands: list[_Provenance], here: Address, loops: tuple[_EnclosingLoop, ...]
    ) -> None:
        """Enter a contraction as a layer if one operand is data and the other a weight."""
        data = [i for i, x in enumerate(operands) if x.data]
        weights = [i for i, x in enumerate(operands) if x.weight and not x.data]
        if len(data) != 1 or len(weights) != 1:
            return
        (axes,), weight_axes = self.program.results[here], self.program.operands[here][weights[0]]
        groups = self._groups(weight_axes)
        weight = operands[weights[0]]
        self.layers[here] = Layer(
            address=here,
            end=here,
            data=data[0],
            weight=weights[0],
            leaf=weight.leaf,
            axes=axes,
            channels=tuple(i for i, axis in enumerate(axes) if groups.intersection(axis.groups)),
            contracted=groups - self._groups(axes),
            repeats=math.prod(loop.length for loop in loops if loop.address not in weight.sliced),
            in_while=any(loop.axis is None for loop in loops),
        )


def _shape(axes: Axes) -> tuple[int, ...]:
    return tuple(axis.size or 0 for axis in axes)
