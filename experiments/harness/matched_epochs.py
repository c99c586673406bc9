"""What experiments that match networks of several epochs share (section 6 and appendices H and I)."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic

from experiments.harness.experiment import Config, Setup
from experiments.harness.methods import Matcher, build_matchers, check_methods
from experiments.harness.networks import Pair
from experiments.harness.record import Endpoints, FixedPoints, Metrics, N, PairRecord
from experiments.harness.statistics import Interval
from rebasin.permutation import Permutation, compiled_permute
from rebasin.training.trajectory import Trajectory

__all__ = [
    "EpochsConfig",
    "Landscape",
    "LandscapeRecord",
    "LayerwiseEnd",
    "LayerwiseRecord",
    "MagnitudeRecord",
    "MatchedEpochs",
    "PlaneRecord",
    "PrunedEpoch",
    "PrunedMatch",
    "RewoundEpoch",
    "RewoundMatch",
    "StabilityEpoch",
    "StabilityRecord",
    "StabilitySummary",
    "Surface",
    "Waypoint",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochsConfig(Config):
    """The base of configs of experiments that match networks of several epochs.

    Attributes:
      methods: names of matching methods.
      epochs: epochs at which networks are matched, in ascending order; the last is the recipe's last epoch.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
    """

    methods: tuple[str, ...]
    epochs: tuple[int, ...]
    num_eval: int | None

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        last = self.recipe.epochs
        if list(self.epochs) != sorted(set(self.epochs)) or len(self.epochs) < 2 or self.epochs[0] < 0:
            problems.append(f"epochs: wanted two or more ascending epochs from 0 on, got {list(self.epochs)}")
        elif self.epochs[-1] != last:
            problems.append(f"epochs: wanted the recipe's last, {last}, at the end, got {self.epochs[-1]}")
        return problems

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """The epochs at which networks are matched."""
        return self.epochs

    @property
    def wanted_parts(self) -> tuple[Any, ...]:
        """The epochs at which networks are matched."""
        return self.epochs


class MatchedEpochs:
    """Two trajectories, and the permutations that matching methods find at their epochs.

    Networks and permutations that were asked for once are kept.

    Args:
      setup: what the experiment measures with.
      matchers: function of each matching method.
      pair: the pair.
      trained: trajectories of A and of B.
    """

    def __init__(
        self,
        setup: Setup[Any],
        matchers: Mapping[str, Matcher],
        pair: Pair,
        trained: Sequence[Trajectory],
    ) -> None:
        self._setup, self._matchers, self._pair, self._trained = setup, matchers, pair, trained
        self.networks = functools.cache(self._networks)
        self.permutations = functools.cache(self._permutations)

    @classmethod
    def of(cls, setup: Setup[Any], pair: Pair, trained: Sequence[Trajectory]) -> "MatchedEpochs":
        """Return the epochs of a pair under the methods of the config."""
        return cls(setup, build_matchers(setup, setup.config.methods), pair, trained)

    def _networks(self, epoch: int) -> tuple[Any, Any]:
        params_a, params_b = (trajectory[epoch] for trajectory in self._trained)
        return params_a, params_b

    def _permutations(self, epoch: int) -> dict[str, Permutation]:
        return self.match(*self.networks(epoch))

    def match(self, params_a: Any, params_b: Any) -> dict[str, Permutation]:
        """Return the permutation of every method between two networks."""
        with self._setup.seconds.count("matching"):
            return {
                name: match(params_a, params_b, key=self._pair.key).permutation
                for name, match in self._matchers.items()
            }

    def moved(self, permutation: Permutation, epoch: int) -> Any:
        """Return network B of an epoch under a permutation."""
        return compiled_permute(self._setup.spec, permutation, self.networks(epoch)[1])


@dataclasses.dataclass(frozen=True)
class Waypoint:
    """The network of one epoch, projected onto a plane.

    Attributes:
      epoch: the epoch.
      x: first coordinate, a distance over all weights.
      y: second coordinate, a distance over all weights.
      distance: Euclidean distance of the network to the plane, over all weights.
    """

    epoch: int
    x: float
    y: float
    distance: float


@dataclasses.dataclass(frozen=True)
class Surface:
    """Loss and error on a grid of a plane through A_end, A_t and P_s[B_t].

    At the last epoch t, where A_t is A_end, the plane goes through A of the first recorded epoch instead.

    Attributes:
      x: first coordinates of the grid, distances over all weights.
      y: second coordinates.
      loss: cross entropy on training examples in nats, with one row for each y.
      error: fraction of training examples that are classified wrongly, with one row for each y.
      path_a: the trajectory of A.
      path_b: the trajectory of B under P_s.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    error: tuple[tuple[float, ...], ...]
    path_a: tuple[Waypoint, ...]
    path_b: tuple[Waypoint, ...]


@dataclasses.dataclass(frozen=True)
class Landscape(Generic[N]):
    """What one matching method makes of the plane of two epochs.

    Attributes:
      ridge: barriers of the path between A_t and P_s[B_t], which lies in the plane.
      surface: loss and error in the plane; only of the first pair, and in no summary.
    """

    ridge: Metrics[N]
    surface: Surface | None = None


