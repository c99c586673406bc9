"""Weight matching next to git-re-basin's loop: time, objective and barrier.

  python -m benchmarks.weight_matching --output=results/weight_matching
  python -m benchmarks.weight_matching --models=mlp,vgg16 --max_width=16 --repeats=3 --first_calls=0

The first command, which is `make bench`, takes half an hour on two CPU cores.

The networks are pairs with Gaussian weights, and pairs trained by the experiments: those found in --runs_dir,
and MLPs on digits, which are trained here in seconds. Every method gets the same pair with the same key, and
the methods take turns at going first. A warm time is that of a call after a call that compiled everything. A
first call is timed in a process of its own, in which networks, backend and spec are in place; what remains is
compiling and matching. A ratio is the ratio of the medians.

An iteration of ours assigns only groups whose neighbours changed, and the pass in order of depth is not
counted as one. The iterations of git-re-basin's loop include the last one, which finds nothing better.
Objectives and barriers of all methods are computed by the same code.

--output gets weight_matching.json, with every run, hardware and versions, and the tables as
weight_matching.txt.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

import rebasin
from benchmarks.command import define_data_flags, flag_values, run
from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.problems import MODELS, Problem, find_trained, gaussian_problems, shared_runs, train_digits
from benchmarks.processes import run_fresh
from benchmarks.reports import Reporter, build_reporter, describe_machine
from benchmarks.timing import Timed, rotated, run_in_turn
from benchmarks.weight_matching_report import UNALIGNED, Outcome, Run, report, save
from rebasin.arithmetic import inner_product
from rebasin.errors import ConfigError

__all__ = ["compare", "count_runs"]

WEIGHTS = ("gaussian", "trained")


def count_runs(problem: Problem, *, first_calls: int) -> int:
    """Return how often `compare` calls `advance`."""
    return len(METHODS) * (len(problem.pairs) * problem.keys) + 2 * first_calls


def compare(problem: Problem, *, first_calls: int, advance: Callable[[], None]) -> Outcome:
    """Run every method on every pair and key, and measure barriers where there is a task.

    Times are warm: a call of each method on the first pair comes before and does not count.

    Args:
      problem: the networks.
      first_calls: how many first calls of ours and of the peer are timed, each in a process of its own.
      advance: is called after each run.

    Returns:
      All runs.
    """
    runs: list[Run] = []
    sweep = problem.build_sweep() if problem.build_sweep else None
    turns = itertools.count()
    for i, pair in enumerate(problem.pairs):
        a, b = jax.block_until_ready(jax.device_put(pair.load()))
        judge = _Judge(problem.spec, a, b, sweep)
        runs.append(Run(pair.name, 0, UNALIGNED, **judge(None)))
        if i == 0:
            _time_each(problem.spec, a, b, key=0, turn=0)
        for key in range(i * problem.keys, (i + 1) * problem.keys):
            for name, (seconds, found) in _time_each(problem.spec, a, b, key=key, turn=next(turns)).items():
                counts = {"iterations": found.num_iterations, "assignments": found.num_assignments}
                runs.append(Run(pair.name, key, name, seconds=seconds, **counts, **judge(found.permutation)))
                advance()
    first = _time_first_calls(problem, first_calls, advance)
    return Outcome(problem.model, problem.weights, problem.parameters, runs, first)


def _time_each(spec: rebasin.PermutationSpec, a: Any, b: Any, *, key: int, turn: int) -> dict[str, Timed]:
    """Return the seconds and the result of every method, run one right after the other."""
    calls = {
        name: functools.partial(method, spec, a, b, key=jax.random.key(key))
        for name, method in METHODS.items()
    }
    return run_in_turn(calls, turn)


def _time_first_calls(problem: Problem, count: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of first calls of ours and of the peer, which take turns at going first."""
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    for turn in range(count):
        trees = jax.device_get(problem.pairs[turn % len(problem.pairs)].load())
        for name in rotated(seconds, turn):
            seconds[name].append(run_fresh("benchmarks.methods:first_call", name, problem.spec, *trees, turn))
            advance()
    return seconds


