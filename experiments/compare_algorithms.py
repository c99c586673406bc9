"""Does a better matching algorithm find good permutations earlier in training?

Compares two finished runs of training_trajectories that differ in --algorithm alone, which is the second open
question of arXiv 2404.06498: whether a better algorithm could find an early permutation that aligns the
networks at the end. Nothing is trained or measured anew.

  python -m experiments.compare_algorithms results/digits_mlp_paper/results.json
    results/digits_mlp/results.json

For each method of both runs and each epoch t it prints the test error barriers that P_t leaves at the
last epoch under both algorithms, and their difference over the same pairs of networks. P_t counts as good
if its barrier at the end exceeds that of P_end of the same run by at most --tolerance; the first epoch
from which every P_t is good is given for each algorithm, with the difference over pairs.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from experiments.harness.console import Reporter, cell
from experiments.harness.results import Results
from experiments.harness.statistics import Interval, student_interval
from experiments.training_trajectories import EXPERIMENT
from rebasin.errors import ConfigError, RebasinError, problem_list

__all__ = ["check_comparable", "first_good_epochs", "main", "report"]

_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.02, "How far, as a fraction, a good P_t may exceed P_end at the end.", lower_bound=0.0
)


def check_comparable(runs: Sequence[Results]) -> None:
    """Check that two finished runs are of the same networks and epochs, by different algorithms.

    Raises:
      ConfigError: they are not; every difference is named.
    """
    problems = [f"run {i} is unfinished" for i, run in enumerate(runs, 1) if not run.finished]
    first, second = (run.config for run in runs)
    if first.algorithm == second.algorithm:
        problems.append(f"algorithm: wanted two different ones, got {first.algorithm!r} twice")
    for name in ("recipe", "seed", "replicates", "epochs", "num_eval", "num_alphas"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            problems.append(f"{name}: wanted the same in both, got {one} and {other}")
    if not set(first.methods) & set(second.methods):
        problems.append(f"methods: wanted one that is in both, got {first.methods} and {second.methods}")
    if problems:
        raise ConfigError(problem_list("these runs cannot be compared:", problems))


def first_good_epochs(at_end: np.ndarray, epochs: Sequence[int], tolerance: float) -> np.ndarray:
    """Return for each pair the first epoch from which every permutation is good at the end of training.

    Args:
      at_end: barriers at the last epoch under the permutation of each epoch, ``[pairs, epochs]``.
      epochs: the epochs of the permutations, in ascending order.
      tolerance: how far the barrier of a good permutation may exceed that of the last one.

    Returns:
      Epochs ``[pairs]``. The last permutation is always good.

    Examples:
      >>> first_good_epochs(np.array([[0.5, 0.0, 0.3, 0.1, 0.1]]), [0, 1, 2, 5, 9], 0.05).tolist()
      [5]
    """
    bad = at_end > at_end[:, -1:] + tolerance
    # The position behind the last bad one; `argmax` of the reversed row finds it from the end.
    behind = np.where(bad.any(axis=1), bad.shape[1] - bad[:, ::-1].argmax(axis=1), 0)
    return np.asarray(epochs)[behind]


def report(runs: Sequence[Results], reporter: Reporter, tolerance: float) -> None:
    """Print a table for each method, and the first epoch of good permutations under each algorithm.

    Args:
      runs: two runs that `check_comparable` accepts.
      reporter: prints.
      tolerance: see `first_good_epochs`.
    """
    config = runs[0].config
    names = [run.config.algorithm for run in runs]
    for method in (name for name in config.methods if name in runs[1].config.methods):
        one, other = (_at_end(run, method) for run in runs)
        reporter.say(f"\nmatching of {method}: test error barrier at the last epoch under P_t, in %")
        rows = [
            [str(t), *(cell(student_interval(run[:, i]), percent=True) for run in (one, other)), difference]
            for i, t in enumerate(config.epochs)
            for difference in [_interval(student_interval(one[:, i] - other[:, i]), 100.0)]
        ]
        reporter.table(["t", *names, f"{names[0]} - {names[1]}, 95 % interval"], rows)
        good = [first_good_epochs(run, config.epochs, tolerance) for run in (one, other)]
        means = ", ".join(f"{name} {epochs.mean():.1f}" for name, epochs in zip(names, good, strict=True))
        between = _interval(student_interval(np.subtract(*good)), 1.0)
        reporter.wrap(
            f"first epoch from which P_t is within {tolerance:.1%} of P_end, mean over pairs: {means}; "
            f"difference {between}"
        )


def _at_end(run: Results, method: str) -> np.ndarray:
    """Return the test error barriers at the last epoch under P_t, ``[pairs, epochs]``."""
    return np.array(
        [[epoch.methods[method].at_end.test_error for epoch in record.epochs] for record in run.records]
    )


def _interval(value: Interval, scale: float) -> str:
    mean, low, high = (scale * number for number in (value.mean, value.low, value.high))
    return f"{mean:.1f}" if np.isnan(low) else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def main(arguments: list[str]) -> None:
    """Compare two runs."""
    if len(arguments) != 3:
        raise app.UsageError(f"wanted the results.json of two runs, got {len(arguments) - 1} files")
    try:
        runs = [EXPERIMENT.load(pathlib.Path(name)) for name in arguments[1:]]
        check_comparable(runs)
        report(runs, Reporter(), _TOLERANCE.value)
    except RebasinError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
