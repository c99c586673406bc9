"""Figures, tables and tidy rows of ``strong_connectivity``, made from ``results.json`` alone."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.connectivity import TripletRecord, TripletSummary
from experiments.harness.console import Reporter, cell
from experiments.harness.figures import (
    GROUND,
    METRIC_LABELS,
    RC,
    Style,
    Target,
    draw_band,
    dress_widths,
    entitle,
    share_legend,
)
from experiments.harness.record import METRICS
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval, Onset

__all__ = ["between", "comparisons", "draw_joint", "draw_onsets", "draw_strong", "report", "tidy_rows"]

# What a finished run holds; its config is a `StrongConfig`.
_Finished = Results[Any, TripletRecord[float], TripletSummary]

_GROUNDS = {
    "unaligned": GROUND,
    "tempered": Style("no permutation, temperature fitted", "#777777", (0, (3, 1, 1, 1)), 1.2),
}
_COLOURS = {"direct": "#0072B2", "indirect": "#D55E00", "reference": "#009E73"}
# Activations are drawn solid and weights dashed; any further methods dotted.
_DASHES = {"activations": "solid", "weights": (0, (5, 2))}
_JOINT = {
    "merge_many": Style("MergeMany", "#E69F00", (0, (5, 2))),
    "universe": Style("cycle-consistent universe", "#56B4E9", (0, (5, 1, 1, 1))),
    "all_pairs": Style("loss of all pairs", "#CC79A7", "solid", 1.9),
}


def comparisons(config: Any) -> list[str]:
    """Return the names of all comparisons between A and B, in the order of files and figures.

    Args:
      config: the `StrongConfig` of a run.
    """
    matched = [f"{how} {method}" for method in config.methods for how in ("direct", "indirect")]
    return [*_GROUNDS, *matched, *config.joint]


def between(record: TripletRecord[Any], name: str) -> Any:
    """Return the barriers between A and B in one comparison.

    Args:
      record: the record of a triplet, or a summary over triplets.
      name: one of `comparisons`, or ``"reference"`` and a method for the mean of the paths to C.
    """
    how, _, method = name.partition(" ")
    if method:
        return getattr(record.methods[method], how)
    return getattr(record, name) if name in _GROUNDS else record.joint[name].between


def _style(name: str) -> Style:
    if name in _GROUNDS or name in _JOINT:
        return {**_GROUNDS, **_JOINT}[name]
    how, _, method = name.partition(" ")
    label = {"reference": "A or B to C", "indirect": "A to B through C", "direct": "A to B direct"}[how]
    width = 1.0 if how == "reference" else 1.6
    return Style(f"{label}, {method}", _COLOURS[how], _DASHES.get(method, (0, (1, 1))), width)


def draw_strong(results: _Finished, target: Target) -> None:
    """Draw barriers and fixed points by width: figures 3 and 14.

    Columns are loss and error, rows training and test data; on the right the fixed points that direct and
    indirect permutations share, as fractions and as multiples of chance. Bands are one standard deviation.
    """
    config, widths = results.config, results.require_summary().widths
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 5.6), layout="constrained")
        panels = figure.subplots(2, 3)
        for row, split in zip(panels, ("train", "test"), strict=True):
            for axes, kind in zip(row, ("loss", "error"), strict=False):
                _draw_matched(axes, config, widths, f"{split}_{kind}")
        _draw_fixed_points(panels[0, 2], config, widths, relative=False)
        _draw_fixed_points(panels[1, 2], config, widths, relative=True)
        entitle(figure, results, "networks", "bands: ± standard deviation")
        share_legend(figure, list(panels.flat), columns=4)
        figure.savefig(target, metadata={"Software": None})


def _draw_matched(axes: Axes, config: Any, widths: Sequence[TripletRecord[Interval]], metric: str) -> None:
    scale, label = METRIC_LABELS[metric]
    for name in _GROUNDS:
        if name == "tempered" and metric.endswith("error"):
            continue  # the error does not depend on the temperature
        _draw_series(axes, config, [getattr(between(w, name), metric) for w in widths], name, scale)
    for method in config.methods:
        to_c = [_mean([getattr(m, metric) for m in w.methods[method].to_reference]) for w in widths]
        _draw_series(axes, config, to_c, f"reference {method}", scale)
        for how in ("direct", "indirect"):
            series = [getattr(getattr(w.methods[method], how), metric) for w in widths]
            _draw_series(axes, config, series, f"{how} {method}", scale)
    _dress(axes, config, label)


def _mean(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of means, with the mean deviation for the band."""
    return Interval(
        float(np.mean([i.mean for i in intervals])),
        math.nan,
        math.nan,
        float(np.mean([i.deviation for i in intervals])),
    )