@dataclasses.dataclass(frozen=True)
class PlaneRecord(Generic[N]):
    """The planes of one match epoch s and one epoch t.

    Attributes:
      match_epoch: the epoch s of the permutation.
      epoch: the epoch t of the networks.
      methods: what each matching method makes of it.
    """

    match_epoch: int
    epoch: int
    methods: Mapping[str, Landscape[N]]

    @property
    def key(self) -> tuple[int, int]:
        """The epochs s and t."""
        return self.match_epoch, self.epoch


@dataclasses.dataclass(frozen=True)
class LandscapeRecord(PairRecord[N]):
    """Planes through two trajectories (``loss_landscape``).

    Attributes:
      seeds: see `PairRecord`.
      planes: the planes that are measured already, by epoch s and then by epoch t.
    """

    parts: ClassVar = ("planes", "key")

    planes: tuple[PlaneRecord[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class PrunedMatch(Generic[N]):
    """One matching method on pruned networks of one epoch.

    Attributes:
      magnitude: barriers of the path between A and P[B] at the end of training, where P was found on networks
        without their weights of smallest magnitude; one for each fraction.
      random: the same with weights pruned at random.
    """

    magnitude: tuple[Metrics[N], ...]
    random: tuple[Metrics[N], ...]


@dataclasses.dataclass(frozen=True)
class PrunedEpoch(Generic[N]):
    """The permutations that are found on pruned networks of one epoch.

    Attributes:
      epoch: the epoch.
      methods: what each matching method finds.
    """

    epoch: int
    methods: Mapping[str, PrunedMatch[N]]


@dataclasses.dataclass(frozen=True)
class MagnitudeRecord(PairRecord[N]):
    """Two networks matched without some of their weights (``weight_magnitude``).

    Attributes:
      seeds: see `PairRecord`.
      endpoints: metrics of A and B at the end of training.
      unaligned: barriers of the path between A and B at the end of training.
      epochs: the epochs that are measured already, in ascending order.
    """

    parts: ClassVar = ("epochs", "epoch")

    endpoints: Endpoints[N]
    unaligned: Metrics[N]
    epochs: tuple[PrunedEpoch[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class RewoundMatch(Generic[N]):
    """One matching method on networks that are partly rewound to one epoch t.

    Attributes:
      alone: barriers of the path between A and P_t[B] at the end of training.
      fixed_points: agreement of P_t with P_end.
      variants: barriers of the path between A and P[B] at the end of training, where P is found while some
        layers are those of epoch t; by variant, one for each split k from 0 to the number of layers.
    """

    alone: Metrics[N]
    fixed_points: FixedPoints[N]
    variants: Mapping[str, tuple[Metrics[N], ...]]


@dataclasses.dataclass(frozen=True)
class RewoundEpoch(Generic[N]):
    """The permutations that are found on networks partly rewound to one epoch.

    Attributes:
      epoch: the epoch.
      methods: what each matching method finds.
    """

    epoch: int
    methods: Mapping[str, RewoundMatch[N]]


@dataclasses.dataclass(frozen=True)
class LayerwiseEnd(Generic[N]):
    """One matching method at the end of training.

    Attributes:
      aligned: barriers of the path between A and P_end[B].
      identity: agreement of P_end with the identity.
    """

    aligned: Metrics[N]
    identity: FixedPoints[N]


@dataclasses.dataclass(frozen=True)
class LayerwiseRecord(PairRecord[N]):
    """Two networks matched while some layers are rewound (``layerwise_alignment``).

    Attributes:
      seeds: see `PairRecord`.
      layers: the group of each layer, in order of depth.
      endpoints: metrics of A and B at the end of training.
      unaligned: barriers of the path between A and B at the end of training.
      end: what each matching method makes of the last epoch.
      epochs: the rewind epochs that are measured already, in ascending order.
    """

    parts: ClassVar = ("epochs", "epoch")

    layers: tuple[str, ...]
    endpoints: Endpoints[N]
    unaligned: Metrics[N]
    end: Mapping[str, LayerwiseEnd[N]]
    epochs: tuple[RewoundEpoch[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class StabilityEpoch(Generic[N]):
    """One epoch t of a pair of trajectories.

    Attributes:
      epoch: the epoch t.
      endpoints: metrics of A_t and B_t.
      unaligned: barriers of the path between A_t and B_t.
      aligned: barriers of the path between A_t and P_end[B_t], by matching method.
    """

    epoch: int
    endpoints: Endpoints[N]
    unaligned: Metrics[N]
    aligned: Mapping[str, Metrics[N]]


@dataclasses.dataclass(frozen=True)
class StabilityRecord(PairRecord[N]):
    """Two networks of one regime of training, and two siblings (``stability_interventions``).

    Attributes:
      seeds: see `PairRecord`.
      regime: name of the regime.
      siblings: barriers at the end of training of the path between two networks that have the initialisation
        of A and data orders of their own: the instability at initialisation.
      epochs: the epochs that are measured already, in ascending order.
    """

    parts: ClassVar = ("epochs", "epoch")

    regime: str
    siblings: Metrics[N]
    epochs: tuple[StabilityEpoch[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class StabilitySummary:
    """Mean and spread of every number in each regime."""

    regimes: tuple[StabilityRecord[Interval], ...]
