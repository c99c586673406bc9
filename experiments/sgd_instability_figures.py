"""Figure, tables and tidy rows of ``sgd_instability``, made from ``results.json`` alone."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.console import Reporter, cell
from experiments.harness.figures import (
    METRIC_LABELS,
    RC,
    Style,
    Target,
    draw_band,
    dress_epochs,
    entitle,
    share_legend,
)
from experiments.harness.record import METRICS, FamilyRecord, FamilySummary, Metrics
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval, Onset

__all__ = ["draw_instability", "report", "tidy_rows"]

# What a finished run holds; its config is an `InstabilityConfig`.
_Finished = Results[Any, FamilyRecord[float], FamilySummary]

_SIBLINGS = Style(r"siblings $A^1$ and $A^2$", "#CC79A7", (0, (5, 1, 1, 1)))
_CHILDREN = Style(r"children $A^1$ and $P_{\mathrm{end}}[B^1]$", "#7F3B08", (0, (5, 2)), 1.8)
_AT_END = Style(r"parents under $P_t$", "#009E73", "solid", 1.0)
_PARENTS = Style(r"parents $A$ and $P_{\mathrm{end}}[B]$", "#555555", (0, (1, 1)))

# Short forms of methods whose names are longer than the eight characters of a column.
_SHORT = {"activations": "activ.", "covariance": "covar."}

# Number of methods whose columns fit side by side.
_ABREAST = 2


def draw_instability(results: _Finished, target: Target) -> None:
    """Draw barriers at the end of training by spawn epoch: figure 1 right, figures 8 and 9 column 3.

    One row for each matching method; columns test error, train error, test loss. Lines are means over
    replicates, bands one standard deviation. The shaded epochs are the range of the replicates' onsets, the
    thin upright line is the onset of the mean. Barriers under P_t of the first epochs may leave the panel.
    """
    config, summary = results.config, results.require_summary()
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 0.9 + 2.2 * len(config.methods)), layout="constrained")
        panels = figure.subplots(len(config.methods), 3, squeeze=False, sharey="col")
        for row, method in zip(panels, config.methods, strict=True):
            for axes, metric in zip(row, ("test_error", "train_error", "test_loss"), strict=True):
                _draw_panel(axes, config.epochs, summary, method, metric)
                dress_epochs(axes, config.epochs)
                axes.set_ylim(0, _top(summary.family, metric))
            row[0].set_title(f"matching of {method}", loc="left")
        limit = f"onset of test error barriers ≤ {config.onset_at_most:.0%}"
        note = f"after {config.recipe.epochs} epochs; bands: ± standard deviation; upright: {limit}"
        entitle(figure, results, "parents", note)
        share_legend(figure, list(panels[0]))
        figure.savefig(target, metadata={"Software": None})


def _draw_panel(axes: Axes, epochs: Sequence[int], summary: FamilySummary, method: str, metric: str) -> None:
    """Draw the barriers of one method in one metric."""
    scale, label = METRIC_LABELS[metric]
    family = summary.family
    parents = [family.parents.aligned[method]] * len(epochs)
    for series, style in (
        ([spawn.siblings for spawn in family.spawns], _SIBLINGS),
        ([spawn.at_end[method] for spawn in family.spawns], _AT_END),
        (parents, _PARENTS),
        ([spawn.children[method] for spawn in family.spawns], _CHILDREN),
    ):
        draw_band(axes, epochs, [getattr(metrics, metric) for metrics in series], style, scale)
    onset = summary.onset
    # Where a replicate has no onset, the range goes on to the edge.
    low, high = (value if math.isfinite(value) else epochs[-1] for value in (onset.low, onset.high))
    axes.axvspan(low, high, color="#000000", alpha=0.07, linewidth=0)
    if math.isfinite(onset.mean_curve):
        axes.axvline(onset.mean_curve, color="#000000", linewidth=0.7)
    axes.set(ylabel=label, xlabel="epoch $t$ at which children part")


def _top(family: FamilyRecord[Interval], metric: str) -> float:
    """Return the upper end of the axis of barriers, for all methods.

    P_t of the first epochs may go beyond it: a longer axis would press the lines that the figure is about to
    the ground.
    """

    def highest(series: Sequence[Metrics[Interval]]) -> float:
        """Return the upper edge of the highest band."""
        intervals = [getattr(metrics, metric) for metrics in series]
        return max(float(x.mean + np.nan_to_num(x.deviation)) for x in intervals)

    shown = [spawn.siblings for spawn in family.spawns]
    shown += [metrics for spawn in family.spawns for metrics in spawn.children.values()]
    shown += family.parents.aligned.values()
    at_end = [metrics for spawn in family.spawns for metrics in spawn.at_end.values()]
    top = min(2 * highest(shown), 1.05 * highest([*shown, *at_end]))
    return METRIC_LABELS[metric][0] * top + 1e-3


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, kind of pair, method, epoch and metric.

    ``parents`` have no spawn epoch; ``at_end`` are the parents under the permutation from an epoch.
    """
    for replicate, record in enumerate(results.records):
        parents = {"none": record.parents.unaligned, **record.parents.aligned}
        for metric in METRICS:
            for method, metrics in parents.items():
                yield _row(replicate, "parents", method, "", metric, metrics)
            for kind, method, picked in _series(record):
                for spawn, metrics in zip(record.spawns, picked, strict=True):
                    yield _row(replicate, kind, method, spawn.epoch, metric, metrics)