def _draw_series(axes: Axes, config: Any, series: Sequence[Interval], name: str, scale: float) -> None:
    draw_band(axes, config.widths, series, _style(name)._replace(marker="."), scale)


def _dress(axes: Axes, config: Any, label: str, *, log: bool = False) -> None:
    axes.set(ylabel=label)
    if log:
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0)
    dress_widths(axes, config.widths)


def _draw_fixed_points(
    axes: Axes, config: Any, widths: Sequence[TripletRecord[Interval]], *, relative: bool
) -> None:
    """Draw how far direct and indirect permutations agree, as fractions or in multiples of chance."""
    for method in config.methods:
        chance = [w.methods[method].chance.mean for w in widths]
        shared = [w.methods[method].fixed_points.total for w in widths]
        if relative:
            shared = [Interval(*(x / c for x in s)) for s, c in zip(shared, chance, strict=True)]
        style = Style(f"fixed points, {method}", "black", _DASHES.get(method, (0, (1, 1))), marker=".")
        draw_band(axes, config.widths, shared, style, 1 if relative else 100)
    first = [w.methods[config.methods[0]].chance.mean for w in widths]
    level = [1.0] * len(widths) if relative else [100 * c for c in first]
    axes.plot(config.widths, level, color="#777777", linewidth=0.8, label="fixed points by chance")
    _dress(axes, config, "shared fixed points " + ("(× chance)" if relative else "(%)"), log=relative)


def draw_joint(results: _Finished, target: Target) -> None:
    """Draw barriers between A and B under joint algorithms by width, beside direct and indirect alignment."""
    config, widths = results.config, results.require_summary().widths
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, metric in zip(panels, ("test_loss", "test_error", "train_loss"), strict=True):
            scale, label = METRIC_LABELS[metric]
            for name in comparisons(config)[len(_GROUNDS) :]:
                series = [getattr(between(w, name), metric) for w in widths]
                # Bands of so many lines would hide each other; the CSV has every replicate.
                means = [interval._replace(deviation=math.nan) for interval in series]
                _draw_series(axes, config, means, name, scale)
            _dress(axes, config, label)
        entitle(figure, results, "networks", "lines: means")
        share_legend(figure, list(panels), columns=4)
        figure.savefig(target, metadata={"Software": None})


def draw_onsets(results: _Finished, target: Target) -> None:
    """Draw the width from which on A and B are connected, with the range of the replicates."""
    config, onsets = results.config, results.require_summary().onsets
    names = comparisons(config)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 1.2 + 0.22 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (metric, threshold) in zip(panels, config.thresholds.items(), strict=True):
            for row, name in enumerate(names):
                _draw_onset(axes, row, onsets[metric][name], config.widths, _style(name).colour)
            scale, label = METRIC_LABELS[metric]
            axes.set(title=f"{label} at most {scale * threshold:g}", yticks=range(len(names)))
            axes.set_yticklabels([_style(name).label for name in names])
            dress_widths(axes, config.widths)
            axes.set_xlim(config.widths[0] / 1.3, config.widths[-1] * 2.2)
        panels[0].invert_yaxis()
        entitle(
            figure, results, "networks", "dots: onset of the mean; bars: range of replicates; ▷: not reached"
        )
        figure.savefig(target, metadata={"Software": None})


