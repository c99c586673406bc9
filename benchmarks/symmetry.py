"""How much weight matching depends on which network moves, and on the order of B's units.

  python -m benchmarks.symmetry --runs_dir=…

Trained pairs are matched in both directions and with B's units in random order; the experiments have to have
trained them. The table has relative differences of objectives in percent, their mean and maximum over pairs:

  swapped          matching A to B and matching B to A, with one restart
  without restart  the same without
  reordered        B's units in random order and as they are, without restarts
  identity         number of pairs in which an ascent started from the identity instead of the pass in order
                   of depth; such an ascent does depend on the order of units

It takes six matchings for every pair, which is a few seconds for each recipe on two CPU cores.
"""

from typing import NamedTuple

import jax
from absl import flags

import rebasin
from benchmarks.command import define_data_flags, run
from benchmarks.problems import MODELS, Pair, find_trained, shared_runs
from benchmarks.reports import build_reporter
from benchmarks.tables import mean_and_largest
from rebasin.errors import ConfigError

__all__ = ["Differences", "compare_orders"]

HEADER = ("networks", "pairs", "swapped, %", "without restart, %", "reordered, %", "identity")


class Differences(NamedTuple):
    """Relative differences of objectives on one pair.

    Attributes:
      swapped: difference of matching B to A and matching A to B, with one restart.
      swapped_once: the same without restarts.
      reordered: difference of matching B with its units in random order and as it is, without restarts.
      identity: whether an ascent started from the identity.
    """

    swapped: float
    swapped_once: float
    reordered: float
    identity: bool


def compare_orders(spec: rebasin.PermutationSpec, pair: Pair, seed: int) -> Differences:
    """Match a pair in both directions, and with B's units in random order."""
    a, b = jax.device_get(pair.load())
    key = jax.random.key(seed)
    moved = rebasin.permute(spec, rebasin.random_permutation(spec, b, key=key), b)
    found = {
        (name, restarts): rebasin.weight_matching(spec, *networks, key=key, restarts=restarts)
        for name, networks in {"as it is": (a, b), "swapped": (b, a), "reordered": (a, moved)}.items()
        for restarts in (0, 1)
    }

    def difference(name: str, restarts: int) -> float:
        new, old = (found[which, restarts].objective[-1] for which in (name, "as it is"))
        return float((new - old) / abs(old))

    return Differences(
        difference("swapped", 1),
        difference("swapped", 0),
        difference("reordered", 0),
        any(match.stats["start"] == "identity" for match in found.values()),
    )


def main() -> None:
    """Print a row for each recipe of trained networks."""
    reporter = build_reporter()
    runs_dir = shared_runs(flags.FLAGS.runs_dir)
    problems = find_trained(
        MODELS, runs_dir, keys=1, num_eval=0, data_dir=flags.FLAGS.data_dir, say=reporter.say
    )
    rows = []
    for problem in problems:
        some = [compare_orders(problem.spec, pair, seed) for seed, pair in enumerate(problem.pairs)]
        columns = [mean_and_largest([pair[i] for pair in some], 100) for i in range(3)]
        identity = str(sum(pair.identity for pair in some))
        rows.append((f"{problem.model}, {problem.weights}", str(len(some)), *columns, identity))
        reporter.say(f"{problem.model}, {problem.weights}: done")
    if not rows:
        raise ConfigError(f"no pair of trained networks in {runs_dir}")
    reporter.say("\nRelative differences of objectives: mean and maximum of their absolute values over pairs")
    reporter.table(HEADER, rows)


if __name__ == "__main__":
    define_data_flags()
    run(main)
