"""The report of a diagnosis: its numbers, and its text."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence

from rebasin.diagnosis.findings import Finding, find_causes
from rebasin.diagnosis.record import GroupNumbers, LayerNumbers, MidpointNumbers, Performance, StreamNumbers

__all__ = ["Diagnosis"]

_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `rebasin.diagnose` measured between networks A and B; ``str(diagnosis)`` is the report.

    Attributes:
      layers: a row for each layer whose weight is a leaf, in the order of the program.
      groups: a row for each group of units, or for groups that only move together, such as heads with their
        dimensions.
      streams: the groups that several layers write into.
      midpoint: loss and error at the midpoint; `None` where the outputs are no logits.
      num_examples: number of examples on which everything was measured.
      num_classes: number of logits; `None` where the outputs are no logits.
      has_labels: whether the data had labels. Without them the classes that A and B predict together stand
        in.
    """

    layers: tuple[LayerNumbers, ...]
    groups: tuple[GroupNumbers, ...]
    streams: tuple[StreamNumbers, ...]
    midpoint: MidpointNumbers | None
    num_examples: int
    num_classes: int | None
    has_labels: bool

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What stands out, the likeliest cause of the barrier first; empty where nothing does."""
        return find_causes(self.layers, self.groups, self.streams, self.midpoint, self.num_classes)

    def __str__(self) -> str:
        """Return the report, at most 80 columns wide: what stands out, then the numbers."""
        parts = [_headline(self), _conclusions(self.midpoint, self.findings)]
        if self.midpoint is not None:
            parts.append(_midpoint_table(self.midpoint))
        parts += [_layer_table(self.layers), _group_table(self.groups), *map(_stream_table, self.streams)]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _headline(diagnosis: Diagnosis) -> list[str]:
    examples = f"{diagnosis.num_examples} example{'' if diagnosis.num_examples == 1 else 's'}"
    if diagnosis.midpoint is None:
        note = "The outputs are no logits [n, classes], so loss and error were not measured."
    elif diagnosis.has_labels:
        note = ""
    else:
        note = "There are no labels: the classes that A and B predict together stand in for them."
    return _wrap(f"Path between networks A and B, on {examples}. {note}".strip())


def _conclusions(midpoint: MidpointNumbers | None, findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return _wrap(
            "Nothing stands out." if midpoint is None else f"Nothing stands out: {_excess(midpoint)}."
        )
    lines = ["What stands out:" if midpoint is None else f"What stands out, where {_excess(midpoint)}:"]
    lines = _wrap(lines[0])
    for number, finding in enumerate(findings, 1):
        gone = f" ({_percent(min(finding.removes, 1))} of the excess gone)" if finding.removes > 0 else ""
        text = f"{finding.text[0].upper()}{finding.text[1:]}{gone}."
        lines += _wrap(text, first=f"  {number}. ", rest="     ")
        lines += _wrap(f"Try: {finding.advice}.", first="     ", rest="     ")
    return lines


def _excess(midpoint: MidpointNumbers) -> str:
    ends, permuted = midpoint.ends, midpoint.permuted
    return (
        f"the midpoint's error lies {100 * (permuted.error - ends.error):.1f} points above that of A and B, "
        f"its loss {permuted.loss - ends.loss:.3g} nats"
    )


def _midpoint_table(midpoint: MidpointNumbers) -> list[str]:
    rows: list[tuple[str, Performance | None]] = [
        ("network A", midpoint.a),
        ("network B", midpoint.b),
        ("midpoint, B as it is", midpoint.before),
        ("midpoint, B permuted", midpoint.permuted),
        ("  with REPAIR", midpoint.repaired),
        (
            f"  at the softmax temperature {midpoint.temperature:.3g}",
            Performance(midpoint.tempered_loss, midpoint.permuted.error),
        ),
        ("  permuted by activation matching instead", midpoint.by_activations),
        ("  with layers of B scaled to the norms of A's", midpoint.rescaled),
    ]
    cells = [(name, *_cells(value)) for name, value in rows if value is not None]
    return _table("Loss in nats and error", ("", "loss", "error"), cells)


def _layer_table(layers: Sequence[LayerNumbers]) -> list[str]:
    title = (
        "Layers: overlap of the leading singular vectors of A and B before and after the permutation "
        "(arXiv 2402.04051); variance left at the midpoint (REPAIR, arXiv 2211.08403); norm of A's weight "
        "over that of B's"
    )
    cells = [
        (
            layer.path,
            f"{layer.overlap_before:.2f}",
            f"{layer.overlap:.2f}",
            "" if layer.variance is None else _percent(layer.variance),
            f"{layer.norm_ratio:.2f}",
        )
        for layer in layers
    ]
    return _table(title, ("", "before", "after", "variance", "norm"), cells)


def _group_table(groups: Sequence[GroupNumbers]) -> list[str]:
    title = (
        "Groups: mean correlation of paired units now and at best (arXiv 1511.07543); units that activation "
        "matching pairs otherwise; the midpoint with its permutation of this group alone (arXiv 2404.06498, "
        "appendix A), and with that of weight matching"
    )
    cells = [
        (
            " + ".join(group.groups),
            str(group.units),
            f"{group.correlation:.2f}",
            f"{group.best_correlation:.2f}",
            _percent(group.moved),
            *_cells(group.replaced),
            *_cells(group.rematched),
        )
        for group in groups
    ]
    return _table(title, ("", "units", "now", "best", "other", "loss", "error", "loss", "error"), cells)


def _stream_table(stream: StreamNumbers) -> list[str]:
    title = (
        f"Blocks that share {stream.group}: cosine of their weights under the permutation that is best for "
        "all blocks, under the best for each block alone, and under the best where there is nothing to find; "
        "units that both place alike"
    )
    cells = [
        (" .. ".join(dict.fromkeys((block.paths[0], block.paths[-1]))),)
        + tuple(f"{value:.2f}" for value in (block.shared, block.own, block.chance))
        + (_percent(block.same),)
        for block in stream.blocks
    ]
    return _table(title, ("", "shared", "own", "chance", "same"), cells)


def _cells(performance: Performance | None) -> tuple[str, str]:
    """Return loss and error as text."""
    if performance is None:
        return "", ""
    return f"{performance.loss:.3f}", f"{100 * performance.error:.1f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else ""


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a title and a table whose first column is text, shortened at its beginning to fit the width."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    names = min(widths[0], _WIDTH - 2 - sum(2 + width for width in widths[1:]))
    lines = _wrap(title)
    for row in (header, *rows):
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"  {_shorten(row[0], names):<{names}}{numbers}".rstrip())
    return lines


def _shorten(name: str, width: int) -> str:
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _wrap(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
