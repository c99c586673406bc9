"""The schema of ``results.json``: what is measured of a pair of networks, as typed data.

Every number has a name, a unit and a place in a frozen dataclass. `experiments.harness.serialisation` turns
the dataclasses into JSON and back; claims, tables, CSV files and figures take the dataclasses.

All records are generic in the type `N` of their numbers: a record of one pair holds floats,
``TrajectoryRecord[float]``, and the summary over pairs holds intervals, ``TrajectoryRecord[Interval]``.

A record grows while a pair is measured. Its last field is a tuple of parts, one for each epoch, or a mapping
of them, one for each method; experiments to come will have one for each level of pruning or for each width.
`added` returns a record with one part more. The experiment stores the record after each part, so that a
killed run goes on at the next one.

To add an experiment, add its record here: a subclass of `PairRecord` that is made of the small types below.
Those of experiments that prune are in `experiments.harness.pruning`.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from experiments.harness.serialisation import field_types
from experiments.harness.statistics import Interval, Onset, student_interval
from rebasin.errors import ConfigError

__all__ = [
    "METRICS",
    "N",
    "AlignedEpoch",
    "Endpoints",
    "EpochRecord",
    "FamilyRecord",
    "FamilySummary",
    "FixedPoints",
    "MatchRecord",
    "MethodsRecord",
    "Metrics",
    "Objective",
    "PairRecord",
    "ParentsRecord",
    "PathCurves",
    "RateRecord",
    "RatesSummary",
    "SpawnRecord",
    "TestPath",
    "TrajectoryRecord",
    "added",
    "check_names",
    "summarise",
]

# float in the record of one pair, Interval in a summary over pairs.
N = TypeVar("N")
P = TypeVar("P", bound="PairRecord[Any]")

# The fields of `Metrics` and `PathCurves`, in the order of files and figures.
METRICS = ("train_loss", "train_error", "test_loss", "test_error")


@dataclasses.dataclass(frozen=True)
class Metrics(Generic[N]):
    """One number for each metric: values of one network, or the barriers (Eq. 1) of one path.

    Attributes:
      train_loss: cross entropy on training examples, in nats.
      train_error: fraction of training examples that are classified wrongly.
      test_loss: cross entropy on test examples, in nats.
      test_error: fraction of test examples that are classified wrongly.
    """

    train_loss: N
    train_error: N
    test_loss: N
    test_error: N


@dataclasses.dataclass(frozen=True)
class PathCurves(Generic[N]):
    """Each metric at every alpha of a path, from network B (alpha 0) to network A (alpha 1).

    Attributes:
      train_loss: cross entropy on training examples, in nats.
      train_error: fraction of training examples that are classified wrongly.
      test_loss: cross entropy on test examples, in nats.
      test_error: fraction of test examples that are classified wrongly.
    """

    train_loss: tuple[N, ...]
    train_error: tuple[N, ...]
    test_loss: tuple[N, ...]
    test_error: tuple[N, ...]


@dataclasses.dataclass(frozen=True)
class Endpoints(Generic[N]):
    """The metrics of network A and of network B."""

    a: Metrics[N]
    b: Metrics[N]


@dataclasses.dataclass(frozen=True)
class FixedPoints(Generic[N]):
    """How far two permutations agree.

    Attributes:
      total: fraction of all units that both permutations place alike.
      groups: the same fraction within each group of the spec, by the group's name.
    """

    total: N
    groups: Mapping[str, N]


@dataclasses.dataclass(frozen=True)
class Objective(Generic[N]):
    """The matching method's own objective, in the method's unit.

    Attributes:
      start: value at the permutation from which the method starts.
      end: value at the permutation that the method returns.
    """

    start: N
    end: N


@dataclasses.dataclass(frozen=True)
class PairRecord(Generic[N]):
    """What is measured of one pair of networks; the base of the records of all experiments.

    Attributes:
      seeds: seeds of both networks; in a summary the seeds of all networks behind it.
    """

    # Name of the field that holds the parts, and of the field of a part that orders them. The latter is
    # `None` where the parts are a mapping, whose keys tell them apart.
    parts: ClassVar[tuple[str, str | None] | None] = None

    seeds: tuple[int, ...]

    @property
    def part_keys(self) -> tuple[Any, ...]:
        """What tells the parts that are measured already apart, such as their epochs, in order."""
        if self.parts is None:
            return ()
        name, key = self.parts
        return tuple(part if key is None else getattr(part, key) for part in getattr(self, name))


@dataclasses.dataclass(frozen=True)
class AlignedEpoch(Generic[N]):
    """One matching method at one epoch t of a pair; P_s is the permutation that it finds at epoch s.

    Attributes:
      objective: the method's own objective at P_t, in the method's unit.
      same_epoch: barriers of the path between A_t and P_t[B_t].
      at_end: barriers of the path between A and P_t[B] at the last epoch.
      under: barriers of the path between A_t and P_s[B_t], by match epoch s; the last of them is P_end. In
        an unfinished record only P_end and P_t are always there.
      distance_same_epoch: Euclidean distance ‖A_t − P_t[B_t]‖ over all weights.
      distance_end: Euclidean distance ‖A_t − P_end[B_t]‖ over all weights.
      fixed_points: agreement of P_t with P_end.
      identity: agreement of P_end with the identity; only at the last epoch, else `None`.
      path: the path between A and P_end[B] at the last epoch; `None` at other epochs.
    """

    objective: N
    same_epoch: Metrics[N]
    at_end: Metrics[N]
    under: Mapping[int, Metrics[N]]
    distance_same_epoch: N
    distance_end: N
    fixed_points: FixedPoints[N]
    identity: FixedPoints[N] | None = None
    path: PathCurves[N] | None = None


@dataclasses.dataclass(frozen=True)
class EpochRecord(Generic[N]):
    """One epoch t of a pair of trajectories.

    Attributes:
      epoch: the epoch t.
      endpoints: metrics of A_t and B_t.
      unaligned: barriers of the path between A_t and B_t.
      distance: Euclidean distance ‖A_t − B_t‖ over all weights.
      methods: what each matching method makes of it, by the method's name.
      path: the path between A and B at the last epoch; `None` at other epochs.
    """

    epoch: int
    endpoints: Endpoints[N]
    unaligned: Metrics[N]
    distance: N
    methods: Mapping[str, AlignedEpoch[N]]
    path: PathCurves[N] | None = None


@dataclasses.dataclass(frozen=True)
class TrajectoryRecord(PairRecord[N]):
    """Two trajectories, epoch by epoch (``training_trajectories``).

    Attributes:
      seeds: see `PairRecord`.
      epochs: the epochs that are measured already, in ascending order.
    """

    parts: ClassVar = ("epochs", "epoch")

    epochs: tuple[EpochRecord[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class ParentsRecord(Generic[N]):
    """Two parents A and B at the end of training.

    Attributes:
      endpoints: metrics of A and B.
      unaligned: barriers of the path between A and B.
      aligned: barriers of the path between A and P_end[B], by matching method.
    """

    endpoints: Endpoints[N]
    unaligned: Metrics[N]
    aligned: Mapping[str, Metrics[N]]


@dataclasses.dataclass(frozen=True)
class SpawnRecord(Generic[N]):
    """The children that leave their parents at one epoch t, at the end of training.

    Attributes:
      epoch: the epoch t.
      siblings: barriers of the path between A¹ and A², two children of A.
      unaligned: barriers of the path between A¹ and B¹, children of both parents.
      children: barriers of the path between A¹ and P_end[B¹], where P_end is the permutation that each
        matching method found for the parents; by method.
      at_end: barriers of the path between the parents A and P_t[B], by matching method.
    """

    epoch: int
    siblings: Metrics[N]
    unaligned: Metrics[N]
    children: Mapping[str, Metrics[N]]
    at_end: Mapping[str, Metrics[N]]


@dataclasses.dataclass(frozen=True)
class FamilyRecord(PairRecord[N]):
    """Two parents and their children, one spawn epoch after the other (``sgd_instability``).

    Attributes:
      seeds: seeds of the parents, see `PairRecord`.
      parents: the parents.
      spawns: the spawn epochs that are measured already, in ascending order.
    """

    parts: ClassVar = ("spawns", "epoch")

    parents: ParentsRecord[N]
    spawns: tuple[SpawnRecord[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class FamilySummary:
    """Families over all pairs of parents.

    Attributes:
      onset: the epoch from which on siblings are linearly connected.
      family: mean and spread of every number.
    """

    onset: Onset
    family: FamilyRecord[Interval]


@dataclasses.dataclass(frozen=True)
class TestPath(Generic[N]):
    """A path between two networks on test data.

    Attributes:
      loss_barrier: the loss barrier (Eq. 1), in nats.
      error_barrier: the error barrier (Eq. 1), a fraction.
      midpoint_loss: cross entropy of the network at alpha ½, in nats.
      midpoint_error: error of the network at alpha ½, a fraction.
      error: error at every alpha, a fraction, from B to A.
    """

    __test__: ClassVar = False  # pytest would collect a class of this name

    loss_barrier: N
    error_barrier: N
    midpoint_loss: N
    midpoint_error: N
    error: tuple[N, ...]


@dataclasses.dataclass(frozen=True)
class MatchRecord(Generic[N]):
    """One matching method on one pair of networks, and the paths that it leaves.

    Attributes:
      objective: the method's own objective; `None` where nothing was matched.
      seconds: time that matching took, in seconds.
      distance: Euclidean distance ‖A − P[B]‖ over all weights.
      plain: the path as it is.
      repaired: the path with REPAIR at every alpha; `None` where that is not measured.
      reset: the path with new running statistics at every alpha; `None` for networks that keep none.
    """

    objective: Objective[N] | None
    seconds: N
    distance: N
    plain: TestPath[N]
    repaired: TestPath[N] | None = None
    reset: TestPath[N] | None = None


@dataclasses.dataclass(frozen=True)
class MethodsRecord(PairRecord[N]):
    """Several matching methods on one pair of networks (``compare_methods``).

    Attributes:
      seeds: see `PairRecord`.
      methods: the methods that are measured already: the pair as it was trained under ``none``, then each
        method by its name.
    """

    parts: ClassVar = ("methods", None)

    methods: Mapping[str, MatchRecord[N]]


@dataclasses.dataclass(frozen=True)
class RateRecord(PairRecord[N]):
    """Several matching methods on one pair of networks of one learning rate (``learning_rates``).

    Attributes:
      seeds: see `PairRecord`.
      rate: the peak learning rate.
      methods: as in `MethodsRecord`.
    """

    parts: ClassVar = ("methods", None)

    rate: float
    methods: Mapping[str, MatchRecord[N]]


@dataclasses.dataclass(frozen=True)
class RatesSummary:
    """Mean and spread of every number at each peak learning rate, in ascending order."""

    rates: tuple[RateRecord[Interval], ...]


def added(record: P, part: Any) -> P:
    """Return a record with one part more, its parts in ascending order.

    Args:
      record: a record whose class names its `parts`.
      part: for example the `EpochRecord` of an epoch. It replaces that of the same epoch.

    Examples:
      >>> first, second = (EpochRecord(t, None, None, 0.0, {}) for t in (3, 1))
      >>> [part.epoch for part in added(added(TrajectoryRecord((0, 1)), first), second).epochs]
      [1, 3]
    """
    name, key = record.parts or (None, None)
    if name is None or key is None:
        raise TypeError(f"{type(record).__name__} has no parts in an order")
    others = [other for other in getattr(record, name) if getattr(other, key) != getattr(part, key)]
    parts = sorted([*others, part], key=lambda part: getattr(part, key))
    return dataclasses.replace(record, **{name: tuple(parts)})


def check_names(where: str, found: Collection[Any], wanted: Collection[Any]) -> list[str]:
    """Return a line if the keys of a stored mapping are not those of the config, else none.

    Examples:
      >>> check_names("methods", {"weights": 1}, ("weights", "activations"))
      ["methods: wanted ['weights', 'activations'], got ['weights']"]
    """
    if set(found) == set(wanted):
        return []
    return [f"{where}: wanted {list(wanted)}, got {list(found)}"]


def summarise(records: Sequence[Any]) -> Any:
    """Return mean, 95 % interval and standard deviation of every number over records of one structure.

    Args:
      records: one record for each replicate. A field whose type mentions `N` is summed up; other fields, such
        as epochs, must agree.

    Returns:
      A record of the same class and structure, with an `Interval` in the place of each number and with the
      seeds of all records.

    Raises:
      ConfigError: records differ in a field that is not measured, or have a different number of parts.

    Examples:
      >>> summarise([{"loss": [1.0, 5.0]}, {"loss": [3.0, 5.0]}])["loss"][0].mean
      2.0
    """
    first = records[0]
    if dataclasses.is_dataclass(first):
        fields = {name: [getattr(record, name) for record in records] for name in field_types(type(first))}
        return type(first)(**{name: _summarise_field(first, name, values) for name, values in fields.items()})
    if isinstance(first, Mapping):
        return {key: summarise([record[key] for record in records]) for key in first}
    if isinstance(first, list | tuple):
        if len({len(record) for record in records}) > 1:
            raise ConfigError(f"records have different numbers of parts: {[len(r) for r in records]}")
        return tuple(summarise(column) for column in zip(*records, strict=True))
    return None if first is None else student_interval(records)


def _summarise_field(record: Any, name: str, values: Sequence[Any]) -> Any:
    if name == "seeds":
        return tuple(seed for seeds in values for seed in seeds)
    kind = field_types(type(record))[name]
    if kind is N or getattr(kind, "__parameters__", ()):
        return summarise(values)
    if any(value != values[0] for value in values):
        raise ConfigError(f"{type(record).__name__}.{name} differs between records: {values}")
    return values[0]
