"""What stands out in the numbers of a diagnosis, in words, and what to try.

A cause is named where its removal was measured to remove at least half of what the midpoint has too much: so
the thresholds of this file decide whether there is a barrier, and not what causes it. They were set on pairs
that are linearly connected and on pairs with a planted failure; docs/diagnosis.md has the counts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from rebasin.diagnosis.record import GroupNumbers, LayerNumbers, MidpointNumbers, Performance, StreamNumbers
from rebasin.diagnosis.scales import is_over_scaled

__all__ = ["Cause", "Finding", "find_causes"]

Cause: TypeAlias = Literal[
    "scale", "group", "method", "stream", "variance", "temperature", "unlike", "undertrained"
]

# An error at the midpoint that stands out: above the mean of the ends by this, and by three standard errors.
# Of 35 pairs without a planted failure the highest is 0.047, and the highest loss 0.13 nats.
_HIGH_ERROR = 0.05

# The same for a loss, in nats, where the error does not stand out.
_HIGH_LOSS = 0.25

_STANDARD_ERRORS = 3.0

# Share of what is too much that the removal of a cause has to remove.
_REMOVES = 0.5

# A block conflicts with the others if its own permutation has a cosine that is higher by this than under the
# shared one. Between networks trained alike it is at most 0.12, in planted conflicts at least 0.59.
_CONFLICT = 0.2


class Finding(NamedTuple):
    """One thing that stands out.

    Attributes:
      cause: what kind of cause it is: over-scaled layers (``"scale"``), the permutation of one group
        (``"group"``) or of several (``"method"``), blocks that need different permutations of a group that
        they share (``"stream"``), collapsed variance (``"variance"``), logits that are too small
        (``"temperature"``), networks that none of this connects well (``"unlike"``), or networks that have
        learned little (``"undertrained"``).
      where: the groups or layers concerned; empty where it is the whole network.
      removes: the share of the midpoint's excess that is gone without this cause; NaN where that could not be
        measured.
      text: what was measured.
      advice: what to try.
    """

    cause: Cause
    where: tuple[str, ...]
    removes: float
    text: str
    advice: str


class _Excess(NamedTuple):
    """The metric in which the midpoint stands out.

    Attributes:
      metric: the name of the metric.
      ends: its mean over A and B.
      value: how far the midpoint lies above that.
      least: how far it has to lie above that to stand out.
    """

    metric: str
    ends: float
    value: float
    least: float

    def share(self, performance: Performance) -> float:
        """Return which share of the excess is gone at another midpoint; negative where it is higher."""
        return 1 - (getattr(performance, self.metric) - self.ends) / self.value

    def show(self, performance: Performance) -> str:
        """Return the value of the metric as text."""
        value = getattr(performance, self.metric)
        if self.metric == "error":
            return f"an error of {100 * value:.1f} %"
        return f"a loss of {value:.3g} nats"


def find_causes(
    layers: Sequence[LayerNumbers],
    groups: Sequence[GroupNumbers],
    streams: Sequence[StreamNumbers],
    midpoint: MidpointNumbers | None,
    num_classes: int | None,
) -> tuple[Finding, ...]:
    """Find what stands out, the cause whose removal helps most first; nothing if there is no barrier.

    Args:
      layers: the numbers of each layer.
      groups: the numbers of each group.
      streams: the numbers of each group that several layers write into.
      midpoint: loss and error at the midpoint. Without it only over-scaled layers can stand out.
      num_classes: number of logits.
    """
    if midpoint is None:
        return tuple(_scales(layers, None, None))
    excess = _excess(midpoint)
    if excess is None:
        return ()
    found = [
        *_scales(layers, midpoint, excess),
        *_groups(groups, midpoint, excess),
        *_variance(layers, midpoint, excess),
        *_temperature(midpoint, excess),
    ]
    found.sort(key=_rank)
    # A conflict cannot be removed, and is no matter of degree: what else helps makes the best of it.
    conflicts = list(_streams(streams))
    found = conflicts + found
    if not conflicts:
        found += _unlike(layers, groups, midpoint, excess)
    return (*found, *_undertrained(midpoint, num_classes))


def _rank(finding: Finding) -> tuple[int, float]:
    """Return the place of a finding among others.

    Layers of different scale come first where they matter: networks that were trained alike have none, and
    they blur what is measured of all other causes. What could not be measured comes last.
    """
    if math.isnan(finding.removes):
        return 2, 0.0
    return int(finding.cause != "scale"), -finding.removes


def _excess(midpoint: MidpointNumbers) -> _Excess | None:
    """Return the metric in which the midpoint stands out, the error before the loss."""
    ends, permuted = midpoint.ends, midpoint.permuted
    for metric, least, noise in (
        ("error", _HIGH_ERROR, midpoint.error_error),
        ("loss", _HIGH_LOSS, midpoint.loss_error),
    ):
        value = getattr(permuted, metric) - getattr(ends, metric)
        if value > least and not value <= _STANDARD_ERRORS * noise:
            return _Excess(metric, getattr(ends, metric), value, least)
    return None


def _scales(
    layers: Sequence[LayerNumbers], midpoint: MidpointNumbers | None, excess: _Excess | None
) -> Iterator[Finding]:
    flagged = [layer for layer in layers if is_over_scaled(layer.norm_ratio)]
    if not flagged:
        return
    worst = max(flagged, key=lambda layer: abs(math.log(max(layer.norm_ratio, 1e-30))))
    ratio = worst.norm_ratio
    count = f"{len(flagged)} layer{' differs' if len(flagged) == 1 else 's differ'}"
    factor, larger = (ratio, "A") if ratio > 1 else (1 / max(ratio, 1e-30), "B")
    text = f"{count} in scale: the norm of {worst.path} is {factor:.2g} times as large in {larger}"
    removes = math.nan
    if midpoint is not None and excess is not None and midpoint.rescaled is not None:
        removes = excess.share(midpoint.rescaled)
        text += f"; scaled back, the midpoint has {excess.show(midpoint.rescaled)}"
        if removes < _REMOVES:
            return
    advice = (
        "scale the layer and those that read it so that norms agree, where the function allows it; REPAIR"
    )
    yield Finding("scale", tuple(layer.path for layer in flagged), removes, text, advice)


def _groups(groups: Sequence[GroupNumbers], midpoint: MidpointNumbers, excess: _Excess) -> Iterator[Finding]:
    tried = [
        (excess.share(performance), group, performance, method)
        for group in groups
        for performance, method in ((group.replaced, "activation"), (group.rematched, "weight"))
        if performance is not None
    ]
    best = max(tried, key=lambda trial: trial[0], default=None)
    if best is not None and best[0] >= _REMOVES:
        share, group, performance, method = best
        text = (
            f"the permutation of {group.groups[0]}: with the one of {method} matching in its place, all "
            f"others as they are, the midpoint has {excess.show(performance)} (paired units correlate by "
            f"{group.correlation:.2f}, at best by {group.best_correlation:.2f})"
        )
        yield Finding("group", group.groups, share, text, "match this group again, or take that permutation")
        return
    share = excess.share(midpoint.by_activations)
    if share >= _REMOVES:
        moved = [g for g in groups if g.moved > 0]
        text = (
            "the permutations of several groups: with those of activation matching, the midpoint has "
            f"{excess.show(midpoint.by_activations)}"
        )
        names = tuple(name for g in moved for name in g.groups)
        yield Finding("method", names, share, text, "another method: method='activations'")


def _streams(streams: Sequence[StreamNumbers]) -> Iterator[Finding]:
    for stream in streams:
        if stream.conflict < _CONFLICT:
            continue
        worst = max(stream.blocks, key=lambda block: block.gain)
        text = (
            f"blocks that share {stream.group} need different permutations of it: the weights of "
            f"{worst.paths[0]} have a cosine of {worst.own:.2f} under the permutation that is best for them, "
            f"and of {worst.shared:.2f} under the one that is best for all blocks"
        )
        advice = (
            "REPAIR, a wider stream, more training, or networks that share more of the beginning of "
            "training; no single permutation serves all blocks"
        )
        yield Finding("stream", (stream.group,), math.nan, text, advice)


def _variance(
    layers: Sequence[LayerNumbers], midpoint: MidpointNumbers, excess: _Excess
) -> Iterator[Finding]:
    share = excess.share(midpoint.repaired)
    left = [(layer.variance, layer.path) for layer in layers if layer.variance is not None]
    if share < _REMOVES or not left:
        return
    least, path = min(left)
    text = (
        f"the activations of {path} keep {_percent(least)} of their variance at the midpoint; with REPAIR it "
        f"has {excess.show(midpoint.repaired)}"
    )
    advice = "REPAIR (build_repair), or new statistics where there is BatchNorm (build_norm_reset)"
    yield Finding("variance", (path,), share, text, advice)


def _temperature(midpoint: MidpointNumbers, excess: _Excess) -> Iterator[Finding]:
    if excess.metric == "error":  # which no temperature changes
        return
    share = excess.share(Performance(midpoint.tempered_loss, midpoint.permuted.error))
    if share >= _REMOVES:
        text = (
            "the answers are right but the logits are too small or too large: at the temperature "
            f"{midpoint.temperature:.2g} the midpoint has a loss of {midpoint.tempered_loss:.3g} nats"
        )
        yield Finding("temperature", (), share, text, "a fitted temperature (build_temperature), or REPAIR")


def _unlike(
    layers: Sequence[LayerNumbers],
    groups: Sequence[GroupNumbers],
    midpoint: MidpointNumbers,
    excess: _Excess,
) -> Iterator[Finding]:
    """Say what is left where every midpoint that was measured still stands out."""
    remedies = {"REPAIR": midpoint.repaired, "activation matching": midpoint.by_activations}
    remedies |= {"a temperature": Performance(midpoint.tempered_loss, midpoint.permuted.error)}
    if midpoint.rescaled is not None:
        remedies |= {"equal scales": midpoint.rescaled}
    for group in groups:
        for performance in (group.replaced, group.rematched):
            if performance is not None:
                remedies |= {f"another permutation of {group.groups[0]}": performance}
    name, best = min(remedies.items(), key=lambda pair: getattr(pair[1], excess.metric))
    left = getattr(best, excess.metric) - excess.ends
    if left <= excess.least and left <= (1 - _REMOVES) * excess.value:
        return
    overlap = sum(layer.overlap for layer in layers) / max(len(layers), 1)
    pairs = [g for g in groups if not math.isnan(g.correlation)]
    now, at_best = (
        sum(values) / max(len(values), 1)
        for values in ([g.correlation for g in pairs], [g.best_correlation for g in pairs])
    )
    text = (
        f"part of the excess stays whatever is tried: {name} comes closest, with {excess.show(best)}. The "
        f"networks have units without a counterpart: pairs correlate by {now:.2f} on average, at best by "
        f"{at_best:.2f}, and leading singular vectors overlap by {overlap:.2f} of 1"
    )
    advice = "wider networks, more training, or permutations that are learned (method='straight_through')"
    yield Finding("unlike", (), excess.share(best), text, advice)


def _undertrained(midpoint: MidpointNumbers, num_classes: int | None) -> Iterator[Finding]:
    guessing = 1 - 1 / num_classes if num_classes else 1.0
    if midpoint.ends.error > guessing / 2:
        text = (
            f"A and B themselves have an error of {_percent(midpoint.ends.error)}, where guessing has "
            f"{_percent(guessing)}"
        )
        yield Finding("undertrained", (), math.nan, text, "more training")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