def _series(record: FamilyRecord[float]) -> Iterator[tuple[str, str, list[Metrics[float]]]]:
    """Yield ``(kind of pair, method, barriers by spawn epoch)`` for everything measured by spawn epoch."""
    spawns = record.spawns
    yield "siblings", "none", [spawn.siblings for spawn in spawns]
    yield "children", "none", [spawn.unaligned for spawn in spawns]
    for method in record.parents.aligned:
        yield "children", method, [spawn.children[method] for spawn in spawns]
    for method in record.parents.aligned:
        yield "at_end", method, [spawn.at_end[method] for spawn in spawns]


def _row(
    replicate: int, pair: str, method: str, epoch: int | str, metric: str, metrics: Metrics[float]
) -> dict[str, Any]:
    return {
        "replicate": replicate,
        "pair": pair,
        "method": method,
        "epoch": epoch,
        "metric": metric,
        "barrier": f"{getattr(metrics, metric):.6g}",
    }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of spawn epochs for each two methods, the barriers of the parents, and the onset."""
    methods, summary = results.config.methods, results.require_summary()
    reporter.say("\nBarriers at the end, test data, of children that part at epoch t (errors in %);")
    reporter.say(describe_mean(results.config.replicates, "parents"))
    for first in range(0, len(methods), _ABREAST):
        _print_table(summary.family, methods[first : first + _ABREAST], reporter)
    reporter.say("A¹–A²: siblings; A¹–P[B¹]: children of both parents under the parents' P_end;")
    reporter.say("P_t@end: the parents at the end under their permutation from t")
    parents = {"unaligned": summary.family.parents.unaligned, **summary.family.parents.aligned}
    known = [f"{name} {cell(metrics.test_error, percent=True)}" for name, metrics in parents.items()]
    reporter.wrap(f"parents under P_end, test error: {', '.join(known)}")
    reporter.say(f"onset of linear connectivity: epoch {_describe_onset(summary.onset)}")


def _print_table(family: FamilyRecord[Interval], methods: Sequence[str], reporter: Reporter) -> None:
    siblings = [spawn.siblings for spawn in family.spawns]
    columns = {"A¹–A²\n\nloss": siblings, "A¹–A²\n\nerror": siblings}
    for method in methods:
        short = _SHORT.get(method, method.split("_")[0])[:8]
        children = [spawn.children[method] for spawn in family.spawns]
        columns |= {f"{short}\nA¹–P[B¹]\n{name}": children for name in ("loss", "error")}
        columns[f"{short}\nP_t@end\nerror"] = [spawn.at_end[method] for spawn in family.spawns]
    rows = [[str(spawn.epoch)] for spawn in family.spawns]
    for header, series in columns.items():
        metric = header.rpartition("\n")[2]
        for row, metrics in zip(rows, series, strict=True):
            row.append(cell(getattr(metrics, f"test_{metric}"), percent=metric == "error"))
    reporter.table(["\n\nt", *columns], rows)


def _describe_onset(onset: Onset) -> str:
    """Write the onset of the mean and the range over replicates."""
    mean, low, high = (
        f"{value:.1f}" if math.isfinite(value) else "none"
        for value in (onset.mean_curve, onset.low, onset.high)
    )
    return f"{mean} of the mean, {low} to {high} over replicates"
