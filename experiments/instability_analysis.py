"""Children of two networks, aligned by the permutation of their parents (arXiv 2404.06498, section 5.1).

The instability analysis of Frankle et al. 2020: children leave their parent at epoch t and train to the end
with data orders of their own. Siblings A¹ and A² are compared as they are, children A¹ and B¹ of different
parents under P_end, which was found for the parents at the end of training.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.harness import experiment
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.matchers import Matcher, build_matchers, check_methods
from experiments.harness.pairs import Pair
from experiments.harness.paths import METRICS, Meter, Segments, barriers, endpoints
from experiments.instability_report import judge, report, summarise_curves, tidy_rows
from experiments.sgd_instability_figures import draw_instability
from rebasin.permutation import Permutation
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "Config"]

# For each spawn epoch: A¹, A² and B¹.
_CHILDREN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      epochs: epochs at which children leave their parents, all before the last.
      onset_at_most: test error barrier, a fraction, up to which two networks count as linearly connected.
        Frankle et al. call networks stable below 2 %.
      num_eval: examples of each split on which segments are measured, `None` for all.
    """

    methods: tuple[str, ...]
    epochs: tuple[int, ...]
    onset_at_most: float
    num_eval: int | None

    def problems(self) -> list[str]:
        """Those of the base, then of what is added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        if not 0 <= self.onset_at_most < 1:
            problems.append(f"onset_at_most: wanted a fraction, got {self.onset_at_most}")
        last = self.recipe.epochs
        if list(self.epochs) != sorted(set(self.epochs) & set(range(last))) or not self.epochs:
            problems.append(f"epochs: wanted ascending epochs from 0 to {last - 1}, got {list(self.epochs)}")
        return problems

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """Those at which children part, and the last."""
        return (*self.epochs, self.recipe.epochs)

    @property
    def spawn_epochs(self) -> tuple[int, ...]:
        """All of `epochs`."""
        return self.epochs

    def is_complete(self, record: Mapping[str, Any]) -> bool:
        """Whether children of all epochs are in."""
        return record["epochs"] == list(self.epochs)


def _build_measure(setup: Setup[Config]) -> Measure:
    config = setup.config
    meter = Meter(setup.model, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: dict[str, Any] | None
    ) -> Iterator[dict[str, Any]]:
        family = _Family(trained, setup, meter, matchers)
        record = begun or family.parents()
        missing = [epoch for epoch in config.epochs if epoch not in record["epochs"]]
        # By epochs of training, of which a child has the fewer the later it leaves.
        total = _CHILDREN * sum(config.recipe.epochs - epoch for epoch in missing)
        with setup.reporter.stage(f"epochs of children, {pair}", total) as advance:
            for epoch in missing:
                _extend(record, epoch, family.children(epoch, advance))
                yield record

    return measure


class _Family:
    """Two parents and their children."""

    def __init__(
        self, pair: list[Trajectory], setup: Setup[Config], meter: Meter, matchers: Mapping[str, Matcher]
    ) -> None:
        self.pair, self.setup, self.meter, self.matchers = pair, setup, meter, matchers
        self.segments = Segments(meter, setup.spec, pair[0].last, pair[1].last)
        self.p_end = self._match(pair[0].last, pair[1].last)

    def _match(self, params_a: Any, params_b: Any) -> Mapping[str, Permutation]:
        began = time.perf_counter()
        found = {name: match(params_a, params_b).permutation for name, match in self.matchers.items()}
        self.setup.results.add_seconds("matching", time.perf_counter() - began)
        return found

    def parents(self) -> dict[str, Any]:
        """What the record of a replicate begins with."""
        began = time.perf_counter()
        record = {
            "epochs": [],
            "parents": {
                "endpoints": endpoints(self.segments.unaligned),
                "unaligned": barriers(self.segments.unaligned),
                **{name: barriers(self.segments.curve(p)) for name, p in self.p_end.items()},
            },
            "siblings": {metric: [] for metric in METRICS},
            "unaligned": {metric: [] for metric in METRICS},
            "children": {name: {metric: [] for metric in METRICS} for name in self.p_end},
            "at_end": {name: {metric: [] for metric in METRICS} for name in self.p_end},
        }
        self.setup.results.add_seconds("barriers", time.perf_counter() - began)
        return record

    def children(self, epoch: int, advance: Callable[[], None]) -> dict[str, Any]:
        """Barriers of the children that part at an epoch, and of the parents under its permutation.

        Args:
          epoch: the epoch.
          advance: called for each epoch that a child is trained.
        """
        (a, b), child = self.pair, self.setup.networks.child
        tree_a, tree_b = a[epoch], b[epoch]
        a1, a2 = (child(a, tree_a, epoch, number, advance) for number in (1, 2))
        b1 = child(b, tree_b, epoch, 1, advance)
        p_t = self._match(tree_a, tree_b)
        began = time.perf_counter()
        between = Segments(self.meter, self.setup.spec, a1, b1)
        measured = {
            "siblings": barriers(self.meter(a1, a2)),
            "unaligned": barriers(between.unaligned),
            "children": {name: barriers(between.curve(p)) for name, p in self.p_end.items()},
            "at_end": {name: barriers(self.segments.curve(p)) for name, p in p_t.items()},
        }
        self.setup.results.add_seconds("barriers", time.perf_counter() - began)
        return measured


def _extend(record: dict[str, Any], epoch: int, measured: Mapping[str, Any]) -> None:
    """Adds an epoch to all series of a record."""

    def append(series: Any, values: Any) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                append(series[key], value)
            else:
                series[key].append(value)

    append(record, measured)
    record["epochs"].append(epoch)


EXPERIMENT = Experiment(
    name="sgd_instability",
    build_measure=_build_measure,
    summarise=summarise_curves,
    judge=judge,
    csv="barriers.csv",
    rows=tidy_rows,
    figures={"sgd_instability.png": draw_instability},
    report=report,
    keep="ends",
)
