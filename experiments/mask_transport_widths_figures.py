"""Figure, table and tidy rows of ``mask_transport_widths``, made from ``results.json`` alone."""

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.harness.console import Reporter
from experiments.harness.figures import GROUND, RC, Style, Target, draw_band, entitle, share_legend
from experiments.harness.pruning import WidthLevel, WidthRecord, WidthsSummary
from experiments.harness.record import METRICS, Metrics
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval, student_interval

__all__ = ["draw_widths", "gaps", "report", "tidy_rows"]

# What a finished run holds; its config is a `TransportWidthsConfig`.
_Finished = Results[Any, WidthRecord[float], WidthsSummary]

_UNPERMUTED = GROUND._replace(label=r"$B$ with $m_A$ as it is", marker=".")
_TRANSPORTED = Style(r"$P[B]$ with $m_A$", "#0072B2", width=1.8, marker="o")


def _picked(level: WidthLevel[Any], name: str) -> Metrics[Any]:
    """Return the metrics of B with a mask: ``own``, ``unpermuted``, or that of a method."""
    return getattr(level, name) if name in ("own", "unpermuted") else level.methods[name]


def gaps(results: _Finished, width: int, name: str, levels: slice) -> Interval:
    """Return the test error with a mask above that with B's own, averaged over levels.

    Args:
      results: the finished run.
      width: width of the networks.
      name: a matching method, or ``"unpermuted"``.
      levels: the levels to average over.
    """
    return student_interval(
        [
            float(np.mean([_picked(x, name).test_error - x.own.test_error for x in record.levels[levels]]))
            for record in results.records
            if record.width == width
        ]
    )


def draw_widths(results: _Finished, target: Target) -> None:
    """Draw the gap to B's own mask over widths, and by the fraction of weights that remain.

    One row for each matching method. Lines are means over replicates, bands one standard deviation.
    """
    config = results.config
    high = slice((config.levels + 1) // 2, None)
    remaining = [level.density.mean for level in results.require_summary().widths[0].levels]
    with mpl.rc_context(RC):
        size = (8.0, 1.2 + 2.4 * len(config.methods))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(config.methods), 2, squeeze=False)
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(config.widths)))
        for (left, right), method in zip(panels, config.methods, strict=True):
            for name, style in (("unpermuted", _UNPERMUTED), (method, _TRANSPORTED)):
                series = [gaps(results, width, name, high) for width in config.widths]
                draw_band(left, config.widths, series, style, 100, signed=True)
            left.set_title(f"matching of {method}", loc="left")
            left.set(xscale="log", xlabel="width", ylabel="test error above own mask (%)")
            left.set_xticks(config.widths, labels=[str(width) for width in config.widths])
            for width, colour in zip(config.widths, colours, strict=True):
                series = [gaps(results, width, method, slice(i, i + 1)) for i in range(config.levels + 1)]
                draw_band(right, remaining, series, Style(f"width {width}", colour), 100, signed=True)
            right.set(xscale="log", xlabel="fraction of weights", ylabel="gap (%)")
            ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005) if t >= 0.8 * min(remaining)]
            right.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            right.set_xlim(1.05, min(remaining) / 1.05)  # sparser to the right, as in the paper
            for axes in (left, right):
                axes.axhline(0, color="#000000", linewidth=0.7)
                axes.minorticks_off()
                axes.grid(alpha=0.25, linewidth=0.5)
        note = (
            f"weights rewound to epoch {config.rewind_epoch}; over widths: mean of levels {high.start} to "
            f"{config.levels}; bands: ± standard deviation"
        )
        entitle(figure, results, "networks", note)
        share_legend(figure, list(panels[0]), columns=4)
        figure.savefig(target, metadata={"Software": None})


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each width, pair, level, mask and metric."""
    for record in results.records:
        for level in record.levels:
            for name in ("own", "unpermuted", *level.methods):
                for metric in METRICS:
                    yield {
                        "width": record.width,
                        "seed": record.seeds[0],
                        "level": level.level,
                        "density": f"{level.density:.6g}",
                        "mask": name,
                        "metric": metric,
                        "value": f"{getattr(_picked(level, name), metric):.6g}",
                    }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print test errors of B with its own mask, and gaps, by width and averaged over levels."""
    config, summary = results.config, results.require_summary()
    half = (config.levels + 1) // 2
    parts = {f"{half}-{config.levels}": slice(half, None)}
    if half > 1:
        parts = {f"1-{half - 1}": slice(1, half)} | parts
    reporter.say("")
    reporter.wrap(
        f"Test error in % of B, rewound to epoch {config.rewind_epoch} and trained in a new data order with "
        f"its own mask, and how much more with masks of A; {describe_mean(config.replicates)} at each width"
    )
    rows = []
    for record in summary.widths:
        for title, levels in parts.items():
            own = 100 * float(np.mean([level.own.test_error.mean for level in record.levels[levels]]))
            rows.append(
                [
                    str(record.width),
                    title,
                    f"{100 * record.levels[0].own.test_error.mean:.1f}",
                    f"{own:.1f}",
                    *(
                        _cell(gaps(results, record.width, name, levels))
                        for name in ("unpermuted", *config.methods)
                    ),
                ]
            )
    reporter.table(
        ["width", "levels", "dense", "own", "+unpermuted", *(f"+P {m}" for m in config.methods)], rows
    )


def _cell(value: Interval) -> str:
    deviation = f"±{100 * value.deviation:.1f}" if np.isfinite(value.deviation) else ""
    return f"{100 * value.mean:.1f}{deviation}"
