"""One permutation for two whole training trajectories (arXiv 2404.06498, section 5.1, appendices E and H.1).

Networks A_t and B_t are trained from different seeds. The permutation P_s, found at epoch s, is applied to
B_t and the segment to A_t is measured, for chosen epochs s and all recorded epochs t; s = end is the paper's
P_end. P_t is also measured at its own epoch t and at the end of training.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.harness import experiment
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.matchers import build_matchers, check_methods
from experiments.harness.pairs import Pair
from experiments.harness.paths import Meter
from experiments.harness.presets import Thresholds
from experiments.pair_analysis import PairAnalysis
from experiments.training_trajectories_figures import (
    draw_fixed_permutations,
    draw_permutations,
    draw_trajectories,
)
from experiments.trajectory_claims import judge
from experiments.trajectory_report import report, summarise_curves, tidy_rows
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      epochs: recorded epochs t; the last must be the recipe's.
      match_epochs: recorded epochs s whose permutations are applied at every t; with the last.
      num_eval: examples of each split on which segments are measured, `None` for all.
      thresholds: for the claims.
    """

    methods: tuple[str, ...]
    epochs: tuple[int, ...]
    match_epochs: tuple[int, ...]
    num_eval: int | None
    thresholds: Thresholds

    def problems(self) -> list[str]:
        """Those of the base, then of what is added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        last = self.recipe.epochs
        if list(self.epochs) != sorted(set(self.epochs)) or not self.epochs or self.epochs[0] < 0:
            problems.append(f"epochs: wanted ascending epochs from 0 on, got {list(self.epochs)}")
        elif self.epochs[-1] != last:
            problems.append(f"epochs: wanted the recipe's last, {last}, at the end, got {self.epochs[-1]}")
        if list(self.match_epochs) != sorted(set(self.match_epochs) & set(self.epochs) | {last}):
            problems.append(
                f"match_epochs: wanted ascending ones of epochs, with the last, got {list(self.match_epochs)}"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        """With the thresholds by name."""
        return {**super().to_json(), "thresholds": self.thresholds._asdict()}

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """The recorded ones."""
        return self.epochs


def _build_measure(setup: Setup[Config]) -> Measure:
    config = setup.config
    meter = Meter(setup.model, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)
    analysis = PairAnalysis(config.epochs, config.match_epochs, setup.spec, matchers, meter, setup.results)

    def measure(pair: Pair, trained: list[Trajectory], begun: object) -> Iterator[dict[str, Any]]:
        yield analysis.measure(trained, setup.reporter, f"measure {pair}")

    return measure


EXPERIMENT = Experiment(
    name="training_trajectories",
    build_measure=_build_measure,
    summarise=summarise_curves,
    judge=judge,
    csv="barriers.csv",
    rows=tidy_rows,
    figures={
        "training_trajectories.png": draw_trajectories,
        "fixed_permutations.png": draw_fixed_permutations,
        "permutations.png": draw_permutations,
    },
    report=report,
)
