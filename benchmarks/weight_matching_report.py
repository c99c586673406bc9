"""What is measured of a weight matching, and the tables that `benchmarks.weight_matching` makes of it."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.reports import Reporter, save_report
from benchmarks.tables import mean_and_deviation

__all__ = ["UNALIGNED", "Outcome", "Run", "Tally", "report", "save", "tally"]

# How the identity is called where a method is named.
UNALIGNED = "none"

# Objectives are float64 sums of products of float32 weights. Two that differ by less, relatively, are equal.
_TIE = 1e-7


@dataclasses.dataclass(frozen=True)
class Run:
    """One matching of one pair.

    Attributes:
      pair: which networks.
      key: seed of the matching.
      method: a name in `METHODS`, or `UNALIGNED` for the identity.
      objective: ⟨A, P[B]⟩ over all weights, in float64.
      seconds: time of the matching, warm.
      iterations: number of passes over the groups.
      assignments: number of linear assignments.
      loss_barrier: barrier of the loss on test data, in nats; `None` if it was not measured.
      error_barrier: barrier of the error on test data, a fraction; `None` if it was not measured.
    """

    pair: str
    key: int
    method: str
    objective: float
    seconds: float = 0.0
    iterations: int = 0
    assignments: int = 0
    loss_barrier: float | None = None
    error_barrier: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All runs on one problem.

    Attributes:
      model: architecture and width.
      weights: where the weights come from.
      parameters: number of weights of one network.
      runs: every matching.
      first_calls: by method, the seconds of each first call, in the order of the pairs.
    """

    model: str
    weights: str
    parameters: int
    runs: list[Run]
    first_calls: dict[str, list[float]]

    def median(self, method: str, field: str) -> float:
        """Return the median of a field of `Run` over all runs of a method."""
        return float(np.median([getattr(run, field) for run in self.runs if run.method == method]))

    def by_pair(self, method: str, field: str) -> list[float]:
        """Return the mean over keys of a field, one number for each pair of networks.

        The list is empty if the field was not measured.
        """
        runs = [run for run in self.runs if run.method == method and getattr(run, field) is not None]
        return [
            float(np.mean([getattr(run, field) for run in runs if run.pair == pair]))
            for pair in dict.fromkeys(run.pair for run in runs)
        ]


class Tally(NamedTuple):
    """How often a method reaches a higher objective than the peer, on the same pair with the same key.

    Attributes:
      higher: number of runs in which its objective is higher.
      equal: number of runs in which both are equal up to rounding.
      lower: every case in which it is lower, as ``(its run, the peer's run)``.
    """

    higher: int
    equal: int
    lower: list[tuple[Run, Run]]


def tally(outcome: Outcome, method: str) -> Tally:
    """Compare a method's objectives with those of the peer."""
    peers = {(run.pair, run.key): run for run in outcome.runs if run.method == PEER}
    higher, equal, lower = 0, 0, []
    for run in (run for run in outcome.runs if run.method == method):
        peer = peers[run.pair, run.key]
        if abs(run.objective - peer.objective) <= _TIE * abs(peer.objective):
            equal += 1
        elif run.objective > peer.objective:
            higher += 1
        else:
            lower.append((run, peer))
    return Tally(higher, equal, lower)


def report(outcomes: Sequence[Outcome], reporter: Reporter) -> None:
    """Print the tables, and every case in which ours ends lower than the peer."""
    reporter.say(
        f"\nMedians over pairs and keys: seconds, and {OURS}/{PEER} for the ratio, iterations and\n"
        "assignments"
    )
    reporter.table(
        (
            "\nmodel",
            "\nweights",
            f"warm\n{OURS}",
            f"\n{PEER}",
            "\nratio",
            f"first\n{OURS}",
            f"\n{PEER}",
            "\nratio",
            "iter-\nations",
            "assign-\nments",
        ),
        [_time_row(outcome) for outcome in outcomes],
    )
    reporter.say(
        f"\nObjective ⟨A, P[B]⟩; its mean against {PEER}'s; on how many pairs and keys it is higher, equal\n"
        "and lower; loss and error barriers on test data, mean±standard deviation over pairs"
    )
    reporter.table(
        ("networks", "method", "objective", "against %", "+/=/-", "loss barrier", "error %"),
        [row for outcome in outcomes for row in _quality_rows(outcome)],
    )
    reporter.say(f"\nEvery case in which {OURS} ends lower than {PEER}:")
    losses = [line for outcome in outcomes for line in _losses(outcome)]
    for line in losses or ["none"]:
        reporter.say(f"  {line}")


def _time_row(outcome: Outcome) -> tuple[str, ...]:
    ours, peer = (outcome.median(method, "seconds") for method in (OURS, PEER))
    counts = [
        "/".join(f"{outcome.median(method, field):.0f}" for method in (OURS, PEER))
        for field in ("iterations", "assignments")
    ]
    first = ["", "", ""]
    if outcome.first_calls[OURS]:
        medians = [np.median(outcome.first_calls[method]) for method in (OURS, PEER)]
        first = [*(f"{seconds:.2f}" for seconds in medians), f"{medians[0] / medians[1]:.2f}"]
    warm = [f"{ours:.3g}", f"{peer:.3g}", f"{ours / peer:.2f}"]
    return outcome.model, outcome.weights, *warm, *first, *counts


def _quality_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    reference = np.mean(outcome.by_pair(PEER, "objective"))
    for i, method in enumerate((UNALIGNED, *METHODS)):
        objective = np.mean(outcome.by_pair(method, "objective"))
        against = counts = ""
        if method not in (UNALIGNED, PEER):
            against = f"{100 * (objective - reference) / abs(reference):+.3f}"
            score = tally(outcome, method)
            counts = f"{score.higher}/{score.equal}/{len(score.lower)}"
        networks = (outcome.model, outcome.weights)[i] if i < 2 else ""  # below each other, to save a column
        barriers = [
            mean_and_deviation(outcome.by_pair(method, "loss_barrier"), 1.0, 4),
            mean_and_deviation(outcome.by_pair(method, "error_barrier"), 100.0, 1),
        ]
        yield networks, method, f"{objective:.6g}", against, counts, *barriers


def _losses(outcome: Outcome) -> Iterator[str]:
    for ours, peer in tally(outcome, OURS).lower:
        relative = 100 * (ours.objective - peer.objective) / abs(peer.objective)
        yield (
            f"{outcome.model}, {outcome.weights}, {ours.pair}, key {ours.key}: {ours.objective:.7g} against "
            f"{peer.objective:.7g} ({relative:+.4f} %)"
        )


def save(
    outcomes: Sequence[Outcome],
    directory: pathlib.Path,
    about: dict[str, Any],
    *,
    name: str = "weight_matching",
) -> None:
    """Write a JSON file with every run, and the tables as text.

    Args:
      outcomes: the runs.
      directory: folder of both files.
      about: what else the JSON file holds; ``"hardware"`` as `benchmarks.reports.describe_machine` returns.
      name: name of both files without the suffix.
    """

    def print_all(reporter: Reporter) -> None:
        hardware = about["hardware"]
        load = hardware["load_average"][0]
        reporter.say(f"{hardware['processor']}, {hardware['cores']} cores, load average {load:.1f} before")
        report(outcomes, reporter)

    content = {**about, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
    save_report(directory, name, content, print_all)
