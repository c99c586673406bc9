"""Weight matching of this checkout next to that of another one: time and result.

  python -m benchmarks.against_version --checkout=/path/to/the/other/checkout
  python -m benchmarks.against_version --checkout=… --problems=mlp:512,vgg16:8 --rounds=3 --first_calls=1

The problems are those of `make bench` with Gaussian weights up to width 64, and a small causal transformer,
one pair of networks each. A first call is timed in a process of its own, in which networks, backend and spec
are in place; what remains is compiling and matching. For warm times both versions run in processes that stay
open. In every round both match the same pair with the same key, one right after the other, and they take
turns at going first.

The table has medians in seconds, and ratios new/old, where old is the other checkout. A ratio of warm times
is the median over rounds of the ratio within a round; a ratio of first calls is the ratio of the medians.
The last columns tell how much higher the objectives of the new version are (mean over rounds, in percent),
and in how many rounds both versions found the same permutation.

The defaults take less than ten minutes on two CPU cores. Nothing else should run meanwhile.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import rebasin
from benchmarks.architectures import build_architecture, draw_network
from benchmarks.command import run
from benchmarks.processes import Worker
from benchmarks.tables import markdown_table
from benchmarks.timing import median_ratio, rotated
from rebasin.errors import ConfigError

__all__ = ["PROBLEMS", "Comparison", "Matching", "compare", "match_once"]

PROBLEMS = (
    "mlp:512",
    "vgg16:8",
    "vgg16:16",
    "vgg16:64",
    "resnet20:16",
    "resnet20:64",
    "gpt:256",
)

OLD, NEW = "old", "new"


class Matching(NamedTuple):
    """One matching.

    Attributes:
      seconds: time of the call.
      objective: final objective, as the library reports it.
      digest: hash of the permutation.
    """

    seconds: float
    objective: float
    digest: str


@functools.cache
def _load(problem: str) -> tuple[Any, Any, Any]:
    """Return the spec and both networks, on the device."""
    spec, shapes = build_architecture(problem).trace()
    return spec, *jax.block_until_ready(jax.device_put((draw_network(shapes, 0), draw_network(shapes, 1))))


def match_once(problem: str, seed: int) -> tuple[float, float, str]:
    """Match the networks of a problem with the library of this process, and return the fields of `Matching`.

    Everything before the call itself is in place when its time begins. Only what all versions of the library
    have in common is used.
    """
    spec, a, b = _load(problem)
    key = jax.block_until_ready(jax.random.key(seed))
    began = time.perf_counter()
    match = rebasin.weight_matching(spec, a, b, key=key)
    permutation = jax.block_until_ready(dict(match.permutation))
    seconds = time.perf_counter() - began
    digest = hashlib.sha256()
    for group in sorted(permutation):
        digest.update(group.encode())
        digest.update(np.asarray(permutation[group], np.int64).tobytes())
    return seconds, float(match.objective[-1]), digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both versions on one problem.

    Attributes:
      problem: name of the problem.
      first_calls: by version, the first call of each process.
      warm: by version, the warm call of each round.
    """

    problem: str
    first_calls: dict[str, list[Matching]]
    warm: dict[str, list[Matching]]

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        first = {name: [call.seconds for call in calls] for name, calls in self.first_calls.items()}
        warm = {name: [call.seconds for call in calls] for name, calls in self.warm.items()}
        medians = [float(np.median(times[name])) for times in (first, warm) for name in (OLD, NEW)]
        ratios = [medians[1] / medians[0], median_ratio(warm[NEW], warm[OLD])]
        pairs = list(zip(self.warm[OLD], self.warm[NEW], strict=True))
        gain = np.mean([(new.objective - old.objective) / abs(old.objective) for old, new in pairs])
        same = sum(old.digest == new.digest for old, new in pairs)
        return (
            self.problem,
            *(f"{seconds:.3g}" for seconds in medians[:2]),
            f"{ratios[0]:.2f}",
            *(f"{seconds:.3g}" for seconds in medians[2:]),
            f"{ratios[1]:.2f}",
            f"{100 * gain:+.4f}",
            f"{same}/{len(pairs)}",
        )


HEADER = (
    "problem",
    "first, old",
    "first, new",
    "ratio",
    "warm, old",
    "warm, new",
    "ratio",
    "objective, %",
    "same permutation",
)


def compare(
    problem: str, checkouts: Mapping[str, pathlib.Path | None], *, first_calls: int, rounds: int
) -> Comparison:
    """Time both versions on one problem.

    Args:
      problem: name of the networks, as `build_architecture` takes it.
      checkouts: by version, its folder; `None` is this checkout.
      first_calls: number of processes in which a first call of each version is timed, at least one.
      rounds: number of warm calls of each version.

    Returns:
      All calls.
    """
    first: dict[str, list[Matching]] = {name: [] for name in checkouts}
    warm: dict[str, list[Matching]] = {name: [] for name in checkouts}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for turn in range(first_calls):
            for name in rotated(checkouts, turn):
                worker = Worker(checkouts[name])
                stack.callback(worker.close)
                first[name].append(_match(worker, problem, 0))
                if turn == first_calls - 1:
                    workers[name] = worker  # it has compiled everything, and stays for the warm calls
                else:
                    worker.close()
        for turn in range(rounds):
            for name in rotated(checkouts, turn):
                warm[name].append(_match(workers[name], problem, turn))
    return Comparison(problem, first, warm)


def _match(worker: Worker, problem: str, seed: int) -> Matching:
    return Matching(*worker.call("benchmarks.against_version:match_once", problem, seed))


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_string("checkout", None, "Folder of the other checkout of this repository.", required=True)
    flags.DEFINE_list("problems", list(PROBLEMS), "Networks of mlp, vgg16, resnet20, gpt as model:width.")
    flags.DEFINE_integer("rounds", 7, "Warm calls of each version.", lower_bound=1)
    flags.DEFINE_integer("first_calls", 3, "First calls of each version.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for all calls.")


def main() -> None:
    """Compare both versions on all problems and print a table."""
    options = flags.FLAGS
    checkouts = {OLD: pathlib.Path(options.checkout), NEW: None}
    if not options.problems:
        raise ConfigError("--problems: wanted at least one")
    for problem in options.problems:
        build_architecture(problem)  # so that a wrong name is an error before anything is timed
    comparisons = []
    for problem in options.problems:
        began = time.perf_counter()
        comparisons.append(
            compare(problem, checkouts, first_calls=options.first_calls, rounds=options.rounds)
        )
        print(f"{problem}: done in {time.perf_counter() - began:.0f} s", flush=True)
        if options.output:
            content = [dataclasses.asdict(comparison) for comparison in comparisons]
            pathlib.Path(options.output).write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{markdown_table(HEADER, [comparison.row() for comparison in comparisons])}")


if __name__ == "__main__":
    define_flags()
    run(main)
