"""Every matching method on the same pairs of trained networks, before and after REPAIR.

Each method finds its permutation of network B at the end of training; the segment to A is then measured on
test data, as it is, with the statistics of every layer repaired (arXiv 2211.08403), and, where the networks
have BatchNorm, with running statistics of its own for every network on it. The first row, ``none``, is the
pair as it was trained.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import rebasin
from experiments.compare_methods_figures import draw_methods
from experiments.harness import experiment
from experiments.harness.comparison import BASELINE, MEASURES, VARIANTS, Bench
from experiments.harness.console import Reporter, cell
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.matchers import check_methods
from experiments.harness.pairs import Pair
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import summarise
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "METHODS", "Config"]

METHODS = tuple(rebasin.METHODS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      num_test: test examples on which segments are measured, `None` for all.
      num_repair: training examples on which REPAIR and norms take statistics, of those that are matched on.
      num_steps: gradient steps of the methods that learn a permutation.
    """

    needs_midpoint: ClassVar[bool] = True

    methods: tuple[str, ...]
    num_test: int | None
    num_repair: int
    num_steps: int

    def problems(self) -> list[str]:
        """Those of the base, then of what is added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        if self.num_repair < 2:
            problems.append(f"num_repair: wanted at least 2 examples, got {self.num_repair}")
        if self.num_steps < 1:
            problems.append(f"num_steps: wanted at least 1, got {self.num_steps}")
        return problems


def _build_measure(setup: Setup[Config]) -> Measure:
    config = setup.config
    bench = Bench(
        setup,
        config.methods,
        num_test=config.num_test,
        num_steps=config.num_steps,
        num_repair=config.num_repair,
    )

    def measure(pair: Pair, trained: list[Trajectory], begun: object) -> Iterator[dict[str, Any]]:
        yield {"methods": bench.measure(trained, f"match {pair}")}

    return measure


def _summarise(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval and standard deviation over replicates, for every method."""

    def of_method(record: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: record[key] for key in ("seconds", "distance")}
        if record["objective"] is not None:
            found["objective"] = dict(zip(("start", "end"), record["objective"], strict=True))
        return found | {v: {measure: record[v][measure] for measure in MEASURES} for v in _variants(record)}

    names = (BASELINE, *config["methods"])
    return {"methods": {n: summarise([of_method(curve["methods"][n]) for curve in curves]) for n in names}}


def _tidy_rows(results: Results) -> Iterator[dict[str, Any]]:
    """One row for each replicate, method and variant of the segment."""
    for replicate, curve in enumerate(results.curves):
        for name, record in curve["methods"].items():
            for variant in _variants(record):
                yield {
                    "replicate": replicate,
                    "method": name,
                    "statistics": variant,
                    "seconds": f"{record['seconds']:.4g}",
                    "distance": f"{record['distance']:.6g}",
                    "objective": "" if record["objective"] is None else f"{record['objective'][-1]:.6g}",
                    **{measure: f"{record[variant][measure]:.6g}" for measure in MEASURES},
                }


def _report(results: Results, reporter: Reporter) -> None:
    """Prints the table of methods."""
    rows = []
    for name, summary in results.summary["methods"].items():
        known = name != BASELINE
        row = [
            name,
            f"{summary['objective']['end']['mean']:.4g}" if known else "-",
            _two_digits(summary["seconds"]["mean"]) if known else "-",
        ]
        for variant in _variants(summary):
            row += [cell(summary[variant][f"{m}_barrier"], percent=m == "error") for m in ("loss", "error")]
        rows.append(row)
    header = ["\nmethod", "own\nobjective", "\nseconds"]
    header += ["loss\nbarrier", "error\nbarrier", "loss,\nREPAIR", "error,\nREPAIR"]
    reporter.say(f"\n{describe_mean(results)}: barriers on test data, errors in %")
    reporter.table(header, [row[: len(header)] for row in rows])
    reporter.say("own objective: what the method maximises; seconds: a match, the first compiles;")
    reporter.say("REPAIR: with the statistics of every layer repaired; none: as trained")
    if len(rows[0]) > len(header):
        reporter.say("\nWith new running statistics of every norm")
        header = ["\nmethod", "loss\nbarrier", "error\nbarrier"]
        reporter.table(header, [[row[0], *row[-2:]] for row in rows])


EXPERIMENT = Experiment(
    name="compare_methods",
    build_measure=_build_measure,
    summarise=_summarise,
    csv="methods.csv",
    rows=_tidy_rows,
    figures={"compare_methods.png": draw_methods},
    report=_report,
)


def _variants(record: Mapping[str, Any]) -> list[str]:
    """Those of `VARIANTS` that were measured."""
    return [variant for variant in VARIANTS if variant in record]


def _two_digits(value: float) -> str:
    """Two digits at least, and no exponent."""
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
