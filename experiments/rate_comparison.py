"""Matching methods against the learning rate (arXiv 2310.19103, section 6).

Networks trained at low learning rates stay close to their initialisation, where weights say little about what
units do: there, weighing them by the covariance of the activations should help most.
"""

import dataclasses
import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.console import Reporter
from experiments.figures import RC
from experiments.method_comparison import BASELINE, Bench
from experiments.pairs import train_networks
from experiments.results import Claim, Results, open_results, write_csv
from experiments.statistics import student_interval
from rebasin.data import Dataset
from rebasin.errors import ConfigError, problem_list
from rebasin.recipes import Recipe

__all__ = ["METHODS", "Config", "run"]

EXPERIMENT = "learning_rates"
METHODS = ("weights", "covariance", "activations")

# Test loss at the midpoint for an MLP on MNIST, read off the paper's plot at these learning rates.
PAPER_RATES = (1e-4, 4e-4, 1.6e-3, 6.3e-3, 2.5e-2, 0.1)
_PAPER = {
    "weights": (2.05, 1.40, 1.27, 0.89, 0.385, 0.084),
    "covariance": (1.35, 0.55, 0.405, 0.255, 0.14, 0.099),
    "activations": (1.22, 0.47, 0.32, 0.177, 0.126, 0.10),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      recipe: how networks are trained, but for the peak learning rate.
      rates: peak learning rates, ascending.
      replicates: independent pairs of networks at each rate.
      seed: the first of the seeds, and that of the matching.
      num_alphas: points on each segment, odd.
      num_test: test examples on which segments are measured, `None` for all.
      num_match: training examples for the activations, `None` for all.
    """

    recipe: Recipe
    rates: tuple[float, ...]
    replicates: int
    seed: int
    num_alphas: int
    num_test: int | None
    num_match: int | None

    def __post_init__(self) -> None:
        problems = []
        if self.replicates < 1:
            problems.append(f"replicates: wanted at least 1, got {self.replicates}")
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            problems.append(f"rates: wanted ascending positive learning rates, got {list(self.rates)}")
        if self.num_alphas < 3 or self.num_alphas % 2 == 0:
            problems.append(f"num_alphas: wanted an odd number from 3 on, got {self.num_alphas}")
        if problems:
            raise ConfigError(problem_list("this experiment cannot work:", problems))

    def to_json(self) -> dict[str, Any]:
        """The config as it stands in ``results.json``."""
        return dataclasses.asdict(self)


def run(
    config: Config,
    dataset: Dataset,
    *,
    output_dir: pathlib.Path,
    runs_dir: pathlib.Path,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Results:
    """Trains pairs at every rate, matches and measures them, and writes results, table and figure.

    Args:
      config: what to do.
      dataset: the data.
      output_dir: gets ``results.json``, ``rates.csv`` and ``learning_rates.png``.
      runs_dir: where trained networks are kept, and found again by recipe and seed.
      resume: go on with an unfinished run; what is finished is kept either way.
      reporter: shows progress and tables.

    Returns:
      The finished results; `curves` has one entry for each replicate and rate, replicates outermost.

    Raises:
      ConfigError: the output folder holds another config, or an unfinished run without `resume`.
    """
    reporter = reporter or Reporter()
    results = open_results(output_dir, EXPERIMENT, config.to_json(), resume=resume)
    if not results.finished:
        todo = [(r, rate) for r in range(config.replicates) for rate in config.rates]
        for replicate, rate in todo[len(results.curves) :]:
            results.curves.append(_measure(config, dataset, replicate, rate, runs_dir, reporter, results))
            results.save(output_dir / "results.json")
        results.summary = _summarise(config, results.curves)
        results.claims = _judge(config, results.curves)
        results.save(output_dir / "results.json")
    write_csv(output_dir / "rates.csv", _rows(results.curves))
    draw_rates(results, output_dir / "learning_rates.png")
    _report(results, output_dir, reporter)
    return results


def _measure(
    config: Config,
    dataset: Dataset,
    replicate: int,
    rate: float,
    runs_dir: pathlib.Path,
    reporter: Reporter,
    results: Results,
) -> dict[str, Any]:
    """One pair at one rate, by every method."""
    recipe = dataclasses.replace(config.recipe, peak_learning_rate=rate)
    seeds = (config.seed + 2 * replicate, config.seed + 2 * replicate + 1)
    trained = train_networks(recipe, dataset, seeds, runs_dir=runs_dir, reporter=reporter, results=results)
    bench = Bench(
        recipe,
        dataset,
        trained[0].last,
        trained[1].last,
        seed=config.seed,
        num_alphas=config.num_alphas,
        num_test=config.num_test,
        num_match=config.num_match,
    )
    record: dict[str, Any] = {"rate": rate, "seeds": list(seeds), "methods": {}}
    with reporter.stage(f"rate {rate:g}, seeds {seeds[0]} and {seeds[1]}", 1 + len(METHODS)) as advance:
        for name in (BASELINE, *METHODS):
            record["methods"][name] = bench.try_method(name, results, num_repair=None)
            advance()
    return record


def _values(curves: list[dict[str, Any]], rate: float, name: str, measure: str) -> np.ndarray:
    """A measure of every replicate."""
    return np.array([c["methods"][name]["plain"][measure] for c in curves if c["rate"] == rate])


def _summarise(config: Config, curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, interval and deviation over replicates by method and rate."""
    return {
        "rates": list(config.rates),
        "methods": {
            name: {
                measure: [
                    student_interval(_values(curves, rate, name, measure))._asdict() for rate in config.rates
                ]
                for measure in ("midpoint_loss", "midpoint_error", "loss_barrier", "error_barrier")
            }
            for name in (BASELINE, *METHODS)
        },
    }


def _judge(config: Config, curves: list[dict[str, Any]]) -> list[Claim]:
    """The order of the methods at the lower half of the rates, by rules set before the runs."""
    low = config.rates[: (len(config.rates) + 1) // 2]
    claims = []
    for better, worse in (("covariance", "weights"), ("activations", "covariance")):
        gaps = [
            _values(curves, rate, worse, "midpoint_loss") - _values(curves, rate, better, "midpoint_loss")
            for rate in low
        ]
        interval = student_interval(np.mean(gaps, axis=0))
        holds = interval.low > 0 if config.replicates > 1 else interval.mean > 0
        paper = float(np.mean(_PAPER[worse][:3]) - np.mean(_PAPER[better][:3]))
        claims.append(
            Claim(
                f"{better}_better_than_{worse}",
                f"at learning rates up to {low[-1]:g}, the midpoint's test loss is lower after {better} than "
                f"after {worse} matching: the mean difference is above 0, and so is its 95 % interval",
                f"{paper:.2f} (mean of 1e-4, 4e-4 and 1.6e-3, read off the plot of section 6)",
                interval.mean,
                interval.low,
                interval.high,
                bool(holds),
            )
        )
    return claims


def _rows(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tidy rows: one for each rate, pair and method."""
    measures = ("midpoint_loss", "midpoint_error", "loss_barrier", "error_barrier")
    return [
        {
            "rate": f"{curve['rate']:g}",
            "seed": curve["seeds"][0],
            "method": name,
            "seconds": f"{record['seconds']:.4g}",
            **{measure: f"{record['plain'][measure]:.6g}" for measure in measures},
        }
        for curve in curves
        for name, record in curve["methods"].items()
    ]


_STYLES = {
    BASELINE: ("no permutation", "#777777", (0, (1, 1)), "."),
    "weights": ("weights", "#0072B2", "solid", "o"),
    "covariance": ("covariance", "#D55E00", (0, (5, 2)), "s"),
    "activations": ("activations", "#009E73", (0, (5, 1, 1, 1)), "^"),
}


def draw_rates(results: Results, path: pathlib.Path) -> None:
    """Loss at the midpoint and error barrier against the learning rate; bands are standard deviations.

    Args:
      results: finished results of ``learning_rates``.
      path: the PNG to write.
    """
    recipe, count = results.config["recipe"], results.config["replicates"]
    rates = np.array(results.summary["rates"])
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (measure, scale, label) in zip(
            panels,
            (("midpoint_loss", 1, "test loss at α = ½ (nats)"), ("error_barrier", 100, "error barrier (%)")),
            strict=True,
        ):
            for name, (title, colour, dashes, marker) in _STYLES.items():
                series = results.summary["methods"][name][measure]
                mean = scale * np.array([s["mean"] for s in series])
                spread = scale * np.array([s["deviation"] or 0 for s in series])
                axes.plot(
                    rates, mean, color=colour, linestyle=dashes, marker=marker, markersize=4, label=title
                )
                axes.fill_between(rates, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
            axes.set(xscale="log", xlabel="peak learning rate", ylabel=label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25, linewidth=0.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.suptitle(
            f"{recipe['model']} (width {recipe['width']}) on {recipe['dataset']}, {recipe['epochs']} epochs: "
            f"{count} pair{'s' * (count > 1)} of networks at each rate, test data",
            fontsize=9,
        )
        figure.savefig(path, metadata={"Software": None})


def _report(results: Results, output_dir: pathlib.Path, reporter: Reporter) -> None:
    """Prints the table of rates, the claims and the paths."""
    names = (BASELINE, *METHODS)
    rows = []
    for i, rate in enumerate(results.summary["rates"]):
        row = [f"{rate:g}"]
        for measure, scale, digits in (("midpoint_loss", 1, 2), ("error_barrier", 100, 1)):
            for name in names:
                interval = results.summary["methods"][name][measure][i]
                row.append(f"{scale * interval['mean']:.{digits}f}")
        rows.append(row)
    short = {BASELINE: "none", "weights": "weights", "covariance": "cov.", "activations": "act."}
    header = ["\nrate", *(f"loss at ½\n{short[n]}" for n in names), *(f"error\n{short[n]}" for n in names)]
    reporter.say("\nTest loss at the midpoint, and error barrier (%): means over pairs of networks")
    reporter.table(header, rows)
    reporter.claims(results.claims)
    for name in ("results.json", "rates.csv", "learning_rates.png"):
        reporter.say(str(output_dir / name))
