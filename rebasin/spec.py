"""`PermutationSpec`: which axes of which leaves move together, as plain, hashable data."""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from rebasin.axis import Axis, AxisLike, Factor
from rebasin.errors import SpecError, SpecMismatchError, problem_list
from rebasin.trees import leaf_table

__all__ = ["NO_RULE", "GroupSize", "PermutationSpec", "Pin"]

# How the reason of a pin ends that a primitive without a rule caused; before it stand primitive and line.
NO_RULE = ": this primitive has no rule"

GroupSize: TypeAlias = int | tuple[int, ...]


class Pin(NamedTuple):
    """Why an axis of a leaf, or a part of it, stays put."""

    path: str
    axis: int
    reason: str


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
    """Which axes of which leaves move together; a legal static argument under ``jit``.

    A spec covers every leaf of the tree it was made for, also those that never move. Equality and hash
    include group names; `equivalent` ignores them.

    Attributes:
      leaves: ``(path, axes)`` for each leaf; paths as in `trees.path_name`.
      indexed: ``(group, outer groups)`` for each indexed group: one inner permutation for every position of
        the outer groups, for example of head dimensions in each head. Its permutation has shape ``[outer…,
        n]`` and is indexed by the *new* outer position, ``new[h, d] = old[outer[h], inner[h, d]]``.
      fixed: names of groups that never move and only serve as an index, for example stacked layers.
      pins: why axes stay, for the reader; outside equality, hash and digest.
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
        """Makes a spec from a table of leaves, git-re-basin's form.

        Args:
          table: path of each leaf to one entry per axis: a group's name, `None` for an axis that stays put,
            or an `Axis`.
          indexed: inner group to its outer groups.
          fixed: groups that only serve as an index.

        Returns:
          The spec.

        Raises:
          SpecError: the table contradicts itself.

        Examples:
          >>> spec = PermutationSpec.from_axes({"in/kernel": (None, "P0"), "out/kernel": ("P0", None)})
          >>> spec.group_sizes({"in": {"kernel": np.ones((3, 8))}, "out": {"kernel": np.ones((8, 2))}})
          {'P0': 8}
        """
        leaves = tuple(
            (path, tuple(axis if isinstance(axis, Axis) else Axis.whole(axis) for axis in axes))
            for path, axes in table.items()
        )
        pairs = tuple((group, tuple(outer)) for group, outer in (indexed or {}).items())
        return cls(leaves, pairs, tuple(fixed))

    @classmethod
    def from_groups(cls, groups: Mapping[str, Sequence[tuple[str, int]]], tree: Any) -> "PermutationSpec":
        """Makes a spec from the axes of each group, git-re-basin's transposed form.

        Args:
          groups: group to ``(path, axis)`` pairs; axes that no group names stay put.
          tree: the tree, or its shapes.

        Returns:
          The spec, covering every leaf of `tree`.

        Raises:
          SpecError: an axis is named twice, or is not in the tree; every case is listed.

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
        """Axes by path."""
        return dict(self.leaves)

    @property
    def outer_groups(self) -> dict[str, tuple[str, ...]]:
        """Outer groups of each indexed group."""
        return dict(self.indexed)

    @property
    def outward(self) -> tuple[str, ...]:
        """The groups with every index before what it indexes."""
        outer = self.outer_groups
        return tuple(sorted(self.groups, key=lambda group: len(outer.get(group, ()))))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that move, in the order of the leaves."""
        seen = dict.fromkeys(g for _, axes in self.leaves for axis in axes for g in axis.groups)
        return tuple(group for group in seen if group not in self.fixed)

    def group_sizes(self, tree: Any, *, name: str = "params") -> dict[str, GroupSize]:
        """Validates the spec against a tree.

        Args:
          tree: the tree, or its shapes (`jax.eval_shape`).
          name: what to call it in the message.

        Returns:
          Size of each group, in the order of `groups`; for an indexed group the shape ``(outer…, n)``.

        Raises:
          SpecMismatchError: listing *every* leaf and axis that does not fit.
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
        """Whether two specs describe the same symmetry of the same tree, whatever their groups are called."""
        return _canonical(self) == _canonical(other)

    def to_json(self) -> str:
        """The spec as JSON text, one leaf a line."""
        leaves = [
            json.dumps([path, [[[list(f) for f in segment] for segment in axis.segments] for axis in axes]])
            for path, axes in self.leaves
        ]
        rest = {"indexed": self.indexed, "fixed": self.fixed, "pins": self.pins}
        tail = "".join(f', "{key}": {json.dumps(value)}' for key, value in rest.items())
        return (
            '{"format": "rebasin.spec", "version": 1, "leaves": [\n'
            + ",\n".join(leaves)
            + "\n]"
            + tail
            + "}\n"
        )

    @classmethod
    def from_json(cls, text: str) -> "PermutationSpec":
        """The spec that `to_json` wrote; raises `SpecError` for any other text."""
        try:
            data = json.loads(text)
            if (data["format"], data["version"]) != ("rebasin.spec", 1):
                raise SpecError(
                    f"wanted format rebasin.spec version 1, got {data['format']} {data['version']}"
                )
            leaves = tuple(
                (
                    path,
                    tuple(Axis(tuple(tuple(Factor(*f) for f in s) for s in segments)) for segments in axes),
                )
                for path, axes in data["leaves"]
            )
            indexed = tuple((group, tuple(outer)) for group, outer in data["indexed"])
            return cls(leaves, indexed, tuple(data["fixed"]), tuple(Pin(*pin) for pin in data["pins"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise SpecError(f"not a saved spec: {error!r}") from error

    def save(self, path: str | pathlib.Path) -> None:
        """Writes `to_json` to a file."""
        pathlib.Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "PermutationSpec":
        """Reads a spec that `save` wrote."""
        try:
            return cls.from_json(pathlib.Path(path).read_text())
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error

    @property
    def digest(self) -> str:
        """Hash of all that counts for equality, as saved with a permutation."""
        return hashlib.sha256(dataclasses.replace(self, pins=()).to_json().encode()).hexdigest()

    def explain(self) -> str:
        """The groups with the axes that carry them, then every reason why axes stay put, and what it cost."""
        axes = [(f"{path} axis {i}", axis) for path, row in self.leaves for i, axis in enumerate(row)]
        lines = []
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
        unknown = collections.defaultdict(list)
        for pin in self.pins:
            if pin.reason.endswith(NO_RULE):
                unknown[pin.reason.split()[0]].append(pin.path)
        for primitive, paths in unknown.items():
            cost = f"{_count(len(paths), 'axis', 'axes')} of {_count(len(set(paths)), 'leaf', 'leaves')}"
            lines.append(f"the primitive {primitive} has no rule, which pins {cost}; register_rule adds one")
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
    """Problems of one axis of `length`; enters new groups into `sizes`, and where each was first seen."""
    segments = axis.sized(length)
    total = sum(math.prod(factor.size for factor in segment) for segment in segments)
    if total != length:
        yield f"{where}: size {length}, but the spec's {axis} makes {total}"
        return
    for factor in itertools.chain.from_iterable(segments):
        if factor.group is None:
            continue
        first = origin.setdefault(factor.group, where)
        if sizes.setdefault(factor.group, factor.size) != factor.size:
            yield (
                f"{where}: size {factor.size}, but group {factor.group!r} has size "
                f"{sizes[factor.group]} from {first}"
            )


def _contradictions(spec: PermutationSpec) -> Iterator[str]:
    """Everything wrong with a spec that can be seen without a tree."""
    seen = set()
    outer = dict(spec.indexed)
    for path, axes in spec.leaves:
        if path in seen:
            yield f"{path}: named twice"
        seen.add(path)
        for i, axis in enumerate(axes):
            if not axis.segments or not all(axis.segments):
                yield f"{path} axis {i}: no segments, or an empty one"
            elif not axis.is_whole and any(f.size is None for segment in axis.segments for f in segment):
                yield f"{path} axis {i}: {axis} has several parts, so each needs its size"
        for choice in itertools.product(*(axis.segments for axis in axes)) if outer else ():
            carried = [f.group for segment in choice for f in segment]
            for group in dict.fromkeys(g for g in carried if g in outer):
                missing = [o for o in outer[group] if carried.count(o) != 1]
                if missing:
                    yield f"{path}: group {group!r} is indexed by {missing}, which it must carry exactly once"
    for group, outers in outer.items():
        before: set[str] = set()
        for other in outers:
            if other == group or not before.issuperset(outer.get(other, ())):
                yield f"group {group!r}: indexed by {list(outers)}; {other!r} needs its own index before it"
            before.add(other)


def _canonical(spec: PermutationSpec) -> tuple[Any, ...]:
    """Leaves sorted and groups numbered as they come, so that equal symmetries compare equal."""
    leaves = sorted(spec.leaves)
    order = dict.fromkeys(g for _, axes in leaves for axis in axes for g in axis.groups)
    names = {group: str(i) for i, group in enumerate(order)}
    indexed = sorted((names[g], tuple(names[o] for o in outer)) for g, outer in spec.indexed)
    fixed = sorted(names[group] for group in spec.fixed)
    return [(path, tuple(axis.rename(names) for axis in axes)) for path, axes in leaves], indexed, fixed
