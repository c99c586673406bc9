"""The config and the records of experiments that prune networks level by level."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, cast, get_args

from experiments.harness.experiment import Config
from experiments.harness.methods import check_methods
from experiments.harness.networks import Pair
from experiments.harness.record import Endpoints, Metrics, N, PairRecord, check_names
from experiments.harness.statistics import Interval
from rebasin.errors import ConfigError
from rebasin.pruning import count_kept, level_sparsity, prunable_leaves
from rebasin.training.imp import Rewind
from rebasin.training.recipes import Recipe
from rebasin.trees import leaf_table

__all__ = [
    "MaskedPath",
    "PruningConfig",
    "SparseAligned",
    "SparseLevel",
    "SparseRecord",
    "TransportLevel",
    "TransportRecord",
    "TransportedMask",
    "WidthLevel",
    "WidthRecord",
    "WidthsSummary",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningConfig(Config):
    """The base of the configs of experiments that prune; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      levels: number of levels of pruning beside the dense networks.
      rewind_epoch: epoch to which every level returns.
      rewind: what returns to it, a `rebasin.training.imp.Rewind`.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
    """

    methods: tuple[str, ...]
    levels: int
    rewind_epoch: int
    rewind: str
    num_eval: int | None

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        if self.levels < 1:
            problems.append(f"levels: wanted at least 1, got {self.levels}")
        last = self.recipe.epochs
        if not 0 <= self.rewind_epoch < last:
            problems.append(f"rewind_epoch: wanted at least 0 and less than {last}, got {self.rewind_epoch}")
        if self.rewind not in get_args(Rewind):
            problems.append(f"rewind: wanted one of {', '.join(get_args(Rewind))}, got {self.rewind!r}")
        return problems

    def check_network(self, recipe: Recipe, shapes: Any) -> None:
        """Raise `ConfigError` if the last level would have fewer weights than leaves."""
        table, leaves = leaf_table(shapes), prunable_leaves(shapes)
        total = sum(math.prod(table[path].shape) for path in leaves)
        kept = count_kept(total, level_sparsity(self.levels))
        if kept < len(leaves):
            raise ConfigError(
                f"levels: level {self.levels} keeps {kept} of the {total} prunable weights of a network "
                f"({recipe.model}) of width {recipe.width}; wanted at least one for each of {len(leaves)} "
                "leaves"
            )

    @property
    def rewind_kind(self) -> Rewind:
        """What returns to the rewind epoch, as a value that has been checked."""
        return cast(Rewind, self.rewind)

    @property
    def figure_note(self) -> str:
        """What figures say of the rewinding, and of their bands."""
        what = self.rewind.replace("_", " ")
        return f"{what} rewound to epoch {self.rewind_epoch}; bands: ± standard deviation"

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """The epoch to which levels return, and the last one."""
        return (self.rewind_epoch, self.recipe.epochs)

    @property
    def further_networks(self) -> int:
        """The sparse networks of both parents."""
        return 2 * self.levels

    @property
    def wanted_parts(self) -> tuple[int, ...]:
        """The levels, that of the dense networks included."""
        return tuple(range(self.levels + 1))

    def misfits(self, record: Any, pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods."""
        problems = super().misfits(record, pair)
        for level in record.levels:
            problems += check_names(f"levels.{level.level}.methods", level.methods, self.methods)
        return problems


@dataclasses.dataclass(frozen=True)
class MaskedPath(Generic[N]):
    """The path between a pruned network and another one that is pruned and not trained again.

    A barrier to a network that pruning has broken is low and means little, as its chord is high.

    Attributes:
      barriers: barriers of the path.
      network: metrics of the network that is not trained again.
    """

    barriers: Metrics[N]
    network: Metrics[N]


@dataclasses.dataclass(frozen=True)
class SparseAligned(Generic[N]):
    """One matching method at one level i of pruning.

    P is the permutation that it finds for the dense networks A and B, P⁽ⁱ⁾ that for the sparse networks A⁽ⁱ⁾
    and B⁽ⁱ⁾, and M_A the mask of A⁽ⁱ⁾. The names of the comparisons are those of arXiv 2404.06498, App. F.

    Attributes:
      gold_standard: barriers of the path between A⁽ⁱ⁾ and P[B⁽ⁱ⁾].
      sparse: barriers of the path between A⁽ⁱ⁾ and P⁽ⁱ⁾[B⁽ⁱ⁾].
      transported: the path between A⁽ⁱ⁾ and P[B] under M_A.
      previous_work: the path between A⁽ⁱ⁾ and P⁽ⁱ⁾[B] under M_A.
      between_gold_standard: fraction of prunable weights that networks between A⁽ⁱ⁾ and P[B⁽ⁱ⁾] have.
      between_sparse: fraction of prunable weights that networks between A⁽ⁱ⁾ and P⁽ⁱ⁾[B⁽ⁱ⁾] have.
    """

    gold_standard: Metrics[N]
    sparse: Metrics[N]
    transported: MaskedPath[N]
    previous_work: MaskedPath[N]
    between_gold_standard: N
    between_sparse: N


