"""Compares weight, covariance and activation matching over learning rates.

Reproduces the comparison of arXiv 2310.19103, section 6, on an MLP. Networks trained at low learning rates
stay close to their initialisation, where weights say little about what units do, so that weighing them by the
covariance of the activations should help most there. Pairs of networks are trained at each learning rate and
matched by the three methods, and the test loss of the network at the midpoint is measured. The recipe is that
paper's: SGD with momentum 0.9, 10 steps of warm-up, a cosine, no weight decay, and 4 pairs. Covariance
matching assigns the layers once, in order of depth, as that paper does (order="depth"), without the ascent
that follows by default. The run prints a table and the paper's claims with a verdict each.

  python -m experiments.learning_rates --preset=digits --output_dir=results/rates_digits
  python -m experiments.learning_rates --preset=cpu --model=mlp --epochs=10 --num_alphas=13
    --output_dir=results/rates_mnist

On two CPU cores MNIST takes 40 minutes.

Expected on MNIST: at rates up to 0.0016 the midpoint's test loss is lower after covariance than after weight
matching by 0.89 nats [0.87, 0.92] (paper: 0.80), and lower after activation than after covariance matching by
0.055 nats [0.044, 0.066] (paper: 0.10). Both claims hold. These numbers are of 5 pairs with a warm-up of 5
epochs and a weight decay of 1e-4, and of covariance matching with the ascent.

Writes results.json, rates.csv and learning_rates.png. Training dominates: two networks for each replicate and
rate. A finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import matplotlib as mpl
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from experiments.harness import options
from experiments.harness.console import Reporter, cell
from experiments.harness.experiment import Config, Experiment, Measure, Setup
from experiments.harness.figures import GROUND, RC, Style, Target, draw_band, entitle, share_legend
from experiments.harness.methods import BASELINE, MethodComparison
from experiments.harness.networks import Pair
from experiments.harness.record import RateRecord, RatesSummary, summarise
from experiments.harness.results import Claim, Results, Schema, claim, describe_mean
from rebasin.errors import ConfigError
from rebasin.training.trajectory import Trajectory

__all__ = [
    "EXPERIMENT",
    "METHODS",
    "OPTIONS",
    "PAPER_PAIRS",
    "PAPER_RATES",
    "RatesConfig",
    "chosen_rates",
    "main",
]

# The methods that the paper compares.
METHODS = ("weights", "covariance", "activations")

# The paper assigns the layers once, in order of depth, and does not go on from there.
OPTIONS = {"covariance": {"order": "depth"}}

# Test loss at the midpoint for an MLP on MNIST, read off the paper's plot at these learning rates. It has
# four seeds.
PAPER_RATES = (1e-4, 4e-4, 1.6e-3, 6.3e-3, 2.5e-2, 0.1)
PAPER_PAIRS = 4
_PAPER = {
    "weights": (2.05, 1.40, 1.27, 0.89, 0.385, 0.084),
    "covariance": (1.35, 0.55, 0.405, 0.255, 0.14, 0.099),
    "activations": (1.22, 0.47, 0.32, 0.177, 0.126, 0.10),
}

options.define_flags(__name__, strict=True)
_RATES = flags.DEFINE_list("rates", [f"{rate:g}" for rate in PAPER_RATES], "Peak learning rates, ascending.")

# What a finished run holds.
_Finished = Results["RatesConfig", RateRecord[float], RatesSummary]

_STYLES = {
    "none": GROUND._replace(marker="."),
    "weights": Style("weights", "#0072B2", marker="o"),
    "covariance": Style("covariance", "#D55E00", (0, (5, 2)), marker="s"),
    "activations": Style("activations", "#009E73", (0, (5, 1, 1, 1)), marker="^"),
}

# Measure, its scale and the label of its axis.
_PANELS = (
    ("midpoint_loss", 1, "test loss at the midpoint (nats)"),
    ("error_barrier", 100, "test error barrier (%)"),
)

# Measures in the order of the CSV file.
_COLUMNS = ("midpoint_loss", "midpoint_error", "loss_barrier", "error_barrier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatesConfig(Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      rates: peak learning rates in ascending order, each in place of the recipe's.
      num_test: number of test examples on which paths are measured, `None` for all.
    """

    needs_midpoint: ClassVar[bool] = True

    rates: tuple[float, ...]
    num_test: int | None

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = super().problems()
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            problems.append(f"rates: wanted ascending positive learning rates, got {list(self.rates)}")
        return problems

    @property
    def wanted_parts(self) -> tuple[str, ...]:
        """The pair as it was trained, and the methods."""
        return (BASELINE, *METHODS)

    def misfits(self, record: RateRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and that of the rate."""
        problems = super().misfits(record, pair)
        if record.rate != float(f"{pair.recipe.peak_learning_rate:.7g}"):  # as it is stored
            problems.append(f"rate: wanted {pair.recipe.peak_learning_rate:g}, got {record.rate:g}")
        return problems

    @property
    def pairs(self) -> list[Pair]:
        """One pair for each replicate and rate, all rates of a replicate in a row."""
        recipes = [dataclasses.replace(self.recipe, peak_learning_rate=rate) for rate in self.rates]
        return [pair._replace(recipe=recipe) for pair in super().pairs for recipe in recipes]


def _build_measure(setup: Setup[RatesConfig]) -> Measure[RateRecord[float]]:
    comparison = MethodComparison(setup, METHODS, num_test=setup.config.num_test, options=OPTIONS)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: RateRecord[float] | None
    ) -> Iterator[RateRecord[float]]:
        measured = begun.methods if begun else {}
        rate = pair.recipe.peak_learning_rate
        for methods in comparison.measure(trained, pair, f"rate {rate:g}, {pair}", measured):
            yield RateRecord(pair.seeds, rate, methods)

    return measure


def _summarise(config: RatesConfig, records: Sequence[RateRecord[float]]) -> RatesSummary:
    """Return mean, 95 % interval and standard deviation over replicates at each rate."""
    return RatesSummary(tuple(summarise([r for r in records if r.rate == rate]) for rate in config.rates))


def _midpoint_losses(records: Sequence[RateRecord[float]], rate: float, method: str) -> np.ndarray:
    """Return the test loss at the midpoint of every replicate at one rate."""
    return np.array([r.methods[method].plain.midpoint_loss for r in records if r.rate == rate])


def _judge(config: RatesConfig, records: Sequence[RateRecord[float]]) -> list[Claim]:
    """Judge the order of the methods at the lower half of the rates, by rules set before the runs."""
    low = config.rates[: (len(config.rates) + 1) // 2]
    claims = []
    for better, worse in (("covariance", "weights"), ("activations", "covariance")):
        gaps = [
            _midpoint_losses(records, rate, worse) - _midpoint_losses(records, rate, better) for rate in low
        ]
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


def _tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each rate, pair and method."""
    for record in results.records:
        for name, match in record.methods.items():
            yield {
                "rate": f"{record.rate:g}",
                "seed": record.seeds[0],
                "method": name,
                "seconds": f"{match.seconds:.4g}",
                **{measure: f"{getattr(match.plain, measure):.6g}" for measure in _COLUMNS},
            }


def _report(results: _Finished, reporter: Reporter) -> None:
    """Print the table of rates."""
    summary = results.require_summary()
    names, rows = list(summary.rates[0].methods), []
    for record in summary.rates:
        paths = [record.methods[name].plain for name in names]
        losses = [cell(path.midpoint_loss, percent=False) for path in paths]
        errors = [cell(path.error_barrier, percent=True) for path in paths]
        rows.append([f"{record.rate:g}", *losses, *errors])
    short = {"covariance": "cov.", "activations": "act."}
    columns = [f"{what}\n{short.get(name, name)}" for what in ("loss ½", "error") for name in names]
    reporter.say(f"\n{describe_mean(results.config.replicates)} at each peak learning rate, test data")
    reporter.table(["\nrate", *columns], rows)
    reporter.say("loss ½: of the network at the midpoint; error: barrier in %; none: as trained")


def _draw_rates(results: _Finished, target: Target) -> None:
    """Draw loss at the midpoint and error barrier by learning rate; bands are standard deviations."""
    summary = results.require_summary()
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (measure, scale, label) in zip(panels, _PANELS, strict=True):
            for name, style in _STYLES.items():
                series = [getattr(record.methods[name].plain, measure) for record in summary.rates]
                draw_band(axes, [record.rate for record in summary.rates], series, style, scale)
            axes.set(xscale="log", xlabel="peak learning rate", ylabel=label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25, linewidth=0.5)
        note = f"pairs at each rate, {results.config.recipe.epochs} epochs; bands: ± standard deviation"
        entitle(figure, results, "networks", note)
        share_legend(figure, panels[:1])
        figure.savefig(target, metadata={"Software": None})


EXPERIMENT = Experiment(
    schema=Schema("learning_rates", RatesConfig, RateRecord[float], RatesSummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=_judge,
    csv="rates.csv",
    rows=_tidy_rows,
    figures={"learning_rates.png": _draw_rates},
    report=_report,
    keep="measured",
)


def build_config() -> RatesConfig:
    """Build the config that the flags describe."""
    choice = options.choose("optimal_transport", replicates=PAPER_PAIRS)
    return RatesConfig(**choice.fields, rates=chosen_rates(), num_test=choice.num_eval)


def chosen_rates() -> tuple[float, ...]:
    """Return the learning rates of ``--rates``; raise `ConfigError` where they are no numbers."""
    try:
        return tuple(float(rate) for rate in _RATES.value)
    except ValueError:
        raise ConfigError(f"wanted rates, such as 0.01,0.1, got {','.join(_RATES.value)!r}") from None


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
