"""Figures, table and tidy rows of ``sparse_connectivity``, made from ``results.json`` alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
    entitle,
    share_legend,
)
from experiments.harness.pruning import MaskedPath, SparseLevel, SparseRecord
from experiments.harness.record import METRICS, Metrics
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval

__all__ = ["draw_between", "draw_levels", "report", "tidy_rows"]

# What a finished run holds; its config is a `SparseConfig`.
_Finished = Results[Any, SparseRecord[float], SparseRecord[Interval]]

# The comparisons in the order of files and figures. Those of a matching method are fields of `SparseAligned`,
# the others fields of `SparseLevel`.
_OF_LEVEL = {
    "control": GROUND._replace(label=r"control, $B^{(i)}$"),
    "baseline": Style(r"baseline, $B$ pruned in one shot", "#E69F00", (0, (3, 1, 1, 1)), 1.0),
}
_OF_METHOD = {
    "sparse": Style(r"sparse, $P^{(i)}[B^{(i)}]$", "#D55E00", "solid"),
    "previous_work": Style(r"previous work, $P^{(i)}[B]$ with $m_A$", "#CC79A7", (0, (5, 2)), 1.0),
    "transported": Style(r"transported, $P[B]$ with $m_A$", "#56B4E9", (0, (5, 2)), 1.0),
    "gold_standard": Style(r"gold standard, $P[B^{(i)}]$", "#0072B2", "solid", 1.8),
}
_COLUMNS = ("test_error", "train_error", "test_loss")


class _Series(NamedTuple):
    """One comparison over levels: its style, its barriers, and the density of networks on its paths."""

    style: Style
    barriers: Sequence[Metrics[Interval]]
    between: Sequence[Interval] | None


def _barriers(found: Any) -> Any:
    """Return the barriers of a comparison, whose field also holds a network that is not trained again."""
    return found.barriers if isinstance(found, MaskedPath) else found


def _series(levels: Sequence[SparseLevel[Interval]], method: str) -> Iterator[_Series]:
    """Yield the comparisons of one method."""
    for name, style in _OF_LEVEL.items():
        between = [level.between_control for level in levels] if name == "control" else None
        yield _Series(style, [_barriers(getattr(level, name)) for level in levels], between)
    aligned = [level.methods[method] for level in levels]
    for name, style in _OF_METHOD.items():
        between = [getattr(a, f"between_{name}", None) for a in aligned]
        known = None if None in between else [b for b in between if b is not None]
        yield _Series(style, [_barriers(getattr(a, name)) for a in aligned], known)


def draw_levels(results: _Finished, target: Target) -> None:
    """Draw barriers by the fraction of weights that remain: figures 2 left and 11.

    One row for each matching method; columns test error, train error, test loss. Lines are means over
    replicates, bands one standard deviation.
    """
    _draw(results, target, between=False)


def draw_between(results: _Finished, target: Target) -> None:
    """Draw barriers by the fraction of weights that networks on the path have: figure 12."""
    _draw(results, target, between=True)


def _draw(results: _Finished, target: Target, *, between: bool) -> None:
    config, levels = results.config, results.require_summary().levels
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 1.1 + 2.2 * len(config.methods)), layout="constrained")
        panels = figure.subplots(len(config.methods), 3, squeeze=False, sharey="col")
        for row, method in zip(panels, config.methods, strict=True):
            for axes, metric in zip(row, _COLUMNS, strict=True):
                _draw_panel(axes, levels, method, metric, between)
            row[0].set_title(f"matching of {method}", loc="left")
        what = config.rewind.replace("_", " ")
        note = f"{what} rewound to epoch {config.rewind_epoch}; bands: ± standard deviation"
        entitle(figure, results, "networks", note)
        share_legend(figure, list(panels[0]), columns=3)
        figure.savefig(target, metadata={"Software": None})


def _draw_panel(
    axes: Axes, levels: Sequence[SparseLevel[Interval]], method: str, metric: str, between: bool
) -> None:
    """Draw the barriers of one method in one metric."""
    scale, label = METRIC_LABELS[metric]
    remaining = [level.density.mean for level in levels]
    for series in _series(levels, method):
        x = remaining if not between else [b.mean for b in series.between or ()]
        if x:
            draw_band(axes, x, [getattr(m, metric) for m in series.barriers], series.style, scale)
    where = "on the path" if between else "in each network"
    axes.set(xscale="log", xlabel=f"fraction of weights {where}", ylabel=label)
    ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005) if t >= 0.8 * min(remaining)]
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(1.05, min(remaining) / 1.05)  # sparser to the right, as in the paper
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.5)


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, level, comparison, method and metric.

    ``between`` is the fraction of weights that networks on the path have, where it is measured; ``untrained``
    is the value at the end of a path that is pruned and not trained again.
    """
    for replicate, record in enumerate(results.records):
        for level in record.levels:
            for name in _OF_LEVEL:
                found, between = getattr(level, name), getattr(level, f"between_{name}", None)
                yield from _rows(replicate, level, name, "none", found, between)
            for method, aligned in level.methods.items():
                for name in _OF_METHOD:
                    found, between = getattr(aligned, name), getattr(aligned, f"between_{name}", None)
                    yield from _rows(replicate, level, name, method, found, between)


def _rows(
    replicate: int,
    level: SparseLevel[float],
    comparison: str,
    method: str,
    found: Metrics[float] | MaskedPath[float],
    between: float | None,
) -> Iterator[dict[str, Any]]:
    for metric in METRICS:
        yield {
            "replicate": replicate,
            "level": level.level,
            "density": f"{level.density:.6g}",
            "comparison": comparison,
            "method": method,
            "between": "" if between is None else f"{between:.6g}",
            "metric": metric,
            "barrier": f"{getattr(_barriers(found), metric):.6g}",
            "untrained": f"{getattr(found.network, metric):.6g}" if isinstance(found, MaskedPath) else "",
        }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of levels for each method."""
    summary = results.require_summary()
    reporter.say("\nTest error barriers by level of pruning, in %, between A⁽ⁱ⁾ and")
    reporter.say(describe_mean(results.config.replicates))
    for method in results.config.methods:
        reporter.say(f"\n{method}")
        _print_table(summary.levels, method, reporter)
    reporter.wrap(
        "error: that of A⁽ⁱ⁾; control: B⁽ⁱ⁾; base: B pruned in one shot; sparse: P⁽ⁱ⁾[B⁽ⁱ⁾]; prev.: P⁽ⁱ⁾[B] "
        "with the mask of A⁽ⁱ⁾; transp.: P[B] with the mask of A⁽ⁱ⁾; gold: P[B⁽ⁱ⁾]. Base, prev. and transp. "
        "are not trained again: the barrier to a network that is broken is low, and means little."
    )


def _print_table(levels: Sequence[SparseLevel[Interval]], method: str, reporter: Reporter) -> None:
    picked: Mapping[str, Any] = {
        "error": lambda level: level.endpoints.a,
        "control": lambda level: level.control,
        "base": lambda level: level.baseline.barriers,
        "sparse": lambda level: level.methods[method].sparse,
        "prev.": lambda level: level.methods[method].previous_work.barriers,
        "transp.": lambda level: level.methods[method].transported.barriers,
        "gold": lambda level: level.methods[method].gold_standard,
    }
    rows = [
        [
            str(level.level),
            f"{level.density.mean:.1%}",
            *(cell(pick(level).test_error, percent=True) for pick in picked.values()),
        ]
        for level in levels
    ]
    reporter.table(["i", "left", *picked], rows)
