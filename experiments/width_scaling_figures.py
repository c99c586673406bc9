"""Figures, tables and tidy rows of ``width_scaling``, made from ``results.json`` alone."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.console import Reporter, cell
from experiments.harness.figures import (
    GROUND,
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
from experiments.harness.statistics import Interval
from experiments.harness.transport import NeededWidth, ScalingRecord, ScalingSummary
from rebasin.bounds import WidthBound, stated_width, width_bound

__all__ = ["Bounds", "bounds_of", "draw_bounds", "draw_scaling", "report", "tidy_rows"]

# What a finished run holds; its config is a `ScalingConfig`.
_Finished = Results[Any, ScalingRecord[float], ScalingSummary]

# Dark to light, so that a grey print tells lines apart.
_COLOURS = ("#08306B", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
_DASHES = ("solid", (0, (5, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), "solid")

# Logarithms of widths beyond this are drawn at the edge.
_MOST_DIGITS = 60.0


class Bounds:
    """What the calculator of bounds says where networks of one kind begin to be connected.

    The tolerance of the bounds is the relative Wasserstein-2 distance that the first layers have there.

    Attributes:
      isotropic: bounds for neurons that fill all directions alike.
      low: bounds for neurons that fill as many directions as the effective dimension alone.
    """

    def __init__(self, needed: NeededWidth) -> None:
        dimension = max(1, min(round(needed.dimension), needed.inputs))
        epsilon = min(needed.distance, 0.999)
        common = {"epsilon": epsilon, "depth": needed.depth}
        self.isotropic: WidthBound = width_bound(needed.inputs, **common)
        self.low: WidthBound = width_bound(needed.inputs, **common, low=dimension)


def bounds_of(needed: NeededWidth) -> Bounds | None:
    """Return the bounds where networks begin to be connected; `None` where they never are."""
    return Bounds(needed) if math.isfinite(needed.distance) and needed.distance > 0 else None


def _two_layer(summary: ScalingSummary) -> list[int]:
    """Return the numbers of inputs of two-layer networks, ascending."""
    return sorted({record.inputs for record in summary.settings if record.depth == 1})


def _write_width(width: float, widths: Sequence[int]) -> str:
    """Write a width that is needed; it may lie beyond those that were measured."""
    if not math.isfinite(width):  # infinity is read back as NaN
        return f"> {widths[-1]}"
    return f"≤ {widths[0]}" if width <= widths[0] else f"{width:.0f}"


def _write_digits(logarithm: float) -> str:
    """Write a width, given its decimal logarithm."""
    if logarithm < 4:
        return f"{10**logarithm:.0f}"
    return f"10^{logarithm:.0f}" if logarithm < 1000 else "10^1000+"


def report(results: _Finished, reporter: Reporter) -> None:
    """Print tables of barriers, of the widths needed, and of bounds beside them."""
    config, summary = results.config, results.require_summary()
    reporter.say(f"\n{describe_mean(config.replicates)}: test loss barrier after weight matching")
    rows = []
    for kind in dict.fromkeys((record.inputs, record.depth) for record in summary.settings):
        own = [record for record in summary.settings if (record.inputs, record.depth) == kind]
        rows.append([*map(str, kind), *(cell(record.aligned.test_loss, percent=False) for record in own)])
    reporter.table(["\ninputs", "hidden\nlayers", *(f"width\n{width}" for width in config.widths)], rows)
    reporter.say("\nWidth from which on the barrier of the mean stays within ε (range over pairs)")
    rows = []
    for kind in dict.fromkeys((needed.inputs, needed.depth) for needed in summary.needed):
        own = [needed for needed in summary.needed if (needed.inputs, needed.depth) == kind]
        texts = [
            "{} ({} to {})".format(
                *(
                    _write_width(width, config.widths)
                    for width in (needed.onset.mean_curve, needed.onset.low, needed.onset.high)
                )
            )
            for needed in own
        ]
        rows.append([*map(str, kind), *texts])
    header = [f"\nε = {tolerance:g}" for tolerance in config.tolerances]
    reporter.table(["\ninputs", "hidden\nlayers", *header], rows)
    if summary.exponents is not None:
        a, b = summary.exponents.dimension, summary.exponents.tolerance
        reporter.wrap(
            f"two-layer networks: width grows as inputs^{_interval(a)} and as (1/ε)^{_interval(b)}; "
            "the order √d/ε has 0.5 and 1"
        )
    reporter.say(f"\nBounds at ε = {config.tolerances[-1]:g}, relative W₂ is their tolerance")
    rows = []
    for needed in (needed for needed in summary.needed if needed.tolerance == config.tolerances[-1]):
        bounds = bounds_of(needed)
        texts = ["none"] * 6
        if bounds is not None:
            logs = [x[-1] for x in (*bounds.isotropic, *bounds.low)]
            texts = [f"{needed.distance:.2f}", f"{needed.dimension:.0f}", *map(_write_digits, logs)]
        width = _write_width(needed.onset.mean_curve, config.widths)
        rows.append([str(needed.inputs), str(needed.depth), width, *texts])
    reporter.table(
        ["\ninputs", "hidden\nlayers", "\nwidth", "\nW₂", "eff.\ndim.", "all dim.\nlower", "\nupper"]
        + ["eff. dim.\nlower", "\nupper"],
        rows,
    )
    reporter.wrap(
        "bounds of the last hidden layer for independent Gaussian neurons, isotropic in all inputs or in as "
        "many directions as the effective dimension of W Σ Wᵀ (rebasin.bounds); W₂ in the metric of Σ"
    )


def _interval(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.mean:.2f}"
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each pair and metric."""
    for record in results.records:
        for metric in METRICS:
            yield {
                "inputs": record.inputs,
                "hidden_layers": record.depth,
                "width": record.width,
                "seed": record.seeds[0],
                "metric": metric,
                "unaligned": f"{getattr(record.unaligned, metric):.6g}",
                "aligned": f"{getattr(record.aligned, metric):.6g}",
                "distance": f"{record.distances[0]:.6g}",
                "dimension": f"{record.dimensions[0]:.6g}",
            }