def _draw_onset(axes: Axes, row: int, found: Onset, widths: Sequence[int], colour: Any) -> None:
    beyond = widths[-1] * 1.7
    # An onset that no width reaches is NaN once it was read back from a file.
    low, mean, high = (beyond if math.isnan(x) else x for x in (found.low, found.mean_curve, found.high))
    axes.plot([low, high], [row, row], color=colour, linewidth=1.4)
    marker = ">" if mean == beyond else "o"
    fill = "white" if mean == beyond else colour
    axes.plot(
        [mean], [row], marker=marker, color=colour, markerfacecolor=fill, markersize=5, linestyle="none"
    )


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each width, replicate, comparison and metric, fixed points among them."""
    for record in results.records:
        rows = [(name, between(record, name)) for name in comparisons(results.config)]
        for method, matched in record.methods.items():
            pairs = zip("AB", matched.to_reference, strict=True)
            rows += [(f"{network} to C {method}", found) for network, found in pairs]
        for name, joint in record.joint.items():
            rows += [(f"{n} to C {name}", found) for n, found in zip("AB", joint.to_reference, strict=True)]
        for name, found in rows:
            for metric in METRICS:
                yield _row(record, name, metric, getattr(found, metric))
        for method, matched in record.methods.items():
            yield _row(record, f"direct and indirect {method}", "fixed_points", matched.fixed_points.total)
            yield _row(record, f"direct and indirect {method}", "fixed_points_by_chance", matched.chance)
        for name, joint in record.joint.items():
            yield _row(record, name, "seconds", joint.seconds)


def _row(record: TripletRecord[float], comparison: str, metric: str, value: float) -> dict[str, Any]:
    return {
        "width": record.width,
        "seed": record.seeds[0],
        "comparison": comparison,
        "metric": metric,
        "value": f"{value:.6g}",
    }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of widths for each method and for joint algorithms, and the widths that connect."""
    config, summary = results.config, results.require_summary()
    mean = describe_mean(config.replicates, unit=config.unit)
    reporter.say(f"\n{mean} at each width: barriers between A and B on test data")
    for method in config.methods:
        reporter.say(f"\n{method}")
        _print_method(summary.widths, method, reporter)
    if config.joint:
        reporter.say("\nA, B and C aligned together")
        _print_joint(summary.widths, config.joint, reporter)
    reporter.wrap(
        "loss in nats, error in %; none: unaligned; temp.: unaligned, temperature fitted (the error stays); "
        "via C: A and B each aligned with C; fixed: units in % that direct "
        "and indirect permutations place alike."
    )
    reporter.say("\nthe width from which on A and B are connected [range of replicates]")
    rows = [
        [_style(name).label, *(_describe_onset(summary.onsets[m][name]) for m in config.thresholds)]
        for name in comparisons(config)
    ]
    limits = config.thresholds
    header = ["", f"error ≤ {100 * limits['test_error']:g} %", f"loss ≤ {limits['test_loss']:g} nats"]
    reporter.table(header, rows)


def _print_method(widths: Sequence[TripletRecord[Interval]], method: str, reporter: Reporter) -> None:
    rows = []
    for w in widths:
        matched = w.methods[method]
        found = (w.unaligned, w.tempered, matched.direct, matched.indirect)
        losses = [cell(m.test_loss, percent=False) for m in found]
        errors = [cell(m.test_error, percent=True) for m in (w.unaligned, matched.direct, matched.indirect)]
        fixed = f"{100 * matched.fixed_points.total.mean:.1f}"
        rows.append([str(w.width), *losses, *errors, fixed])
    loss = [f"loss\n{name}" for name in ("none", "temp.", "direct", "via C")]
    error = [f"error\n{name}" for name in ("none", "direct", "via C")]
    reporter.table(["\nwidth", *loss, *error, "\nfixed"], rows)


def _print_joint(widths: Sequence[TripletRecord[Interval]], names: Sequence[str], reporter: Reporter) -> None:
    short = {"merge_many": "merge", "universe": "univ.", "all_pairs": "pairs"}
    rows = []
    for w in widths:
        found = [w.joint[name].between for name in names]
        losses = [cell(m.test_loss, percent=False) for m in (w.unaligned, w.tempered, *found)]
        errors = [cell(m.test_error, percent=True) for m in found]
        rows.append([str(w.width), *losses, *errors])
    columns = [short[name] for name in names]
    loss = [f"loss\n{name}" for name in ("none", "temp.", *columns)]
    reporter.table(["\nwidth", *loss, *(f"error\n{name}" for name in columns)], rows)


def _describe_onset(found: Onset) -> str:
    low, mean, high = (
        "none" if math.isnan(x) else f"{x:.0f}" for x in (found.low, found.mean_curve, found.high)
    )
    return f"{mean} [{low}, {high}]"
