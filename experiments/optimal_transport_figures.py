"""Figures and tables of ``optimal_transport``, made from ``results.json`` alone."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.harness.console import Reporter, cell
from experiments.harness.figures import RC, Style, Target, draw_band, entitle, share_legend
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval
from experiments.harness.transport import SettingRecord, SettingsSummary
from experiments.learning_rates import METHODS

__all__ = ["draw_correlations", "draw_dimensions", "report"]

# What a finished run holds; its config is a `TransportConfig`.
_Finished = Results[Any, SettingRecord[float], SettingsSummary]

_STYLES = {
    "weights": Style("weights", "#0072B2", marker="o"),
    "covariance": Style("covariance", "#D55E00", (0, (5, 2)), marker="s"),
    "activations": Style("activations", "#009E73", (0, (5, 1, 1, 1)), marker="^"),
}
_SHORT = {"weights": "weights", "covariance": "cov.", "activations": "act."}

# Networks with more layers have one line for their mean.
_MOST_LINES = 4

# The markers of the settings beside the rates.
_MARKERS = {"widths": "x", "lengths": "+", "optimizers": "1"}


def _layer_mean(record: SettingRecord[Any], method: str) -> float:
    """Return the mean over layers of the mean dimension."""
    return float(np.mean([getattr(layer, method).mean for layer in record.layers]))


def _interval(interval: Interval | None) -> str:
    """Write a correlation with its interval."""
    if interval is None:
        return "none"
    if np.isnan(interval.low):
        return f"{interval.mean:.2f}"
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def report(results: _Finished, reporter: Reporter) -> None:
    """Print tables of dimensions and losses, of distances and dependence, and of correlations."""
    summary = results.require_summary()
    rows = [
        [
            record.setting,
            *(f"{_layer_mean(record, name):.1f}" for name in METHODS),
            *(cell(record.methods[name].plain.midpoint_loss, percent=False) for name in METHODS),
        ]
        for record in summary.settings
    ]
    reporter.say(f"\n{describe_mean(results.config.replicates)} in each setting")
    columns = [f"{what}\n{_SHORT[name]}" for what in ("dim.", "loss ½") for name in METHODS]
    reporter.table(["\nrate", *columns], rows)
    reporter.say("dim.: effective dimension, mean of layers; loss ½: at the midpoint, test\n")
    rows = [
        [
            record.setting,
            *(cell(x, percent=False) for x in (record.distance, record.covariance_distance)),
            cell(record.dependence, percent=False),
            f"{record.p_value.mean:.3f}",
            cell(record.methods["weights"].plain.loss_barrier, percent=False),
            cell(record.methods["weights"].plain.error_barrier, percent=True),
        ]
        for record in summary.settings
    ]
    reporter.table(
        ["\nrate", "\nW₂", "\nW₂ in Σ", "dependence\nz", "\np", "barrier\nloss", "weights\nerror"], rows
    )
    reporter.say("first layers; z above 0: neurons of one network are more alike than those of two\n")
    rows = [
        [family, method, _interval(found.midpoint_loss), _interval(found.loss_barrier)]
        for family, methods in summary.correlations.items()
        for method, found in methods.items()
    ]
    if summary.dependence is not None:
        found = summary.dependence
        rows.append(
            ["z, all rates", "weights", _interval(found.midpoint_loss), _interval(found.loss_barrier)]
        )
    reporter.table(["\nover", "\nmethod", "rank correlation with\nloss ½", "\nloss barrier"], rows)
    reporter.wrap(
        "of the effective dimension, or of the dependence z over rates and optimisers, with 95 % interval; "
        "over layers: loss of A with one layer halfway to P[B]"
    )


def draw_dimensions(results: _Finished, target: Target) -> None:
    """Draw effective dimension by learning rate, and loss at the midpoint by effective dimension."""
    config = results.config
    by_name = {record.setting: record for record in results.require_summary().settings}
    rated = [by_name[name] for name in config.families["rates"]]
    layers = len(rated[0].layers)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, style in _STYLES.items():
            for series in _lines(rated, name, layers):
                draw_band(left, config.rates, series, style)
            for family, recipes in config.families.items():
                records = [
                    by_name[n] for n in recipes if family == "rates" or n not in config.families["rates"]
                ]
                right.scatter(
                    [_layer_mean(record, name) for record in records],
                    [record.methods[name].plain.midpoint_loss.mean for record in records],
                    color=style.colour,
                    marker=_MARKERS.get(family, style.marker),
                    s=18 if family == "rates" else 26,
                    linewidths=1.0,
                )
        left.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="effective dimension")
        right.set(xscale="log", xlabel="effective dimension, mean of layers")
        right.set_ylabel("test loss at the midpoint (nats)")
        right.set_ylim(bottom=0)
        for axis in (left.yaxis, right.xaxis):  # the labels of a logarithmic axis would overlap
            limits = axis.get_view_interval()
            ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if limits[0] <= n <= limits[1]]
            axis.set_ticks(ticks, labels=[str(n) for n in ticks])
            axis.set_ticks([], minor=True)
        for axes in (left, right):
            axes.grid(alpha=0.25, linewidth=0.5)
        lines = "left: one line for each layer" if layers <= _MOST_LINES else "left: mean of layers"
        others = [f"{m} {family}" for family, m in zip(_MARKERS, ("×", "+", "Y"), strict=True)]
        shown = [text for text, family in zip(others, _MARKERS, strict=True) if config.families[family]]
        entitle(
            figure, results, "networks", ", ".join([lines, *(["right: " + "; ".join(shown)] * bool(shown))])
        )
        share_legend(figure, [left])
        figure.savefig(target, metadata={"Software": None})


def _lines(rated: Sequence[SettingRecord[Interval]], name: str, layers: int) -> list[list[Interval]]:
    """Return the dimensions by rate of each layer, or of their mean where there are many."""
    if layers <= _MOST_LINES:
        return [[getattr(record.layers[layer], name) for record in rated] for layer in range(layers)]
    means = [_layer_mean(record, name) for record in rated]
    return [[Interval(mean, float("nan"), float("nan"), float("nan")) for mean in means]]


def draw_correlations(results: _Finished, target: Target) -> None:
    """Draw the rank correlation of effective dimension and midpoint loss over each family of settings."""
    correlations = results.require_summary().correlations
    with mpl.rc_context(RC):
        figure = Figure(figsize=(5.4, 1.2 + 0.55 * max(len(correlations), 1)), layout="constrained")
        axes = figure.subplots()
        for row, methods in enumerate(correlations.values()):
            for i, (name, style) in enumerate(_STYLES.items()):
                found, y = methods[name].midpoint_loss, row + 0.22 * (i - 1)
                ends = np.clip(np.nan_to_num([found.low, found.high], nan=found.mean), -1, 1)
                axes.plot(ends, [y, y], color=style.colour, linewidth=1.2)
                axes.plot(
                    [found.mean],
                    [y],
                    style.marker or "o",
                    color=style.colour,
                    markersize=4,
                    linestyle="none",
                    label=style.label if not row else None,
                )
        axes.axvline(0, color="#777777", linewidth=0.8)
        axes.set_yticks(range(len(correlations)), labels=[f"over {family}" for family in correlations])
        axes.invert_yaxis()
        axes.set(xlim=(-1.05, 1.05), xlabel="rank correlation of effective dimension and midpoint loss")
        axes.grid(alpha=0.25, linewidth=0.5, axis="x")
        entitle(figure, results, "networks", "bars: 95 % interval over pairs, cut off at ±1")
        share_legend(figure, [axes])
        figure.savefig(target, metadata={"Software": None})