def draw_scaling(results: _Finished, target: Target) -> None:
    """Draw barriers by width for each number of inputs and each depth, and the widths that are needed."""
    config, summary = results.config, results.require_summary()
    inputs = _two_layer(summary)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for i, d in enumerate(inputs):
            _draw_kind(left, summary, d, 1, config.widths, _style(i, f"d = {d}"))
        left.set_title("two-layer networks by inputs d")
        for i, depth in enumerate(config.depths):
            label = f"{depth} hidden layer{'s' * (depth > 1)}"
            _draw_kind(middle, summary, inputs[-1], depth, config.widths, _style(i, label))
        middle.set_title(f"by depth, d = {inputs[-1]}")
        for axes in (left, middle):
            for tolerance in config.tolerances:
                axes.axhline(tolerance, color=GROUND.colour, linewidth=0.6, linestyle=(0, (1, 1)))
            dress_widths(axes, config.widths)
            axes.set_ylabel("test loss barrier (nats)")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=7)
        _draw_needed(right, summary, config)
        note = (
            "weight matching; left, middle: ± standard deviation, dotted: tolerances ε; right: range of pairs"
        )
        entitle(figure, results, "networks", note)
        figure.savefig(target, metadata={"Software": None})


def _style(i: int, label: str) -> Style:
    return Style(label, _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)], marker="o")


def _draw_kind(
    axes: Axes, summary: ScalingSummary, inputs: int, depth: int, widths: Sequence[int], style: Style
) -> None:
    """Draw the test loss barrier by width."""
    own = [r for r in summary.settings if (r.inputs, r.depth) == (inputs, depth)]
    draw_band(axes, widths, [record.aligned.test_loss for record in own], style)


