"""Specs: which axes of which leaves move together, as plain, hashable data."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from rebasin.axis import Axis, AxisLike, Factor, Segment
from rebasin.errors import SpecError, SpecMismatchError, problem_list
from rebasin.explanation import UnitShares, find_ties, measure_units
from rebasin.roles import RoleNames, leaf_roles
from rebasin.trees import leaf_table

__all__ = ["NO_RULE", "GroupSize", "PermutationSpec", "Pin"]

# The end of a pin's reason where a primitive without a rule caused it. The name of the primitive and the line
# of code stand before it, and `explain` counts these pins for each primitive.
NO_RULE = ": this primitive has no rule"

GroupSize: TypeAlias = int | tuple[int, ...]  # n, or (outer…, n) for an indexed group


class Pin(NamedTuple):
    """The reason why an axis of a leaf, or a part of it, stays put.

    Attributes:
      path: path name of the leaf.
      axis: number of the axis.
      reason: the reason as text.
    """

    path: str
    axis: int
    reason: str


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
    """The permutation symmetries of a network: which axes of which leaves move together.

    Axes that carry one group are permuted by one permutation. A spec covers every leaf of the tree that it
    was made for, also those that never move. It is hashable and so a legal static argument under ``jit``.
    Equality and hash include the names of groups; `equivalent` ignores them.

    Attributes:
      leaves: ``(path, axes)`` for each leaf, with paths as `rebasin.trees.path_name` writes them.
      indexed: ``(inner group, outer groups)`` for each inner group, which is permuted differently at each
        position of its outer groups; for example the dimensions of a head, at each head. Its permutation has
        shape ``[outer…, n]`` and is indexed by the *new* outer position, ``new[h, d] = old[outer[h], inner[h,
        d]]``.
      fixed: names of groups that never move and only serve as an outer group, for example stacked layers.
      pins: reasons why axes stay put. They do not count in equality, hash and digest.
    """

    leaves: tuple[tuple[str, tuple[Axis, ...]], ...]
    indexed: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fixed: tuple[str, ...] = ()
    pins: tuple[Pin, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        problems = list(_contradictions(self))
        if problems:
            raise SpecError(problem_list("the spec contradicts itself:", problems))

    @classmethod
    def from_axes(
        cls,
        table: Mapping[str, Sequence[AxisLike]],
        *,
        indexed: Mapping[str, Sequence[str]] | None = None,
        fixed: Sequence[str] = (),
    ) -> "PermutationSpec":
        """Make a spec from a table of leaves, as git-re-basin writes it.

        Args:
          table: path name of each leaf, with one entry for each of its axes: the name of a group, `None` for
            an axis that stays put, or an `Axis`.
          indexed: each inner group with its outer groups.
          fixed: groups that never move and only serve as an outer group.

        Returns:
          The spec.

        Raises:
          SpecError: the table contradicts itself; the message lists every case.

        Examples:
          >>> spec = PermutationSpec.from_axes({"in/kernel": (None, "P0"), "out/kernel": ("P0", None)})
          >>> spec.group_sizes({"in": {"kernel": np.ones((3, 8))}, "out": {"kernel": np.ones((8, 2))}})
          {'P0': 8}
        """
        wrong = ["the table must be a mapping from path name to axes"] * (not isinstance(table, Mapping))
        for path, axes in table.items() if not wrong else ():
            if not isinstance(path, str):
                wrong.append(f"{path!r}: a path name must be text, got a {type(path).__name__}")
            if isinstance(axes, str) or not isinstance(axes, Sequence):
                wrong.append(f"{path!r}: wanted a tuple with an entry for each axis, got {axes!r}")
            elif others := [x for x in axes if not (x is None or isinstance(x, str | Axis))]:
                wrong.append(f"{path!r}: an axis is a group, None or an Axis, got {others[0]!r}")
        if wrong:
            raise SpecError(problem_list("the table does not make a spec:", wrong))
        leaves = tuple(
            (path, tuple(axis if isinstance(axis, Axis) else Axis.whole(axis) for axis in axes))
            for path, axes in table.items()
        )
        pairs = tuple((group, tuple(outer)) for group, outer in (indexed or {}).items())
        return cls(leaves, pairs, tuple(fixed))

    @classmethod
    def from_groups(cls, groups: Mapping[str, Sequence[tuple[str, int]]], tree: Any) -> "PermutationSpec":
        """Make a spec from the axes of each group, the transposed form of git-re-basin's table.

        Args:
          groups: each group with its ``(path, axis)`` pairs; axes that no group names stay put.
          tree: the tree, or its shapes.

        Returns:
          The spec, which covers every leaf of `tree`.

        Raises:
          SpecError: an axis is named twice or is not in the tree; the message lists every case.

        Examples:
          >>> tree = {"w": np.ones((3, 8)), "v": np.ones((8, 2))}
          >>> print(PermutationSpec.from_groups({"P0": [("w", 1), ("v", 0)]}, tree))
          1 group, 2 leaves
            v: P0, -
            w: -, P0
        """
        ranks = {path: np.ndim(leaf) for path, leaf in leaf_table(tree).items()}
        named: dict[tuple[str, int], str] = {}
        problems = []
        for group, axes in groups.items():
            for path, axis in axes:
                if path not in ranks:
                    problems.append(f"group {group!r}: no leaf {path!r} in the tree")
                elif not 0 <= axis < ranks[path]:
                    problems.append(f"group {group!r}: {path} has {ranks[path]} axes, no axis {axis}")
                elif (path, axis) in named:
                    problems.append(
                        f"{path} axis {axis}: named by group {named[path, axis]!r} and by {group!r}"
                    )
                else:
                    named[path, axis] = group
        if problems:
            raise SpecError(problem_list("the groups do not make a spec:", problems))
        return cls.from_axes({path: [named.get((path, i)) for i in range(n)] for path, n in ranks.items()})

    @property
    def table(self) -> dict[str, tuple[Axis, ...]]:
        """The axes of each leaf, by path name."""
        return dict(self.leaves)

    @property
    def outer_groups(self) -> dict[str, tuple[str, ...]]:
        """The outer groups of each inner group."""
        return dict(self.indexed)

    @property
    def outward(self) -> tuple[str, ...]:
        """The groups that move, ordered so that outer groups come before their inner groups."""
        outer = self.outer_groups
        return tuple(sorted(self.groups, key=lambda group: len(outer.get(group, ()))))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that move, in the order in which the leaves name them."""
        seen = dict.fromkeys(g for _, axes in self.leaves for axis in axes for g in axis.groups)
        return tuple(group for group in seen if group not in self.fixed)

    def group_sizes(self, tree: Any, *, name: str = "params") -> dict[str, GroupSize]:
        """Check that the spec fits a tree, and return the sizes of its groups there.

        Args:
          tree: the tree, or its shapes (`jax.eval_shape`).
          name: what the message calls the tree.

        Returns:
          The size of each group, in the order of `groups`; for an inner group the shape ``(outer…, n)``.

        Raises:
          SpecMismatchError: the spec does not fit; the message lists every leaf and axis at fault.

        Examples:
          >>> spec = PermutationSpec.from_axes({"w": ("heads", "inner")}, indexed={"inner": ["heads"]})
          >>> spec.group_sizes({"w": np.ones((2, 3))})
          {'heads': 2, 'inner': (2, 3)}
        """
        shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaf_table(tree).items()}
        table = self.table
        sizes: dict[str, int] = {}
        origin: dict[str, str] = {}
        problems = []
        for path, axes in self.leaves:
            if path not in shapes:
                problems.append(f"{path}: no such leaf, but the spec says ({', '.join(map(str, axes))})")
            elif len(axes) != len(shapes[path]):
                problems.append(f"{path}: shape {shapes[path]}, but the spec has {len(axes)} axes")
            else:
                for i, (axis, length) in enumerate(zip(axes, shapes[path], strict=True)):
                    problems += _axis_problems(f"{path} axis {i}", axis, length, sizes, origin)
        problems += [
            f"{path}: shape {shape}, not in the spec" for path, shape in shapes.items() if path not in table
        ]
        if problems:
            raise SpecMismatchError(problem_list(f"the spec does not fit {name}:", problems))
        outer = self.outer_groups
        return {
            group: (*(sizes[o] for o in outer[group]), sizes[group]) if group in outer else sizes[group]
            for group in self.groups
        }

    def equivalent(self, other: "PermutationSpec") -> bool:
        """Return whether two specs describe the same symmetries of one tree, whatever they call the groups.

        Examples:
          >>> one, other = ({"w": (None, name), "b": (name,)} for name in ("P0", "hidden"))
          >>> PermutationSpec.from_axes(one).equivalent(PermutationSpec.from_axes(other))
          True
        """
        return _canonical(self) == _canonical(other)

    def to_json(self) -> str:
        """Return the spec as JSON text with a line for each leaf.

        The text has version 2 if a concatenation stands inside a product, which version 1 did not know.
        """
        leaves = [
            json.dumps([path, [_segments_to_lists(axis) for axis in axes]]) for path, axes in self.leaves
        ]
        version = 2 if any(_is_nested(axis) for _, axes in self.leaves for axis in axes) else 1
        rest = {"indexed": self.indexed, "fixed": self.fixed, "pins": self.pins}
        tail = "".join(f', "{key}": {json.dumps(value)}' for key, value in rest.items())
        return (
            f'{{"format": "rebasin.spec", "version": {version}, "leaves": [\n'
            + ",\n".join(leaves)
            + "\n]"
            + tail
            + "}\n"
        )

    @classmethod
    def from_json(cls, text: str) -> "PermutationSpec":
        """Return the spec that `to_json` wrote; raise `SpecError` for any other text.

        Examples:
          >>> spec = PermutationSpec.from_axes({"w": (None, "P0")})
          >>> PermutationSpec.from_json(spec.to_json()) == spec
          True
        """
        try:
            data = json.loads(text)
            if (data["format"], data["version"]) not in (("rebasin.spec", 1), ("rebasin.spec", 2)):
                raise SpecError(
                    f"wanted format rebasin.spec version 1 or 2, got {data['format']} {data['version']}"
                )
            leaves = tuple((path, tuple(map(_axis_of_lists, axes))) for path, axes in data["leaves"])
            indexed = tuple((group, tuple(outer)) for group, outer in data["indexed"])
            return cls(leaves, indexed, tuple(data["fixed"]), tuple(Pin(*pin) for pin in data["pins"]))
        except SpecError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise SpecError(f"not a saved spec: {error!r}") from error

    def save(self, path: str | pathlib.Path) -> None:
        """Write the spec to a file, as JSON."""
        pathlib.Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "PermutationSpec":
        """Read a spec that `save` wrote; raise `SpecError` for any other file."""
        try:
            return cls.from_json(pathlib.Path(path).read_text())
        except (SpecError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: {error}") from error

    @property
    def digest(self) -> str:
        """Hash of everything that counts in equality; a saved permutation names its spec by it."""
        return hashlib.sha256(dataclasses.replace(self, pins=()).to_json().encode()).hexdigest()

    def unit_shares(self, tree: Any) -> UnitShares:
        """Return the share of a network's units that move, that move in part, and that stay put.

        A number of a leaf moves if any of its axes does, so nearly all parameters may move where few units
        do: those of a residual stream. Units are positions along the axes of leaves, one axis at a time.
        Inputs and outputs of the network, windows of convolutions and stacked layers do not count.

        Args:
          tree: the tree, or its shapes.

        Raises:
          SpecMismatchError: the spec does not fit the tree.

        Examples:
          >>> spec = PermutationSpec.from_axes({"w": ("P0", None), "v": ("P0",)})
          >>> print(spec.unit_shares({"w": np.ones((3, 2)), "v": np.ones(3)}))
          75 % of the units move, 25 % stay put
        """
        self.group_sizes(tree)
        shapes = {path: np.shape(leaf) for path, leaf in leaf_table(tree).items()}
        reasons = {(pin.path, pin.axis): pin.reason for pin in self.pins}
        return measure_units(self.leaves, shapes, self.groups, self.fixed, reasons)

    def explain(self, tree: Any = None, *, roles: RoleNames = None) -> str:
        """Return a text for the reader: which axes each group permutes, and why other axes stay put.

        Then it says what is tied: where one permutation moves several layers, several parts of a leaf, or
        what lies at all positions of another factor. A residual stream is tied over layers rightly; other
        ties have a reason in the function, such as one array of constants that several layers share. At the
        end stand the primitives that have no inference rule, with the number of axes that each pins.

        Args:
          tree: the tree that the spec was made for, or its shapes. With it the text begins with the share of
            units that move (`unit_shares`), and ends with the roles of leaves that are no weights.
          roles: roles of leaves that `rebasin.roles.leaf_roles` would not find.

        Examples:
          >>> spec = PermutationSpec.from_axes({"w": (None, "P0")})
          >>> print(dataclasses.replace(spec, pins=(Pin("w", 0, "the axis of an input"),)).explain())
          P0 moves
            w axis 1: P0
          stays put: the axis of an input
            w axis 0
        """
        axes = [(f"{path} axis {i}", axis) for path, row in self.leaves for i, axis in enumerate(row)]
        lines = [] if tree is None else [str(self.unit_shares(tree))]
        for group in self.groups:
            lines += [
                f"{group} moves",
                *(f"  {where}: {axis}" for where, axis in axes if group in axis.groups),
            ]
        for reason in dict.fromkeys(pin.reason for pin in self.pins):
            lines += [
                f"stays put: {reason}",
                *(f"  {pin.path} axis {pin.axis}" for pin in self.pins if pin.reason == reason),
            ]
        lines += [f"tied: {tie}" for tie in find_ties(self.leaves, self.groups, self.outer_groups)]
        unknown = collections.defaultdict(list)
        for pin in self.pins:
            if pin.reason.endswith(NO_RULE):
                unknown[pin.reason.split()[0]].append(pin.path)
        for primitive, paths in unknown.items():
            cost = f"{_count(len(paths), 'axis', 'axes')} of {_count(len(set(paths)), 'leaf', 'leaves')}"
            lines.append(f"the primitive {primitive} has no rule, which pins {cost}; register_rule adds one")
        found = {} if tree is None else leaf_roles(tree, roles)
        for role in dict.fromkeys(role for role in found.values() if role != "weight"):
            paths = [f"  {path}" for path, other in found.items() if other == role]
            lines += [f"neither matched nor averaged, role {role}:", *paths]
        return "\n".join(lines)

    def __str__(self) -> str:
        head = f"{_count(len(self.groups), 'group', 'groups')}, {_count(len(self.leaves), 'leaf', 'leaves')}"
        rows = [f"  {path}: {', '.join(map(str, axes)) or 'scalar'}" for path, axes in self.leaves]
        rows += [f"  {group} is indexed by {', '.join(outer)}" for group, outer in self.indexed]
        return "\n".join([head, *rows])


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def _axis_problems(
    where: str, axis: Axis, length: int, sizes: dict[str, int], origin: dict[str, str]
) -> Iterator[str]:
    """Yield the problems of one axis, and note the size and the first place of groups not seen before.

    Args:
      where: what messages call the axis.
      axis: the axis.
      length: its length in the tree.
      sizes: size of each group seen so far; changed.
      origin: the axis where each group was seen first; changed.
    """
    if not axis.is_whole and axis.size != length:
        yield f"{where}: size {length}, but the spec's {axis} makes {axis.size}"
        return
    for factor in axis.sized(length):
        if factor.group is None:
            continue
        first = origin.setdefault(factor.group, where)
        if sizes.setdefault(factor.group, factor.size) != factor.size:
            yield (
                f"{where}: size {factor.size}, but group {factor.group!r} has size "
                f"{sizes[factor.group]} from {first}"
            )


def _is_nested(axis: Axis) -> bool:
    """Tell whether a concatenation stands inside a product."""
    return any(isinstance(part, Axis) for segment in axis.segments for part in segment)


def _segments_to_lists(axis: Axis) -> list[Any]:
    """Return the segments of an axis as lists: ``[size, group]`` for a factor, segments for an axis in it."""
    return [
        [_segments_to_lists(part) if isinstance(part, Axis) else list(part) for part in segment]
        for segment in axis.segments
    ]


def _axis_of_lists(segments: list[Any]) -> Axis:
    """Return the axis that `_segments_to_lists` wrote."""

    def segment_of(parts: list[Any]) -> Segment:
        return tuple(_axis_of_lists(part) if isinstance(part[0], list) else Factor(*part) for part in parts)

    return Axis(tuple(map(segment_of, segments)))


def _misplaced(axis: Axis) -> Iterator[str]:
    """Yield every axis inside a product that has a simpler form; an axis has one form, so that == is safe."""
    for segment in axis.segments:
        for place, part in enumerate(segment):
            if isinstance(part, Axis):
                if len(part.segments) < 2 or not all(part.segments):
                    yield f"({part}) inside a product needs two segments or more, none of them empty"
                elif place == 0 or place + 1 < len(segment):
                    yield f"({part}) must be the last of several factors; Axis.product distributes it"
                yield from _misplaced(part)


def _contradictions(spec: PermutationSpec) -> Iterator[str]:
    """Yield every problem of a spec that can be seen without a tree."""
    seen = set()
    outer = dict(spec.indexed)
    for path, axes in spec.leaves:
        if path in seen:
            yield f"{path}: named twice"
        seen.add(path)
        for i, axis in enumerate(axes):
            if not axis.segments or not all(axis.segments):
                yield f"{path} axis {i}: no segments, or an empty one"
            elif not axis.is_whole and any(factor.size is None for factor in axis.factors):
                yield f"{path} axis {i}: {axis} has several parts, so each needs its size"
            yield from (f"{path} axis {i}: {problem}" for problem in _misplaced(axis))
        for choice in itertools.product(*(axis.pieces for axis in axes)) if outer else ():
            carried = [factor.group for piece in choice for factor in piece]
            for group in dict.fromkeys(g for g in carried if g in outer):
                missing = [o for o in outer[group] if carried.count(o) != 1]
                if missing:
                    yield f"{path}: carries {group!r}, but not its outer groups {missing} exactly once"
    for group, outers in outer.items():
        before: set[str] = set()
        for other in outers:
            if other == group:
                yield f"group {group!r}: is an outer group of itself"
            elif not before.issuperset(outer.get(other, ())):
                needed = [o for o in outer[other] if o not in before]
                yield f"group {group!r}: outer groups must name {needed} before {other!r}, which they index"
            before.add(other)


def _canonical(spec: PermutationSpec) -> tuple[Any, ...]:
    """Return the spec with leaves sorted and groups numbered in that order, so that names do not count."""
    leaves = sorted(spec.leaves)
    order = dict.fromkeys(g for _, axes in leaves for axis in axes for g in axis.groups)
    names = {group: str(i) for i, group in enumerate(order)}
    indexed = sorted((names[g], tuple(names[o] for o in outer)) for g, outer in spec.indexed)
    fixed = sorted(names[group] for group in spec.fixed)
    return [(path, tuple(axis.rename(names) for axis in axes)) for path, axes in leaves], indexed, fixed
