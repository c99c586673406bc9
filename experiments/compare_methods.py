"""Compares every matching method on the same pairs of trained networks.

Puts the methods of several papers side by side: git-re-basin (arXiv 2209.04836: weights, activations,
straight_through), Peña et al. 2023 (2212.12042: sinkhorn), the OT paper (2310.19103: covariance) and C2M3
(2405.17897: frank_wolfe), each with and without REPAIR (2211.08403). Pairs of networks are trained from
different seeds, or found in --runs_dir. Every method finds its permutation of network B at the end of
training. The path to network A is then measured on test data as it is, with the statistics of every layer
repaired, and, where networks have BatchNorm, with new running statistics for every network on the path. The
row `none` is the pair as it was trained. The run prints a table.

  python -m experiments.compare_methods --preset=digits --output_dir=results/methods_digits
  python -m experiments.compare_methods --preset=cpu --model=mlp --num_alphas=13 --num_eval=2000
    --num_match=2000 --output_dir=results/methods_mnist
  python -m experiments.compare_methods --preset=cpu --model=vgg16 --width=8 --epochs=16 --num_train=20000
    --num_alphas=11 --num_steps=25 --output_dir=results/methods_vgg16
  python -m experiments.compare_methods --methods=weights,activations --output_dir=results/two_methods

On two CPU cores digits take 4 minutes, and with the networks already trained MNIST 14 and VGG-16 28.

Expected on digits: a test error barrier of 74 % without a permutation, at most 0.7 % under every method, and
5.6 % with REPAIR alone. Expected on VGG-16: 35 % without a permutation, 15 % (straight_through) to 26 %
(frank_wolfe), and 8 to 14 % with REPAIR.

Writes results.json, methods.csv and compare_methods.png. A finished run of the same options is only drawn
anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import matplotlib as mpl
import numpy as np
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rebasin
from experiments.harness import options
from experiments.harness.console import Reporter, cell
from experiments.harness.experiment import Config, Experiment, Measure, Setup
from experiments.harness.figures import RC, Target, entitle, share_legend
from experiments.harness.methods import BASELINE, MEASURES, VARIANTS, MethodComparison, check_methods
from experiments.harness.networks import Pair
from experiments.harness.record import MatchRecord, MethodsRecord, summarise
from experiments.harness.results import Results, Schema, describe_mean
from experiments.harness.statistics import Interval
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "METHODS", "MethodsConfig", "main"]

options.define_flags(__name__, methods=True)
_NUM_REPAIR = flags.DEFINE_integer(
    "num_repair", 1000, "Training examples on which REPAIR and norms take statistics.", lower_bound=2
)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 100, "Gradient steps of the methods that learn a permutation.", lower_bound=1
)

# The methods that are compared by default: all.
METHODS = tuple(rebasin.METHODS)

# What a finished run holds.
_Finished = Results["MethodsConfig", MethodsRecord[float], MethodsRecord[Interval]]

# Label, colour, marker and filling of each variant; markers and filling tell them apart in a grey print.
_STYLES = {
    "plain": ("as it is", "#0072B2", "o", "#0072B2"),
    "repaired": ("with REPAIR", "#D55E00", "s", "white"),
    "reset": ("with new norm statistics", "#009E73", "^", "#009E73"),
}
_GAP = 0.28

# Measure, its scale, label, where the axis begins to be logarithmic, and ticks.
_PANELS = (
    ("error_barrier", 100, "error barrier on test data (%)", 1, (0, 1, 3, 10, 30, 100)),
    ("loss_barrier", 1, "loss barrier on test data (nats)", 0.01, (0, 0.01, 0.1, 1, 10)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodsConfig(Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      num_test: number of test examples on which paths are measured, `None` for all.
      num_repair: number of training examples, among those for matching, on which REPAIR and norms take
        statistics.
      num_steps: number of gradient steps of the methods that learn a permutation.
    """

    needs_midpoint: ClassVar[bool] = True

    methods: tuple[str, ...]
    num_test: int | None
    num_repair: int
    num_steps: int

    @property
    def wanted_parts(self) -> tuple[str, ...]:
        """The pair as it was trained, and the methods."""
        return (BASELINE, *self.methods)

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        if self.num_repair < 2:
            problems.append(f"num_repair: wanted at least 2 examples, got {self.num_repair}")
        if self.num_steps < 1:
            problems.append(f"num_steps: wanted at least 1, got {self.num_steps}")
        return problems


def _build_measure(setup: Setup[MethodsConfig]) -> Measure[MethodsRecord[float]]:
    config = setup.config
    comparison = MethodComparison(
        setup,
        config.methods,
        num_test=config.num_test,
        num_steps=config.num_steps,
        num_repair=config.num_repair,
    )

    def measure(
        pair: Pair, trained: list[Trajectory], begun: MethodsRecord[float] | None
    ) -> Iterator[MethodsRecord[float]]:
        measured = begun.methods if begun else {}
        for methods in comparison.measure(trained, pair, f"match {pair}", measured):
            yield MethodsRecord(pair.seeds, methods)

    return measure


def _variants(record: MatchRecord[Any]) -> list[str]:
    """Return the names of the paths that were measured."""
    return [variant for variant in VARIANTS if getattr(record, variant) is not None]