def _draw_needed(axes: Axes, summary: ScalingSummary, config: Any) -> None:
    """Draw the width that two-layer networks need by their number of inputs, beside the slope of √d."""
    for i, tolerance in enumerate(config.tolerances):
        own = [n for n in summary.needed if n.depth == 1 and n.tolerance == tolerance]
        known = [n for n in own if math.isfinite(n.onset.mean_curve)]
        style = _style(i, f"ε = {tolerance:g}")
        x, y = [n.inputs for n in known], [n.onset.mean_curve for n in known]
        low = [n.onset.mean_curve - min(n.onset.low, n.onset.mean_curve) for n in known]
        tops = [n.onset.high if math.isfinite(n.onset.high) else config.widths[-1] for n in known]
        high = [max(top - n.onset.mean_curve, 0.0) for top, n in zip(tops, known, strict=True)]
        axes.errorbar(
            x,
            y,
            yerr=(low, high),
            color=style.colour,
            linestyle=style.dashes,
            marker="o",
            markersize=3,
            linewidth=1.2,
            capsize=2,
            label=style.label,
        )
        if known:
            middle = len(known) // 2
            scale = known[middle].onset.mean_curve / math.sqrt(known[middle].inputs)
            ends = np.array([min(x), max(x)], float)
            label = "slope of √d" if i == 0 else None
            axes.plot(ends, scale * np.sqrt(ends), color=GROUND.colour, linewidth=0.8, label=label)
    inputs = _two_layer(summary)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xticks(inputs, labels=[str(d) for d in inputs])
    axes.set_yticks(list(config.widths), labels=[str(w) for w in config.widths])
    axes.minorticks_off()
    axes.set_ylim(config.widths[0] / 1.3, config.widths[-1] * 1.3)
    axes.set(xlabel="inputs d", ylabel="width needed", title="width needed by two-layer networks")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=7)


def draw_bounds(results: _Finished, target: Target) -> None:
    """Draw the widths needed at the strictest tolerance beside their bounds, by inputs and by depth."""
    config, summary = results.config, results.require_summary()
    own = [n for n in summary.needed if n.tolerance == config.tolerances[-1]]
    last = _two_layer(summary)[-1]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_bounds(left, [n for n in own if n.depth == 1], lambda n: n.inputs)
        _draw_bounds(right, [n for n in own if n.inputs == last], lambda n: n.depth)
        left.set(xscale="log", xlabel="inputs d", title="two-layer networks")
        inputs = _two_layer(summary)
        left.set_xticks(inputs, labels=[str(d) for d in inputs])
        left.minorticks_off()
        right.set(xlabel="hidden layers", title=f"d = {last}")
        right.set_xticks(list(config.depths))
        for axes in (left, right):
            axes.set_ylabel("log₁₀ of the width")
            axes.grid(alpha=0.25, linewidth=0.5)
        note = (
            f"barrier within {config.tolerances[-1]:g} nats; bounds at the relative W₂ of the first layers "
            f"there, cut off at 10^{_MOST_DIGITS:g}"
        )
        entitle(figure, results, "networks", note)
        share_legend(figure, [left, right], columns=3)
        figure.savefig(target, metadata={"Software": None})


def _draw_bounds(axes: Axes, needed: Sequence[NeededWidth], x_of: Any) -> None:
    """Draw measured widths, both pairs of bounds, and the order that is stated, scaled to the first width."""
    known = [n for n in needed if math.isfinite(n.onset.mean_curve) and bounds_of(n) is not None]
    if not known:
        return
    x = [x_of(n) for n in known]
    found = [bounds for bounds in map(bounds_of, known) if bounds is not None]
    for name, colour, label in (
        ("isotropic", "#D55E00", "bounds, isotropic in d"),
        ("low", "#009E73", "bounds, effective dimension"),
    ):
        lower, upper = (
            [min(getattr(getattr(bounds, name), side)[-1], _MOST_DIGITS) for bounds in found]
            for side in ("lower", "upper")
        )
        axes.fill_between(x, lower, upper, color=colour, alpha=0.25, linewidth=0, label=label)
        axes.plot(x, lower, color=colour, linewidth=1.0)
        axes.plot(x, upper, color=colour, linewidth=1.0, linestyle=(0, (5, 2)))
    measured = [math.log10(n.onset.mean_curve) for n in known]
    stated = [stated_width(n.inputs, epsilon=0.5, depth=n.depth) for n in known]
    shift = measured[0] - stated[0]
    axes.plot(
        x, [s + shift for s in stated], color=GROUND.colour, linestyle=GROUND.dashes, label="order stated"
    )
    axes.plot(x, measured, color="#0072B2", marker="o", markersize=4, linewidth=1.6, label="measured")
