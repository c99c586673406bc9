"""How often matching undoes a random permutation of Gaussian weights exactly: ours, and git-re-basin's loop.

python -m benchmarks.planted_recovery

Recovered is exact: every leaf of the permuted network is that of the other bit for bit. Times are warm.
"""

import contextlib
import itertools
import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.methods import METHODS
from benchmarks.planting import PLANTED, Architecture, is_recovered, plant
from experiments.harness.console import Reporter
from rebasin.errors import SpecError

__all__ = ["Outcome", "recover"]

SEEDS = 20
HEADER = ("model", "method", "recovered", "sweeps", "solves", "ms")


class Outcome(NamedTuple):
    """One attempt.

    Attributes:
      recovered: whether the network came out bit for bit.
      sweeps: passes over all groups.
      solves: linear assignments.
      milliseconds: of the matching.
    """

    recovered: bool
    sweeps: int
    solves: int
    milliseconds: float


def recover(architecture: Architecture, method: str, seed: int) -> Outcome:
    """Plants a permutation and lets a method look for it."""
    spec, a, b = plant(architecture, seed)
    began = time.perf_counter()
    permutation, sweeps, solves = METHODS[method](spec, a, b, key=jax.random.key(seed))
    milliseconds = 1000 * (time.perf_counter() - began)
    return Outcome(is_recovered(spec, a, b, permutation), sweeps, solves, milliseconds)


def _row(name: str, method: str, outcomes: list[Outcome]) -> tuple[str, ...]:
    """Text of one row; `outcomes` is empty where the method cannot take the spec."""
    if not outcomes:
        return name, method, "no table", "", "", ""
    recovered = sum(outcome.recovered for outcome in outcomes)
    medians = np.median([outcome[1:] for outcome in outcomes], axis=0)
    return name, method, f"{recovered}/{len(outcomes)}", *(f"{value:.0f}" for value in medians)


def main() -> None:
    """Prints a row for each model and method; medians over the seeds."""
    reporter = Reporter()
    rows = []
    with reporter.stage("models × methods × seeds", len(PLANTED) * len(METHODS) * SEEDS) as advance:
        for (name, architecture), method in itertools.product(PLANTED.items(), METHODS):
            outcomes = []
            for seed in range(SEEDS):
                with contextlib.suppress(SpecError):  # an indexed group, which git-re-basin's table has not
                    if seed == 0:
                        recover(architecture, method, seed)  # compiles
                    outcomes.append(recover(architecture, method, seed))
                advance()
            rows.append(_row(name, method, outcomes))
    reporter.say("")
    reporter.table(HEADER, rows)


if __name__ == "__main__":
    main()