class _Judge:
    """Objective and barriers of permutations of one pair, each permutation measured once."""

    def __init__(
        self, spec: rebasin.PermutationSpec, a: Any, b: Any, sweep: Callable[..., Any] | None
    ) -> None:
        self.spec, self.a, self.b, self.sweep = spec, a, b, sweep
        self.known: dict[bytes, dict[str, Any]] = {}

    def __call__(self, permutation: Any) -> dict[str, Any]:
        """Return the fields of `Run` that a permutation determines; `None` is the identity."""
        if permutation is None:
            permutation = rebasin.identity_permutation(self.spec, self.a)
        name = b"".join(np.asarray(permutation[g], np.int32).tobytes() for g in self.spec.groups)
        if name not in self.known:
            self.known[name] = self._measure(rebasin.permute(self.spec, permutation, self.b))
        return self.known[name]

    def _measure(self, moved: Any) -> dict[str, Any]:
        values = {"objective": inner_product(self.a, moved)}
        if self.sweep is not None:
            curve = self.sweep(self.a, moved)
            values |= {"loss_barrier": curve.loss_barrier.value, "error_barrier": curve.error_barrier.value}
        return values


def define_flags() -> None:
    """Define the flags of this benchmark."""
    for name, known, what in (("models", MODELS, "Architectures."), ("weights", WEIGHTS, "Which weights.")):
        flags.DEFINE_list(name, list(known), what)
        flags.register_validator(name, set(known).issuperset, f"known: {', '.join(known)}")
    flags.DEFINE_integer(
        "max_width",
        64,
        "Widest VGG-16 and ResNet-20 with Gaussian weights; 256 adds ResNet-20 ×16, which takes long.",
    )
    flags.DEFINE_integer("repeats", 5, "Pairs with Gaussian weights.", lower_bound=1)
    flags.DEFINE_integer("keys", 5, "Seeds of the matching for each trained pair.", lower_bound=1)
    flags.DEFINE_integer("first_calls", 3, "First calls of each method that are timed.", lower_bound=0)
    flags.DEFINE_integer(
        "num_eval",
        1000,
        "Test examples for barriers, which take most of the time; 0 leaves barriers out.",
        lower_bound=0,
    )
    define_data_flags()
    flags.DEFINE_string("output", None, "Folder for weight_matching.json and weight_matching.txt.")


def _problems(options: Any, reporter: Reporter) -> Iterator[Problem]:
    if "gaussian" in options.weights:
        yield from gaussian_problems(options.models, pairs=options.repeats, max_width=options.max_width)
    if "trained" in options.weights:
        runs_dir = shared_runs(options.runs_dir)
        if "mlp" in options.models:
            train_digits(runs_dir, range(6), reporter)
        yield from find_trained(
            options.models,
            runs_dir,
            keys=options.keys,
            num_eval=options.num_eval,
            data_dir=options.data_dir,
            say=reporter.say,
        )


def main() -> None:
    """Run the comparison, and store it after every problem."""
    options = flags.FLAGS
    reporter = build_reporter()
    about = {"config": flag_values(without=("runs_dir", "data_dir", "output")), **describe_machine()}
    outcomes: list[Outcome] = []
    for problem in _problems(options, reporter):
        total = count_runs(problem, first_calls=options.first_calls)
        with reporter.stage(f"{problem.model}, {problem.weights}", total) as advance:
            outcomes.append(compare(problem, first_calls=options.first_calls, advance=advance))
        if options.output:
            save(outcomes, pathlib.Path(options.output), about)
    if not outcomes:
        raise ConfigError("nothing to compare")
    report(outcomes, reporter)


if __name__ == "__main__":
    define_flags()
    run(main)
