"""Figure, table and tidy rows of ``weight_magnitude``, made from ``results.json`` alone."""

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.console import Reporter, cell
from experiments.harness.figures import (
    GROUND,
    METRIC_LABELS,
    RC,
    Style,
    Target,
    draw_band,
    entitle,
    share_legend,
)
from experiments.harness.matched_epochs import MagnitudeRecord
from experiments.harness.record import METRICS
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval

__all__ = ["draw_fractions", "report", "tidy_rows"]

# What a finished run holds; its config is a `MagnitudeConfig`.
_Finished = Results[Any, MagnitudeRecord[float], MagnitudeRecord[Interval]]

_COLUMNS = ("train_loss", "test_loss", "train_error", "test_error")
_DASHES = {"magnitude": "solid", "random": (0, (3, 1.5))}
_MARKERS = "os^Dv<>ph"


def draw_fractions(results: _Finished, target: Target) -> None:
    """Draw barriers at the end by the fraction that was pruned before matching: figures 5 left and 16.

    One row for each matching method. Lines are means over replicates, bands one standard deviation.
    """
    config = results.config
    with mpl.rc_context(RC):
        figure = Figure(figsize=(11.2, 1.2 + 2.3 * len(config.methods)), layout="constrained")
        panels = figure.subplots(len(config.methods), len(_COLUMNS), squeeze=False, sharey="col")
        for row, method in zip(panels, config.methods, strict=True):
            for axes, metric in zip(row, _COLUMNS, strict=True):
                _draw_panel(axes, results, method, metric)
            row[0].set_title(f"matching of {method}", loc="left")
        # Only now: a limit that is set stops the axis from growing with the rows that share it.
        for axes in panels.flat:
            axes.set_ylim(bottom=0)
        note = "$A$ and $P[B]$ at the end; $P$ from pruned networks of epoch $t$; bands: ± standard deviation"
        entitle(figure, results, "networks", note)
        share_legend(figure, [panels[0][0]], columns=len(config.epochs) + 1)
        figure.savefig(target, metadata={"Software": None})


def _draw_panel(axes: Axes, results: _Finished, method: str, metric: str) -> None:
    """Draw the barriers of one method in one metric, a colour for each epoch."""
    config, summary = results.config, results.require_summary()
    scale, label = METRIC_LABELS[metric]
    x = range(len(config.fractions))
    colours = mpl.colormaps["viridis_r"](np.linspace(0.12, 0.95, len(summary.epochs)))
    for i, part in enumerate(summary.epochs):
        for kind, dashes in _DASHES.items():
            series = [getattr(metrics, metric) for metrics in getattr(part.methods[method], kind)]
            name = rf"$t={part.epoch}$, {kind}"
            style = Style(name, tuple(colours[i]), dashes, 1.3, _MARKERS[i % len(_MARKERS)])
            draw_band(axes, x, series, style, scale)
    # Last, so that in the legend the two lines of an epoch stand one above the other.
    unaligned = scale * getattr(summary.unaligned, metric).mean
    axes.axhline(unaligned, color=GROUND.colour, linestyle=GROUND.dashes, label=GROUND.label)
    # Even steps: most of what happens does so at the highest fractions.
    axes.set_xticks(x, labels=[f"{100 * fraction:g}" for fraction in config.fractions])
    axes.set(xlabel="pruned before matching (%)", ylabel=label)
    axes.grid(alpha=0.25, linewidth=0.5)


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, method, epoch, kind of pruning, fraction and metric."""
    for replicate, record in enumerate(results.records):
        for part in record.epochs:
            for method, own in part.methods.items():
                for kind in _DASHES:
                    for fraction, found in zip(results.config.fractions, getattr(own, kind), strict=True):
                        for metric in METRICS:
                            yield {
                                "replicate": replicate,
                                "method": method,
                                "epoch": part.epoch,
                                "pruning": kind,
                                "fraction": f"{fraction:g}",
                                "metric": metric,
                                "barrier": f"{getattr(found, metric):.6g}",
                                "unaligned": f"{getattr(record.unaligned, metric):.6g}",
                            }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of fractions for each method and kind of pruning."""
    config, summary = results.config, results.require_summary()
    reporter.say("\nTest error barriers at the end, in %, under permutations that were found on")
    reporter.say("networks of epoch t of which a fraction p of the weights was pruned")
    unaligned = cell(summary.unaligned.test_error, percent=True)
    reporter.say(f"{describe_mean(config.replicates)}; {unaligned} without a permutation")
    for method in config.methods:
        for kind in _DASHES:
            reporter.say(f"\n{method}, pruned {'by magnitude' if kind == 'magnitude' else 'at random'}")
            rows = [
                [
                    f"{100 * fraction:g} %",
                    *(
                        cell(getattr(part.methods[method], kind)[i].test_error, percent=True)
                        for part in summary.epochs
                    ),
                ]
                for i, fraction in enumerate(config.fractions)
            ]
            reporter.table(["p", *(f"t={part.epoch}" for part in summary.epochs)], rows)
