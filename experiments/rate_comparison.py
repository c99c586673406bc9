"""Matching methods against the learning rate (arXiv 2310.19103, section 6).

Networks trained at low learning rates stay close to their initialisation, where weights say little about what
units do: there, weighing them by the covariance of the activations should help most.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from experiments.harness import experiment
from experiments.harness.comparison import BASELINE, Bench
from experiments.harness.console import Reporter, cell
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.pairs import Pair
from experiments.harness.results import Claim, Results, claim, describe_mean
from experiments.harness.statistics import student_interval
from experiments.learning_rates_figures import draw_rates
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "METHODS", "PAPER_RATES", "Config"]

METHODS = ("weights", "covariance", "activations")

# Test loss at the midpoint for an MLP on MNIST, read off the paper's plot at these learning rates.
PAPER_RATES = (1e-4, 4e-4, 1.6e-3, 6.3e-3, 2.5e-2, 0.1)
_PAPER = {
    "weights": (2.05, 1.40, 1.27, 0.89, 0.385, 0.084),
    "covariance": (1.35, 0.55, 0.405, 0.255, 0.14, 0.099),
    "activations": (1.22, 0.47, 0.32, 0.177, 0.126, 0.10),
}

# Measures in the order of the file.
_MEASURES = ("midpoint_loss", "midpoint_error", "loss_barrier", "error_barrier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      rates: peak learning rates, ascending, each in place of the recipe's.
      num_test: test examples on which segments are measured, `None` for all.
    """

    needs_midpoint: ClassVar[bool] = True

    rates: tuple[float, ...]
    num_test: int | None

    def problems(self) -> list[str]:
        """Those of the base, then of what is added here."""
        problems = super().problems()
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            problems.append(f"rates: wanted ascending positive learning rates, got {list(self.rates)}")
        return problems

    @property
    def pairs(self) -> list[Pair]:
        """One for each replicate and rate, replicates outermost."""
        recipes = [dataclasses.replace(self.recipe, peak_learning_rate=rate) for rate in self.rates]
        return [pair._replace(recipe=recipe) for pair in super().pairs for recipe in recipes]


def _build_measure(setup: Setup[Config]) -> Measure:
    bench = Bench(setup, METHODS, num_test=setup.config.num_test)

    def measure(pair: Pair, trained: list[Trajectory], begun: object) -> Iterator[dict[str, Any]]:
        rate = pair.recipe.peak_learning_rate
        yield {"rate": rate, "methods": bench.measure(trained, f"rate {rate:g}, {pair}")}

    return measure


def _values(
    curves: Sequence[Mapping[str, Any]], rate: float, name: str, measure: str = "midpoint_loss"
) -> np.ndarray:
    """A measure of every replicate."""
    return np.array([c["methods"][name]["plain"][measure] for c in curves if c["rate"] == rate])


def _summarise(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval and standard deviation over replicates, by method and rate."""

    def by_rate(name: str, measure: str) -> list[dict[str, float]]:
        return [student_interval(_values(curves, r, name, measure))._asdict() for r in config["rates"]]

    return {
        "rates": config["rates"],
        "methods": {
            name: {measure: by_rate(name, measure) for measure in _MEASURES} for name in (BASELINE, *METHODS)
        },
    }


def _judge(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The order of the methods at the lower half of the rates, by rules set before the runs."""
    low = config["rates"][: (len(config["rates"]) + 1) // 2]
    claims = []
    for better, worse in (("covariance", "weights"), ("activations", "covariance")):
        gaps = [_values(curves, rate, worse) - _values(curves, rate, better) for rate in low]
        paper = float(np.mean(_PAPER[worse][:3]) - np.mean(_PAPER[better][:3]))
        claims.append(
            claim(
                f"{better}_better_than_{worse}",
                f"at learning rates up to {low[-1]:g}, the midpoint's test loss is lower after {better} than "
                f"after {worse} matching: the mean difference is above 0, and so is its 95 % interval",
                f"{paper:.2f} (mean of 1e-4, 4e-4 and 1.6e-3, read off the plot of section 6)",
                np.mean(gaps, axis=0),
            )
        )
    return claims


def _tidy_rows(results: Results) -> Iterator[dict[str, Any]]:
    """One row for each rate, pair and method."""
    for curve in results.curves:
        for name, record in curve["methods"].items():
            yield {
                "rate": f"{curve['rate']:g}",
                "seed": curve["seeds"][0],
                "method": name,
                "seconds": f"{record['seconds']:.4g}",
                **{measure: f"{record['plain'][measure]:.6g}" for measure in _MEASURES},
            }


def _report(results: Results, reporter: Reporter) -> None:
    """Prints the table of rates."""
    methods = results.summary["methods"]
    rows = [[f"{rate:g}"] for rate in results.summary["rates"]]
    for measure in ("midpoint_loss", "error_barrier"):
        for own in methods.values():
            for row, interval in zip(rows, own[measure], strict=True):
                row.append(cell(interval, percent=measure == "error_barrier"))
    short = {"covariance": "cov.", "activations": "act."}
    columns = [f"{what}\n{short.get(name, name)}" for what in ("loss ½", "error") for name in methods]
    reporter.say(f"\n{describe_mean(results)} at each peak learning rate, test data")
    reporter.table(["\nrate", *columns], rows)
    reporter.say("loss ½: half way between the networks; error: barrier in %; none: as trained")


EXPERIMENT = Experiment(
    name="learning_rates",
    build_measure=_build_measure,
    summarise=_summarise,
    judge=_judge,
    csv="rates.csv",
    rows=_tidy_rows,
    figures={"learning_rates.png": draw_rates},
    report=_report,
)