@dataclasses.dataclass(frozen=True)
class SparseLevel(Generic[N]):
    """One level i of pruning of both networks of a pair.

    Attributes:
      level: the level i.
      density: fraction of prunable weights that A⁽ⁱ⁾ and B⁽ⁱ⁾ have.
      endpoints: metrics of A⁽ⁱ⁾ and B⁽ⁱ⁾.
      control: barriers of the path between A⁽ⁱ⁾ and B⁽ⁱ⁾.
      baseline: the path between A⁽ⁱ⁾ and B pruned in one shot to the same sparsity.
      between_control: fraction of prunable weights that networks between A⁽ⁱ⁾ and B⁽ⁱ⁾ have.
      methods: what each matching method makes of it, by the method's name.
    """

    level: int
    density: N
    endpoints: Endpoints[N]
    control: Metrics[N]
    baseline: MaskedPath[N]
    between_control: N
    methods: Mapping[str, SparseAligned[N]]


@dataclasses.dataclass(frozen=True)
class SparseRecord(PairRecord[N]):
    """Two sequences of pruned networks, level by level (``sparse_connectivity``).

    Attributes:
      seeds: see `PairRecord`.
      levels: the levels that are measured already, in ascending order; level 0 are the dense networks.
    """

    parts: ClassVar = ("levels", "level")

    levels: tuple[SparseLevel[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class TransportedMask(Generic[N]):
    """Network B, rewound and trained with the mask of network A under the permutations of one method.

    Attributes:
      transported: metrics under the permutation from the dense networks.
      previous_work: metrics under the permutation from the sparse networks of the level.
    """

    transported: Metrics[N]
    previous_work: Metrics[N]


@dataclasses.dataclass(frozen=True)
class TransportLevel(Generic[N]):
    """Network B, rewound and trained with several masks of one sparsity. The names are those of App. F.

    Attributes:
      level: the level of pruning.
      density: fraction of prunable weights that all masks keep.
      ticket_a: metrics of A with its own mask, found by iterative pruning.
      gold_standard: metrics of B with its own mask, found by iterative pruning.
      control: metrics of B with the mask of A as it is.
      baseline: metrics of B with the mask of one-shot pruning.
      random: metrics of B with the mask of A after its entries were shuffled within every leaf.
      methods: metrics of B with the mask of A in B's order of units, by matching method.
    """

    level: int
    density: N
    ticket_a: Metrics[N]
    gold_standard: Metrics[N]
    control: Metrics[N]
    baseline: Metrics[N]
    random: Metrics[N]
    methods: Mapping[str, TransportedMask[N]]


@dataclasses.dataclass(frozen=True)
class TransportRecord(PairRecord[N]):
    """Masks of one network in another, level by level (``mask_transport``).

    Attributes:
      seeds: see `PairRecord`.
      levels: the levels that are measured already, in ascending order; at level 0 nothing is pruned.
    """

    parts: ClassVar = ("levels", "level")

    levels: tuple[TransportLevel[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class WidthLevel(Generic[N]):
    """Network B of one width, rewound and trained in a new data order with masks of one sparsity.

    Attributes:
      level: the level of pruning; at level 0 all networks are the dense B.
      density: fraction of prunable weights that all masks keep.
      own: metrics of B with its own mask, found by iterative pruning.
      unpermuted: metrics of B with the mask of A as it is.
      methods: metrics of P[B] with the mask of A, by the method that found P for the dense networks.
    """

    level: int
    density: N
    own: Metrics[N]
    unpermuted: Metrics[N]
    methods: Mapping[str, Metrics[N]]


@dataclasses.dataclass(frozen=True)
class WidthRecord(PairRecord[N]):
    """Masks of one network in another of the same width, level by level (``mask_transport_widths``).

    Attributes:
      seeds: see `PairRecord`.
      width: width of both networks.
      levels: the levels that are measured already, in ascending order.
    """

    parts: ClassVar = ("levels", "level")

    width: int
    levels: tuple[WidthLevel[N], ...] = ()


@dataclasses.dataclass(frozen=True)
class WidthsSummary:
    """Mean and spread of every number at each width, in ascending order."""

    widths: tuple[WidthRecord[Interval], ...]
