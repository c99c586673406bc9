"""The tables of the comparison, for a terminal and a file."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.comparison import UNALIGNED, Outcome, tally
from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.timing import mean_and_deviation
from experiments.harness.console import Reporter

__all__ = ["WIDTH", "report", "save"]

# Columns that the tables need.
WIDTH = 100


def report(outcomes: Sequence[Outcome], reporter: Reporter) -> None:
    """Prints the tables, and every case in which ours ends lower than the peer."""
    reporter.say(
        f"\nMedians over pairs and keys: seconds, and {OURS}/{PEER} for the ratio, sweeps and solves"
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
            "sweeps",
            "solves",
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
        for field in ("sweeps", "solves")
    ]
    first = ["", "", ""]
    if outcome.first[OURS]:
        medians = [np.median(outcome.first[method]) for method in (OURS, PEER)]
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


def save(outcomes: Sequence[Outcome], directory: pathlib.Path, about: dict[str, Any]) -> None:
    """Writes ``weight_matching.json`` and ``weight_matching.txt``."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {**about, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
    (directory / "weight_matching.json").write_text(json.dumps(content, indent=1) + "\n")
    with (directory / "weight_matching.txt").open("w") as file:
        console = Reporter(Console(file=file, width=WIDTH))
        hardware = about["hardware"]
        load = hardware["load_average"][0]  # above the benchmark's own, something else was running
        console.say(f"{hardware['processor']}, {hardware['cores']} cores, load average {load:.1f} before")
        report(outcomes, console)
