"""Figure, tables and tidy rows of ``stability_interventions``, made from ``results.json`` alone."""

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
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
    dress_epochs,
    entitle,
    share_legend,
)
from experiments.harness.matched_epochs import StabilityRecord, StabilitySummary
from experiments.harness.record import METRICS, Metrics
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval

__all__ = ["draw_regimes", "report", "tidy_rows"]

# What a finished run holds; its config is a `StabilityConfig`.
_Finished = Results[Any, StabilityRecord[float], StabilitySummary]

_COLUMNS = ("test_error", "train_error", "test_loss")
_STYLES = {
    "weights": Style(r"$P_{\mathrm{end}}$ by weights", "#0072B2"),
    "activations": Style(r"$P_{\mathrm{end}}$ by activations", "#009E73", (0, (5, 1, 1, 1))),
}
_SIBLINGS = Style(r"siblings at the end, $A^1$ and $A^2$", "#D55E00", (0, (5, 2)))


def draw_regimes(results: _Finished, target: Target) -> None:
    """Draw barriers over training in both regimes, with the instability at initialisation: figures 6, 19, 20.

    One row for each regime. Lines are means over replicates, bands one standard deviation.
    """
    with mpl.rc_context(RC):
        regimes = results.require_summary().regimes
        figure = Figure(figsize=(9.6, 1.1 + 2.2 * len(regimes)), layout="constrained")
        panels = figure.subplots(len(regimes), len(_COLUMNS), squeeze=False, sharey="col")
        for row, record in zip(panels, regimes, strict=True):
            for axes, metric in zip(row, _COLUMNS, strict=True):
                _draw_panel(axes, results, record, metric)
            row[0].set_title(_describe_regime(results, record.regime), loc="left")
        # Only now: a limit that is set stops the axis from growing with the rows that share it.
        for axes in panels.flat:
            dress_epochs(axes, results.config.epochs)
        entitle(figure, results, "networks in each regime", "$A_t$ and $P[B_t]$; bands: ± standard deviation")
        share_legend(figure, [panels[0][0]])
        figure.savefig(target, metadata={"Software": None})


def _describe_regime(results: _Finished, regime: str) -> str:
    config = results.config
    recipe = config.recipe if regime == "stability_1" else config.second
    return (
        f"{regime}: rate {recipe.peak_learning_rate:g}, warm-up {recipe.warmup_epochs}, "
        f"decay {recipe.weight_decay:g}"
    )


def _draw_panel(axes: Axes, results: _Finished, record: StabilityRecord[Interval], metric: str) -> None:
    """Draw the barriers of one regime in one metric."""
    scale, label = METRIC_LABELS[metric]
    epochs = [part.epoch for part in record.epochs]
    draw_band(axes, epochs, [getattr(part.unaligned, metric) for part in record.epochs], GROUND, scale)
    for i, method in enumerate(results.config.methods):
        style = _STYLES.get(method, Style(f"by {method}", f"C{i}"))
        draw_band(axes, epochs, [getattr(p.aligned[method], metric) for p in record.epochs], style, scale)
    siblings = [getattr(record.siblings, metric)] * len(epochs)
    draw_band(axes, epochs, siblings, _SIBLINGS, scale)
    axes.set(xlabel="epoch $t$", ylabel=label)


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each regime, replicate, path, epoch and metric.

    Paths are ``siblings``, whose epoch is the last, ``none`` without a permutation, and matching methods.
    """
    for record in results.records:
        last = record.epochs[-1].epoch
        yield from _rows(record, "siblings", last, record.siblings)
        for part in record.epochs:
            for name, found in {"none": part.unaligned, **part.aligned}.items():
                yield from _rows(record, name, part.epoch, found)


def _rows(
    record: StabilityRecord[float], path: str, epoch: int, found: Metrics[float]
) -> Iterator[dict[str, Any]]:
    for metric in METRICS:
        yield {
            "regime": record.regime,
            "seed": record.seeds[0],
            "path": path,
            "epoch": epoch,
            "metric": metric,
            "barrier": f"{getattr(found, metric):.6g}",
        }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of epochs for each regime."""
    methods = results.config.methods
    reporter.say("\nTest error barriers between A_t and P_end[B_t], in %, by matching method;")
    reporter.say(describe_mean(results.config.replicates))
    for record in results.require_summary().regimes:
        siblings = cell(record.siblings.test_error, percent=True)
        reporter.say(f"\n{_describe_regime(results, record.regime)}")
        reporter.say(f"siblings that part at initialisation, at the end: {siblings}")
        rows = [
            [
                str(part.epoch),
                "/".join(f"{100 * m.test_error.mean:.1f}" for m in (part.endpoints.a, part.endpoints.b)),
                cell(part.unaligned.test_error, percent=True),
                *(cell(part.aligned[name].test_error, percent=True) for name in methods),
            ]
            for part in record.epochs
        ]
        reporter.table(["t", "error A/B", "none", *methods], rows)
