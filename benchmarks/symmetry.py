"""How far weight matching depends on which network moves, and on the order of B's units.

python -m benchmarks.symmetry --runs_dir=…

Trained pairs, from the depth-order start. Swapped: the objective of matching A to B against
that of B to A, with one restart and without. Reordered: the objective, without restarts, after B's units were
put into random order, against before; `identity` counts the pairs in which the identity stood in for the
start, whose objective does depend on that order. Differences are relative, in percent.
"""

import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags, logging

from benchmarks.orders import compare_orders
from benchmarks.problems import MODELS, find_trained
from experiments.harness.console import Reporter
from experiments.harness.networks import shared_runs

HEADER = ("networks", "pairs", "swapped, %", "without restart, %", "reordered, %", "identity")
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir",
    None,
    "Folder of trained networks; by default $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs.",
)


def _mean_and_largest(values: Sequence[float]) -> str:
    return f"{100 * np.mean(np.abs(values)):.1g}, {100 * np.max(np.abs(values)):.1g}"


def main(argv: list[str]) -> None:
    """Prints a row for each recipe: mean and largest difference without its sign."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    reporter = Reporter()
    runs_dir = shared_runs(_RUNS_DIR.value)
    problems = find_trained(MODELS, runs_dir, keys=1, num_eval=0, data_dir=None, say=reporter.say)
    rows = []
    for problem in problems:
        some = [compare_orders(problem.spec, pair, seed) for seed, pair in enumerate(problem.pairs)]
        columns = [_mean_and_largest([pair[i] for pair in some]) for i in range(3)]
        identity = str(sum(pair.identity for pair in some))
        rows.append((f"{problem.model}, {problem.weights}", str(len(some)), *columns, identity))
        reporter.say(f"{problem.model}, {problem.weights}: done")
    if not rows:
        sys.exit(f"error: no pair of trained networks in {runs_dir}")
    reporter.say("\nRelative differences of objectives without sign: mean and largest over pairs")
    reporter.table(HEADER, rows)


if __name__ == "__main__":
    app.run(main)