def _tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, method and variant of the path."""
    for replicate, record in enumerate(results.records):
        for name, match in record.methods.items():
            for variant in _variants(match):
                path = getattr(match, variant)
                yield {
                    "replicate": replicate,
                    "method": name,
                    "statistics": variant,
                    "seconds": f"{match.seconds:.4g}",
                    "distance": f"{match.distance:.6g}",
                    "objective": "" if match.objective is None else f"{match.objective.end:.6g}",
                    **{measure: f"{getattr(path, measure):.6g}" for measure in MEASURES},
                }


def _report(results: _Finished, reporter: Reporter) -> None:
    """Print the table of methods."""
    rows = []
    for name, match in results.require_summary().methods.items():
        row = [name, "-", "-"]
        if match.objective is not None:
            row = [name, f"{match.objective.end.mean:.4g}", _two_digits(match.seconds.mean)]
        for path in (getattr(match, variant) for variant in _variants(match)):
            row += [cell(path.loss_barrier, percent=False), cell(path.error_barrier, percent=True)]
        rows.append(row)
    header = ["\nmethod", "own\nobjective", "\nseconds"]
    header += ["loss\nbarrier", "error\nbarrier", "loss,\nREPAIR", "error,\nREPAIR"]
    reporter.say(f"\n{describe_mean(results.config.replicates)}: barriers on test data, errors in %")
    reporter.table(header, [row[: len(header)] for row in rows])
    reporter.say("own objective: what the method maximises; seconds: a match, the first compiles;")
    reporter.say("REPAIR: with the statistics of every layer repaired; none: as trained")
    if len(rows[0]) > len(header):
        reporter.say("\nWith new running statistics of every norm")
        header = ["\nmethod", "loss\nbarrier", "error\nbarrier"]
        reporter.table(header, [[row[0], *row[-2:]] for row in rows])


def _two_digits(value: float) -> str:
    """Write a number with two digits at least, and no exponent."""
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def _draw_methods(results: _Finished, target: Target) -> None:
    """Draw error and loss barriers by method: means, standard deviations, and every pair of networks."""
    methods = results.require_summary().methods
    names, variants = list(methods), _variants(methods[BASELINE])
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 0.32 * len(names) + 1.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (measure, scale, label, linear, ticks) in zip(panels, _PANELS, strict=True):
            values = []
            for i, variant in enumerate(variants):
                y = np.arange(len(names)) + _GAP * (i - (len(variants) - 1) / 2)
                means = [getattr(getattr(methods[name], variant), measure) for name in names]
                dots = [
                    [scale * getattr(getattr(record.methods[name], variant), measure) for name in names]
                    for record in results.records
                ]
                _draw_variant(axes, y, variant, means, dots, scale)
                values += [value for row in dots for value in row]
            _dress(axes, label, min(values), max(values), linear, ticks)
        panels[0].set_yticks(range(len(names)), labels=[name.replace("_", " ") for name in names])
        panels[0].invert_yaxis()
        entitle(figure, results, "networks", "mean, standard deviation and each pair")
        share_legend(figure, panels[:1], columns=len(variants))
        figure.savefig(target, metadata={"Software": None})


def _draw_variant(
    axes: Axes,
    y: np.ndarray,
    variant: str,
    means: Sequence[Interval],
    dots: Sequence[Sequence[float]],
    scale: float,
) -> None:
    """Draw one variant of all methods: means with standard deviations, and a mark for each pair."""
    label, colour, marker, face = _STYLES[variant]
    axes.errorbar(
        [scale * interval.mean for interval in means],
        y,
        xerr=[scale * np.nan_to_num(interval.deviation) for interval in means],
        fmt=marker,
        color=colour,
        markerfacecolor=face,
        markersize=5,
        linewidth=1,
        label=label,
    )
    for row in dots if len(dots) > 1 else ():
        axes.plot(row, y, linestyle="none", marker="|", color=colour, markersize=4, alpha=0.6)


def _dress(
    axes: Axes, label: str, lowest: float, highest: float, linear: float, ticks: Sequence[float]
) -> None:
    """Make an axis logarithmic, since aligned pairs have less than a hundredth of the unaligned barrier."""
    axes.set(xlabel=label)
    axes.set_xscale("symlog", linthresh=linear, linscale=0.6)
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    # The axis begins at 0 only where something is close to it.
    left = 0.9 * max(tick for tick in ticks if tick <= lowest / 1.5)
    axes.set_xlim(left or -0.05 * linear, max(1.3 * highest, 2 * linear))
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)


EXPERIMENT = Experiment(
    schema=Schema("compare_methods", MethodsConfig, MethodsRecord[float], MethodsRecord[Interval]),
    build_measure=_build_measure,
    summarise=lambda config, records: summarise(records),
    csv="methods.csv",
    rows=_tidy_rows,
    figures={"compare_methods.png": _draw_methods},
    report=_report,
)


def build_config() -> MethodsConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    return MethodsConfig(
        **choice.fields,
        methods=options.chosen_methods(METHODS),
        num_test=choice.num_eval,
        num_repair=_NUM_REPAIR.value,
        num_steps=_NUM_STEPS.value,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
