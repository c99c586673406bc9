"""The permutation of two parents aligns their children from the onset of linear connectivity on.

Reproduces the second half of section 5.1 of arXiv 2404.06498 (figure 1 right, figures 8 and 9 column 3),
after the instability analysis of Frankle et al. 2020 (arXiv 1912.05671). Pairs of parents A and B are
trained from different seeds. At epoch t the children A¹, A² and B¹ leave them and train to the end with
data orders of their own. Barriers are measured between the siblings A¹ and A², between the parents, and
between the children A¹ and B¹ under P_end, the permutation that was found for the parents at the end. The
onset of linear connectivity is the epoch from which on siblings have a test error barrier of at most
--onset_at_most. The run prints a table and the paper's claims with a verdict each.

  python -m experiments.sgd_instability --preset=digits --output_dir=results/digits_mlp_instability
  python -m experiments.sgd_instability --preset=cpu --model=vgg16 --replicates=2 --num_alphas=13
    --num_eval=500 --output_dir=results/cifar10_vgg16_instability

On two CPU cores digits take 2 minutes and VGG-16 takes 41.

Expected on digits: siblings are stable from epoch 0 on (1.1 %), so that the claim of early instability fails;
children under P_end have 5.3 % from epoch 0 and 0.8 % from epoch 20, like their parents. Expected on VGG-16:
an onset at epoch 2.7 of 10.

Writes results.json, barriers.csv and sgd_instability.png. Training dominates: three networks for each
replicate and epoch of --spawn_epochs. A finished run of the same options is only drawn anew.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import sgd_instability_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Config, Experiment, Measure, Setup
from experiments.harness.methods import PAPER_METHODS, Matcher, build_matchers, check_methods
from experiments.harness.networks import CHILDREN, Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints
from experiments.harness.record import (
    FamilyRecord,
    FamilySummary,
    ParentsRecord,
    SpawnRecord,
    added,
    check_names,
    summarise,
)
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Onset, mean_onset
from rebasin.permutation import Permutation
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "InstabilityConfig", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
_SPAWN = flags.DEFINE_list(
    "spawn_epochs", None, "Epochs at which children part, for example 0,1,2,5; by default the preset's."
)
_ONSET = flags.DEFINE_float(
    "onset_at_most",
    0.02,
    "Test error barrier, a fraction, up to which siblings are linearly connected.",
    lower_bound=0,
)

# By how much the barrier of children may exceed that of their parents and count as equally low.
_MARGIN = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstabilityConfig(Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      epochs: epochs at which children leave their parents in ascending order, all before the last epoch.
      onset_at_most: test error barrier, a fraction, up to which two networks count as linearly connected.
        Frankle et al. call networks stable below 2 %.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
    """

    methods: tuple[str, ...]
    epochs: tuple[int, ...]
    onset_at_most: float
    num_eval: int | None

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        if not 0 <= self.onset_at_most < 1:
            problems.append(f"onset_at_most: wanted a fraction, got {self.onset_at_most}")
        last = self.recipe.epochs
        if list(self.epochs) != sorted(set(self.epochs) & set(range(last))) or not self.epochs:
            problems.append(f"epochs: wanted ascending epochs from 0 to {last - 1}, got {list(self.epochs)}")
        return problems

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """The epochs at which children leave, and the last one."""
        return (*self.epochs, self.recipe.epochs)

    @property
    def spawn_epochs(self) -> tuple[int, ...]:
        """All of `epochs`."""
        return self.epochs

    @property
    def wanted_parts(self) -> tuple[int, ...]:
        """The epochs at which children leave."""
        return self.epochs

    def misfits(self, record: FamilyRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods."""
        problems = super().misfits(record, pair)
        problems += check_names("parents.aligned", record.parents.aligned, self.methods)
        for spawn in record.spawns:
            for name in ("children", "at_end"):
                where = f"spawns.{spawn.epoch}.{name}"
                problems += check_names(where, getattr(spawn, name), self.methods)
        return problems


def _build_measure(setup: Setup[InstabilityConfig]) -> Measure[FamilyRecord[float]]:
    config = setup.config
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: FamilyRecord[float] | None
    ) -> Iterator[FamilyRecord[float]]:
        family = _Family(pair, trained, setup, meter, matchers)
        record = begun or FamilyRecord(pair.seeds, family.measure_parents())
        missing = [t for t in config.epochs if t not in [part.epoch for part in record.spawns]]
        # Progress counts epochs of training, of which a child has the fewer the later it leaves.
        total = len(CHILDREN) * sum(config.recipe.epochs - t for t in missing)
        with setup.reporter.stage(f"epochs of children, {pair}", total) as advance:
            for t in missing:
                record = added(record, family.measure_children(t, advance))
                yield record

    return measure


class _Family:
    """Two parents and their children.

    Args:
      pair: both parents.
      trained: trajectories of both parents.
      setup: what the experiment measures with.
      meter: measures paths.
      matchers: function of each matching method.
    """

    def __init__(
        self,
        pair: Pair,
        trained: Sequence[Trajectory],
        setup: Setup[InstabilityConfig],
        meter: PathMeter,
        matchers: Mapping[str, Matcher],
    ) -> None:
        self._trained, self._setup, self._meter, self._matchers = trained, setup, meter, matchers
        self._key = pair.key
        params_a, params_b = (trajectory.last for trajectory in trained)
        self._paths = Paths(meter, setup.spec, params_a, params_b)
        self._p_end = self._match(params_a, params_b)

    def _match(self, params_a: Any, params_b: Any) -> dict[str, Permutation]:
        with self._setup.seconds.count("matching"):
            return {
                name: match(params_a, params_b, key=self._key).permutation
                for name, match in self._matchers.items()
            }

    def measure_parents(self) -> ParentsRecord[float]:
        """Measure the parents at the end of training."""
        with self._setup.seconds.count("barriers"):
            return ParentsRecord(
                endpoints=endpoints(self._paths.unaligned),
                unaligned=barriers(self._paths.unaligned),
                aligned={name: barriers(self._paths.curve(p)) for name, p in self._p_end.items()},
            )

    def measure_children(self, epoch: int, advance: Callable[[], None]) -> SpawnRecord[float]:
        """Train and measure the children that leave at an epoch, and the parents under its permutation.

        Args:
          epoch: epoch at which the children leave.
          advance: called for each epoch that a child is trained.
        """
        trees = [trajectory[epoch] for trajectory in self._trained]
        a1, a2, b1 = (
            self._setup.networks.child(self._trained[parent], trees[parent], epoch, number, advance)
            for parent, number in CHILDREN
        )
        p_t = self._match(*trees)
        with self._setup.seconds.count("barriers"):
            between = Paths(self._meter, self._setup.spec, a1, b1)
            return SpawnRecord(
                epoch=epoch,
                siblings=barriers(self._meter(a1, a2)),
                unaligned=barriers(between.unaligned),
                children={name: barriers(between.curve(p)) for name, p in self._p_end.items()},
                at_end={name: barriers(self._paths.curve(p)) for name, p in p_t.items()},
            )


def _summarise(config: InstabilityConfig, records: Sequence[FamilyRecord[float]]) -> FamilySummary:
    """Return mean, 95 % interval and standard deviation over replicates, and the onset with its range."""
    return FamilySummary(_onset(config, records), summarise(records))


def _onset(config: InstabilityConfig, records: Sequence[FamilyRecord[float]]) -> Onset:
    """Return the onset of linear connectivity."""
    return mean_onset(config.epochs, _siblings(records).tolist(), config.onset_at_most)


def _siblings(records: Sequence[FamilyRecord[float]]) -> np.ndarray:
    """Return the test error barriers between siblings, ``[replicates, epochs]``."""
    return np.array([[spawn.siblings.test_error for spawn in record.spawns] for record in records])


def judge(config: InstabilityConfig, records: Sequence[FamilyRecord[float]]) -> list[Claim]:
    """Judge the claims of section 5.1 about children, on test error barriers, by rules set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.
    """
    epochs, limit = config.epochs, config.onset_at_most
    siblings, found = _siblings(records), _onset(config, records)
    exists = math.isfinite(found.mean_curve)
    claims = [
        claim(
            "unstable_at_first",
            f"siblings that part at epoch {epochs[0]} end with a test error barrier above {limit:.0%}",
            "this recipe makes networks that are unstable at initialisation (appendix D)",
            siblings[:, 0],
            siblings[:, 0].mean() > limit,
        ),
        Claim(
            "onset_of_linear_connectivity",
            f"siblings have a mean barrier of at most {limit:.0%} from some spawn epoch on (measured: that "
            "epoch, interpolated in log(1 + t); in brackets the range of the replicates' own)",
            # JSON has no infinity: no onset is NaN here and null there.
            paper="around epoch 5 of 150 (section 5.1)",
            measured=found.mean_curve if exists else math.nan,
            low=found.low if math.isfinite(found.low) else math.nan,
            high=found.high if math.isfinite(found.high) else math.nan,
            holds=exists,
        ),
    ]
    for method in config.methods:
        claims += _judge_method(config, records, method, found)
    return claims


def _judge_method(
    config: InstabilityConfig, records: Sequence[FamilyRecord[float]], method: str, found: Onset
) -> list[Claim]:
    """Judge the claims about children under P_end of one matching method."""
    epochs = config.epochs
    stable = [i for i, t in enumerate(epochs) if t >= found.mean_curve] or [len(epochs) - 1]
    children = np.array([[spawn.children[method].test_error for spawn in r.spawns] for r in records])
    parents = np.array([record.parents.aligned[method].test_error for record in records])
    excess = children - parents[:, None]
    worst = max(stable, key=lambda i: excess[:, i].mean())
    late = claim(
        f"parents_permutation_aligns_children_{method}",
        f"{method}: averaged over spawn epochs from the onset on ({epochs[stable[0]]} to {epochs[-1]}), "
        f"the barrier of children under the parents' P_end exceeds the parents' own by at most "
        f"{_MARGIN:.0%}: the 95 % interval of the difference ends below that (highest at epoch "
        f"{epochs[worst]}: {excess[:, worst].mean():.1%})",
        "P_end aligns the children throughout from the onset on (section 5.1, figure 1 right)",
        excess[:, stable].mean(axis=1),
    )
    # One replicate has no interval, so that its value decides.
    upper = late.high if len(records) > 1 else late.measured
    return [
        dataclasses.replace(late, holds=math.isfinite(found.mean_curve) and upper < _MARGIN),
        claim(
            f"parents_permutation_fails_before_{method}",
            f"{method}: children that part at epoch {epochs[0]} have a higher barrier under P_end than "
            "their parents: the 95 % interval of the difference is above 0",
            "P_end aligns children from the onset on; it is not claimed before (section 5.1)",
            excess[:, 0],
        ),
    ]


EXPERIMENT = Experiment(
    schema=Schema("sgd_instability", InstabilityConfig, FamilyRecord[float], FamilySummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={"sgd_instability.png": figures.draw_instability},
    report=figures.report,
    keep="ends",
)


def build_config() -> InstabilityConfig:
    """Build the config that the flags describe."""
    choice = options.choose("instability")
    return InstabilityConfig(
        **choice.fields,
        methods=options.chosen_methods(PAPER_METHODS),
        epochs=options.choose_epochs(_SPAWN.value, choice.preset.spawn_epochs, choice.last),
        onset_at_most=_ONSET.value,
        num_eval=choice.num_eval,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
