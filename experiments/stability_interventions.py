"""Stability at initialisation is neither necessary nor sufficient for alignment.

Reproduces appendix H.4 of arXiv 2404.06498 (figures 6, 19, 20). Pairs of networks A and B are trained from
different seeds in two regimes: stability_1 (no warm-up, a peak learning rate of 0.001, weight decay) and
stability_2 (one epoch of warm-up, a peak learning rate of 0.1, no weight decay). The instability at
initialisation is the barrier at the end between two siblings, networks that have the initialisation of A and
data orders of their own; a regime is stable if it is at most --stable_at_most. The barrier between A_t and
P_end[B_t], the permutation from the last epoch, is measured at every recorded epoch t. The run prints a table
for each regime and the paper's claims with a verdict each.

  python -m experiments.stability_interventions --preset=digits --output_dir=results/digits_mlp_stability
  python -m experiments.stability_interventions --preset=cpu --model=mlp --replicates=3 --num_eval=2000
    --num_alphas=13 --output_dir=results/mnist_mlp_stability

Writes results.json, barriers.csv and stability_interventions.png (figures 6, 19, 20). Training dominates:
four networks for each replicate and regime. A finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import stability_interventions_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.matched_epochs import (
    EpochsConfig,
    MatchedEpochs,
    StabilityEpoch,
    StabilityRecord,
    StabilitySummary,
)
from experiments.harness.methods import PAPER_METHODS, build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints
from experiments.harness.presets import Thresholds
from experiments.harness.record import Metrics, added, check_names, summarise
from experiments.harness.results import Claim, Schema, claim
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "STABILITY_REGIMES", "StabilityConfig", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
_STABLE = flags.DEFINE_float(
    "stable_at_most",
    0.02,
    "Test error barrier between siblings, a fraction, up to which a regime is stable.",
    lower_bound=0,
)

# The regimes of appendix H.4, by their names in `rebasin.training.recipes.REGIMES`.
STABILITY_REGIMES = ("stability_1", "stability_2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityConfig(EpochsConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      recipe: how networks are trained in the first regime.
      second: how networks are trained in the second regime.
      stable_at_most: test error barrier between siblings, a fraction, up to which a regime is stable.
      thresholds: barriers against which claims are judged.
    """

    second: Recipe
    stable_at_most: float
    thresholds: Thresholds

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = super().problems()
        for name in ("dataset", "model", "width", "epochs", "num_train"):
            ours, theirs = getattr(self.recipe, name), getattr(self.second, name)
            if ours != theirs:
                problems.append(f"second: wanted the {name} of the first recipe, {ours!r}, got {theirs!r}")
        if not 0 <= self.stable_at_most < 1:
            problems.append(f"stable_at_most: wanted a fraction, got {self.stable_at_most}")
        return problems

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """The recorded epochs, and the initialisation, from which siblings start."""
        return tuple(sorted({0, *self.epochs}))

    @property
    def further_networks(self) -> int:
        """The two siblings of each pair."""
        return 2

    @property
    def pairs(self) -> list[Pair]:
        """One pair for each replicate and regime, both regimes of a replicate in a row."""
        recipes = (self.recipe, self.second)
        return [pair._replace(recipe=recipe) for pair in super().pairs for recipe in recipes]

    def regime(self, pair: Pair) -> str:
        """Return the name of the regime of a pair."""
        return STABILITY_REGIMES[pair.recipe != self.recipe]

    def misfits(self, record: StabilityRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of regime and methods."""
        problems = super().misfits(record, pair)
        if record.regime != self.regime(pair):
            problems.append(f"regime: wanted {self.regime(pair)}, got {record.regime}")
        for part in record.epochs:
            problems += check_names(f"epochs.{part.epoch}.aligned", part.aligned, self.methods)
        return problems


def _build_measure(setup: Setup[StabilityConfig]) -> Measure[StabilityRecord[float]]:
    config = setup.config
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)

    def measure_siblings(pair: Pair, trajectory: Trajectory) -> Metrics[float]:
        title = f"epochs of siblings, {config.regime(pair)}, {pair}"
        with setup.reporter.stage(title, 2 * config.recipe.epochs) as advance:
            a1, a2 = (
                setup.networks.child(trajectory, trajectory[0], 0, number, advance) for number in (1, 2)
            )
        with setup.seconds.count("barriers"):
            return barriers(meter(a1, a2))

    def measure(
        pair: Pair, trained: list[Trajectory], begun: StabilityRecord[float] | None
    ) -> Iterator[StabilityRecord[float]]:
        regime = config.regime(pair)
        record = begun or StabilityRecord(pair.seeds, regime, measure_siblings(pair, trained[0]))
        epochs = MatchedEpochs(setup, matchers, pair, trained)
        missing = [t for t in config.epochs if t not in record.part_keys]
        with setup.reporter.stage(f"epochs of {regime}, {pair}", len(missing)) as advance:
            for t in missing:
                p_end = epochs.permutations(config.epochs[-1])
                with setup.seconds.count("barriers"):
                    paths = Paths(meter, setup.spec, *epochs.networks(t))
                    aligned = {name: paths.barriers(p) for name, p in p_end.items()}
                ends, unaligned = endpoints(paths.unaligned), barriers(paths.unaligned)
                record = added(record, StabilityEpoch(t, ends, unaligned, aligned))
                yield record
                advance()

    return measure


def _of(records: Sequence[Any], regime: str) -> list[Any]:
    """Return the records of one regime."""
    return [record for record in records if record.regime == regime]


def _summarise(config: StabilityConfig, records: Sequence[StabilityRecord[float]]) -> StabilitySummary:
    """Return mean, 95 % interval and standard deviation over replicates in each regime."""
    return StabilitySummary(tuple(summarise(_of(records, regime)) for regime in STABILITY_REGIMES))


def judge(config: StabilityConfig, records: Sequence[StabilityRecord[float]]) -> list[Claim]:
    """Judge the claims of appendix H.4, on test error barriers, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate and regime.
    """
    first, second = (_of(records, regime) for regime in STABILITY_REGIMES)
    stable, limits = config.stable_at_most, config.thresholds
    siblings = [np.array([record.siblings.test_error for record in own]) for own in (first, second)]
    claims = [
        claim(
            "first_regime_is_stable",
            f"stability_1: siblings end with a mean test error barrier of at most {stable:.0%}",
            "stable at initialisation (appendix H.4, figure 19)",
            siblings[0],
            siblings[0].mean() <= stable,
        ),
        claim(
            "second_regime_is_unstable",
            f"stability_2: siblings end with a mean test error barrier above {stable:.0%}",
            "not stable at initialisation (appendix H.4, figure 20)",
            siblings[1],
            siblings[1].mean() > stable,
        ),
    ]
    for method in config.methods:
        failed = np.array([record.epochs[-1].aligned[method].test_error for record in first])
        under_end = np.array([[p.aligned[method].test_error for p in record.epochs] for record in second])
        worst = int(under_end.mean(axis=0).argmax())
        claims += [
            claim(
                f"first_regime_cannot_be_aligned_{method}",
                f"stability_1, {method}: under P_end the barrier at the end is above "
                f"{limits.end_at_most:.0%}",
                "both matchings fail to find a permutation (figure 19)",
                failed,
                failed.mean() > limits.end_at_most,
            ),
            claim(
                f"second_regime_can_be_aligned_{method}",
                f"stability_2, {method}: under P_end the barrier is at most "
                f"{limits.any_epoch_at_most:.0%} at every epoch (highest at epoch {config.epochs[worst]})",
                "activation matching connects the entire trajectories (figure 20)",
                under_end[:, worst],
                under_end[:, worst].mean() <= limits.any_epoch_at_most,
            ),
        ]
    return claims


EXPERIMENT = Experiment(
    schema=Schema("stability_interventions", StabilityConfig, StabilityRecord[float], StabilitySummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={"stability_interventions.png": figures.draw_regimes},
    report=figures.report,
    keep="ends",
)


def build_config() -> StabilityConfig:
    """Build the config that the flags describe."""
    choice, second = (options.choose(regime) for regime in STABILITY_REGIMES)
    return StabilityConfig(
        **choice.fields,
        second=second.fields["recipe"],
        methods=options.chosen_methods(PAPER_METHODS),
        epochs=options.choose_epochs_with_last(None, choice.preset.epochs or (), choice.last),
        num_eval=choice.num_eval,
        stable_at_most=_STABLE.value,
        thresholds=choice.preset.thresholds,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
