"""The records of experiments on alignment as optimal transport (arXiv 2310.19103)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Generic

from experiments.harness.record import MatchRecord, Metrics, N, PairRecord
from experiments.harness.statistics import Interval, Onset

__all__ = [
    "Correlation",
    "Dimensions",
    "Exponents",
    "NeededWidth",
    "ScalingRecord",
    "ScalingSummary",
    "SettingRecord",
    "SettingsSummary",
]


@dataclasses.dataclass(frozen=True)
class Dimensions(Generic[N]):
    """Effective dimensions of the matrices that govern each matching method at one layer.

    Attributes:
      leaf: path name of the layer's weight.
      weights: of WᵀW, where W is the weight of the layer.
      covariance: of W Σ Wᵀ, where Σ is the second moment of what enters the layer.
      activations: of the second moment of the layer's own activations.
    """

    leaf: str
    weights: N
    covariance: N
    activations: N


@dataclasses.dataclass(frozen=True)
class SettingRecord(PairRecord[N]):
    """One pair of networks of one way of training (``optimal_transport``).

    Attributes:
      seeds: see `PairRecord`.
      setting: name of the way of training.
      layers: effective dimensions of each layer of network A whose units are matched.
      distance: Wasserstein-2 distance of the first layers, relative to the norm of A's neurons.
      covariance_distance: the same in the metric of the data's second moment.
      dependence: z-score of the test of whether the neurons of the first layers are independent.
      p_value: p-value of that test.
      methods: as in `MethodsRecord`.
      layer_losses: by method, for each of `layers`, the test loss of A with the mean of that layer of A and
        of P[B] in place of its own, in nats.
    """

    parts: ClassVar = ("methods", None)

    setting: str
    layers: tuple[Dimensions[N], ...]
    distance: N
    covariance_distance: N
    dependence: N
    p_value: N
    methods: Mapping[str, MatchRecord[N]]
    layer_losses: Mapping[str, tuple[N, ...]]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Rank correlation of an effective dimension with what matching leaves, over one family of settings.

    Attributes:
      midpoint_loss: with the test loss of the network at the midpoint, over pairs.
      loss_barrier: with the test loss barrier; `None` over layers, for which there is none.
    """

    midpoint_loss: Interval
    loss_barrier: Interval | None


@dataclasses.dataclass(frozen=True)
class SettingsSummary:
    """Mean and spread of every number in each setting, and what goes with what.

    Attributes:
      settings: mean and spread in each setting.
      correlations: of effective dimensions, by family of settings and by method.
      dependence: the same of the z-score of dependence with what weight matching leaves, over the settings of
        rates and optimisers; `None` for fewer than three of them.
    """

    settings: tuple[SettingRecord[Interval], ...]
    correlations: Mapping[str, Mapping[str, Correlation]]
    dependence: Correlation | None


@dataclasses.dataclass(frozen=True)
class ScalingRecord(PairRecord[N]):
    """One pair of networks of one number of inputs, depth and width (``width_scaling``).

    Attributes:
      seeds: see `PairRecord`.
      inputs: number of inputs.
      depth: number of hidden layers.
      width: width of each hidden layer.
      unaligned: barriers of the path between A and B.
      aligned: barriers of the path between A and P[B], by weight matching.
      distances: for each hidden layer the Wasserstein-2 distance between the neurons of A and those of P[B]
        in the metric of Σ, the second moment of what enters the layer in A, relative to the root mean square
        norm of A's neurons in that metric.
      dimensions: for each hidden layer the effective dimension of W Σ Wᵀ.
    """

    inputs: int
    depth: int
    width: int
    unaligned: Metrics[N]
    aligned: Metrics[N]
    distances: tuple[N, ...]
    dimensions: tuple[N, ...]


@dataclasses.dataclass(frozen=True)
class NeededWidth:
    """The width from which on networks of one number of inputs and depth are connected.

    Attributes:
      inputs: number of inputs.
      depth: number of hidden layers.
      tolerance: the test loss barrier up to which they count as connected, in nats.
      onset: that width.
      distance: relative Wasserstein-2 distance of the first layers at the first measured width from there on,
        mean over pairs; NaN where no width is enough.
      dimension: effective dimension of the first layer there.
    """

    inputs: int
    depth: int
    tolerance: float
    onset: Onset
    distance: float
    dimension: float


@dataclasses.dataclass(frozen=True)
class Exponents:
    """The law width = c · d^a · ε^-b that fits the widths needed by two-layer networks, over pairs.

    Attributes:
      dimension: exponent a of the number of inputs.
      tolerance: exponent b of the inverse tolerance.
    """

    dimension: Interval
    tolerance: Interval


@dataclasses.dataclass(frozen=True)
class ScalingSummary:
    """Mean and spread of every number, and the widths that are needed.

    Attributes:
      settings: mean and spread for each number of inputs, depth and width.
      needed: the width needed for each number of inputs, depth and tolerance.
      exponents: how it grows; `None` where fewer than three widths of two-layer networks are known.
    """

    settings: tuple[ScalingRecord[Interval], ...]
    needed: tuple[NeededWidth, ...]
    exponents: Exponents | None
