"""The config and the records of experiments on several networks at once, over widths."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic

import jax

import rebasin
from experiments.harness.experiment import Setup
from experiments.harness.methods import check_methods
from experiments.harness.record import FixedPoints, Metrics, N, PairRecord
from experiments.harness.statistics import Interval, Onset
from experiments.harness.widths import OverWidths
from rebasin.matching.many import UniverseResult, match_to_reference

__all__ = [
    "JOINT",
    "ConnectivityConfig",
    "DefinitionRecord",
    "JointTriplet",
    "MatchedTriplet",
    "NetworksRecord",
    "NetworksSummary",
    "Simplex",
    "TransitivityShare",
    "TripletRecord",
    "TripletSummary",
    "align_jointly",
]

# Algorithms that align all networks of a replicate together, by what they are called in files and figures.
JOINT = ("merge_many", "universe", "all_pairs")

# Runs of all_pairs after the first, each from another start.
_RESTARTS = 1


def align_jointly(setup: Setup[Any], name: str, trees: Sequence[Any], key: jax.Array) -> UniverseResult:
    """Align networks by one of the algorithms in `JOINT`.

    Args:
      setup: what the experiment measures with.
      name: name of the algorithm.
      trees: the networks.
      key: PRNG key.
    """
    if name == "all_pairs":
        data = jax.device_put(setup.match_data)
        starts = [
            match_to_reference(
                setup.spec, trees, "activations", reference=i, key=key, apply_fn=setup.apply_fn, data=data
            ).permutations
            for i in range(len(trees))
        ]
        return rebasin.all_pairs_matching(
            setup.spec,
            trees,
            setup.metrics_fn,
            data,
            key=key,
            starts=starts,
            restarts=_RESTARTS,
            num_steps=setup.config.joint_steps,
        )
    algorithms: Mapping[str, Callable[[], UniverseResult]] = {
        "merge_many": lambda: rebasin.merge_many(setup.spec, trees, key=key),
        "universe": lambda: rebasin.universe_matching(setup.spec, trees),
    }
    return algorithms[name]()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectivityConfig(OverWidths):
    """The base of the configs of experiments on connectivity over widths; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      joint: names of algorithms that align all networks together, some of `JOINT`.
      joint_steps: number of gradient steps of ``all_pairs``.
      connected_at_most: test error barrier, a fraction, up to which two networks count as connected.
      loss_at_most: test loss barrier, in nats, up to which two networks count as connected.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
    """

    methods: tuple[str, ...]
    joint: tuple[str, ...]
    joint_steps: int
    connected_at_most: float
    loss_at_most: float
    num_eval: int | None

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        if not set(self.joint) <= set(JOINT) or len(set(self.joint)) != len(self.joint):
            problems.append(f"joint: wanted some of {', '.join(JOINT)}, none twice, got {list(self.joint)}")
        if self.joint_steps < 1:
            problems.append(f"joint_steps: wanted at least 1, got {self.joint_steps}")
        if not 0 <= self.connected_at_most < 1:
            problems.append(f"connected_at_most: wanted a fraction, got {self.connected_at_most}")
        if self.loss_at_most < 0:
            problems.append(f"loss_at_most: wanted at least 0, got {self.loss_at_most}")
        return problems

    @property
    def thresholds(self) -> dict[str, float]:
        """The barrier up to which two networks count as connected, by metric."""
        return {"test_error": self.connected_at_most, "test_loss": self.loss_at_most}

    @property
    def wanted_parts(self) -> tuple[str, ...]:
        """The algorithms that align all networks together; the methods are measured before them."""
        return self.joint


@dataclasses.dataclass(frozen=True)
class MatchedTriplet(Generic[N]):
    """One matching method on networks A, B and C; P_{X→Y} is the permutation of X that aligns it with Y.

    Attributes:
      direct: barriers of the path between A and P_{B→A}[B].
      indirect: barriers of the path between P_{A→C}[A] and P_{B→C}[B].
      to_reference: barriers of the paths between P_{A→C}[A] and C, and between P_{B→C}[B] and C.
      fixed_points: agreement of P_{B→A} with the permutation of B that indirect alignment amounts to.
      chance: fraction of units on which two permutations agree that are drawn at random.
    """

    direct: Metrics[N]
    indirect: Metrics[N]
    to_reference: tuple[Metrics[N], ...]
    fixed_points: FixedPoints[N]
    chance: N


@dataclasses.dataclass(frozen=True)
class JointTriplet(Generic[N]):
    """One algorithm that aligns networks A, B and C together.

    Attributes:
      between: barriers of the path between A and B when all three are aligned.
      to_reference: barriers of the paths between A and C, and between B and C.
      seconds: time that alignment took, in seconds.
    """

    between: Metrics[N]
    to_reference: tuple[Metrics[N], ...]
    seconds: N


@dataclasses.dataclass(frozen=True)
class TripletRecord(PairRecord[N]):
    """Networks A, B and C of one width (``strong_connectivity``).

    Attributes:
      seeds: seeds of A, B and C; see `PairRecord`.
      width: width of the networks.
      networks: metrics of A and of B.
      unaligned: barriers of the path between A and B.
      tempered: the same with a softmax temperature that is fitted on training examples at every alpha.
      methods: what each matching method makes of them, by the method's name.
      joint: what each algorithm that aligns all three together makes of them; those measured already.
    """

    parts: ClassVar = ("joint", None)

    width: int
    networks: tuple[Metrics[N], ...]
    unaligned: Metrics[N]
    tempered: Metrics[N]
    methods: Mapping[str, MatchedTriplet[N]]
    joint: Mapping[str, JointTriplet[N]]


@dataclasses.dataclass(frozen=True)
class TripletSummary:
    """Triplets over all replicates.

    Attributes:
      widths: mean and spread of every number at each width, in ascending order.
      onsets: by metric and comparison the width from which on the barrier stays at or below its threshold.
    """

    widths: tuple[TripletRecord[Interval], ...]
    onsets: Mapping[str, Mapping[str, Onset]]


@dataclasses.dataclass(frozen=True)
class Simplex(Generic[N]):
    """Weighted averages of three aligned networks, on test data.

    Attributes:
      weights: weights of the three networks at each point.
      loss: cross entropy at each point, in nats.
      error: error at each point, a fraction.
    """

    weights: tuple[tuple[float, ...], ...]
    loss: tuple[N, ...]
    error: tuple[N, ...]


@dataclasses.dataclass(frozen=True)
class DefinitionRecord(Generic[N]):
    """The barriers of all pairs of k networks under one definition of connectivity.

    Attributes:
      cells: barriers of the pairs (i, j) with i < j, in lexicographic order; of the Entezari property those
        of all (i, j), the diagonal included.
      cycle_error: fraction of units that permutations around a triangle of networks move; `None` where every
        network has one permutation, or none.
      averages: metrics of the average of the first 1, 2, …, k aligned networks; empty where pairs have
        permutations of their own.
      simplex: averages of the first three aligned networks; `None` where `averages` are empty.
    """

    cells: tuple[Metrics[N], ...]
    cycle_error: N | None = None
    averages: tuple[Metrics[N], ...] = ()
    simplex: Simplex[N] | None = None


@dataclasses.dataclass(frozen=True)
class NetworksRecord(PairRecord[N]):
    """Several networks of one width (``transitivity``).

    Attributes:
      seeds: seeds of the networks; see `PairRecord`.
      width: width of the networks.
      definitions: the definitions of connectivity that are measured already, by name.
    """

    parts: ClassVar = ("definitions", None)

    width: int
    definitions: Mapping[str, DefinitionRecord[N]]


@dataclasses.dataclass(frozen=True)
class TransitivityShare:
    """How often connectivity is not transitive, over all replicates at one width.

    Attributes:
      broken_of_triplets: mean over replicates of the fraction of triplets A, B, C, each counted for its
        middle B, with A ~ B and B ~ C and not A ~ C.
      chains: number of triplets with A ~ B and B ~ C.
      broken: number of those without A ~ C.
      sets: by size the number of sets of networks of which all pairs are connected weakly, by some method.
      strong: by size the number of those sets that this definition connects all together.
    """

    broken_of_triplets: Interval
    chains: int
    broken: int
    sets: Mapping[int, int]
    strong: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class NetworksSummary:
    """Sets of networks over all replicates.

    Attributes:
      widths: mean and spread of every number at each width, in ascending order.
      transitivity: by metric and definition the shares at each width.
    """

    widths: tuple[NetworksRecord[Interval], ...]
    transitivity: Mapping[str, Mapping[str, tuple[TransitivityShare, ...]]]
