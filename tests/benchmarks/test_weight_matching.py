"""What the benchmark says about its runs, and that a small one goes through whole."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.architectures import Architecture, draw_network
from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.problems import Pair, Problem, find_trained, gaussian_problems
from benchmarks.reports import WIDTH
from benchmarks.tables import mean_and_deviation
from benchmarks.weight_matching import compare, count_runs
from benchmarks.weight_matching_report import UNALIGNED, Outcome, Run, save, tally
from rebasin.barrier import Barrier
from rebasin.models import MLP

ROOT = pathlib.Path(__file__).parents[2]


def outcome(ours, peer, **fields):
    """One run of ours and of the peer for each pair of objectives."""
    runs = []
    for key, objectives in enumerate(zip(ours, peer, strict=True)):
        for method, objective in zip((OURS, PEER), objectives, strict=True):
            runs.append(Run("seeds 0, 1", key, method, objective, **fields))
    return Outcome("model", "weights", 7, runs, {OURS: [], PEER: []})


def test_tally_counts_and_lists_every_loss():
    score = tally(outcome([2.0, 1.0, 3.0, 5.0, 4.0 + 1e-9], [1.0, 2.0, 4.0, 4.0, 4.0]), OURS)
    assert (score.higher, score.equal) == (2, 1)
    assert [(ours.key, ours.objective, peer.objective) for ours, peer in score.lower] == [
        (1, 1.0, 2.0),
        (2, 3.0, 4.0),
    ]
    # A negative objective is compared by its size too.
    assert tally(outcome([-2.0], [-1.0]), OURS).lower


def test_means_are_over_pairs_and_medians_over_all_runs():
    runs = [
        Run(pair, key, OURS, objective, seconds=objective)
        for pair, values in (("first", [1.0, 3.0]), ("second", [4.0, 4.0, 4.0]))
        for key, objective in enumerate(values)
    ]
    result = Outcome("model", "weights", 7, runs, {})
    means = result.by_pair(OURS, "objective")
    assert means == [2.0, 4.0]
    assert mean_and_deviation(means, 10, 2) == "30.00±14.14"
    assert result.by_pair(OURS, "loss_barrier") == []
    assert (mean_and_deviation([], 10, 2), mean_and_deviation([0.5], 10, 0)) == ("", "5")
    assert result.median(OURS, "seconds") == 4.0


def small_problem():
    spec, shapes = Architecture(MLP((9, 8), 2), (1, 1, 1, 5)).trace()
    pairs = tuple(
        Pair(f"pair {i}", lambda i=i: (draw_network(shapes, 2 * i), draw_network(shapes, 2 * i + 1)))
        for i in range(2)
    )
    return Problem("small MLP", "Gaussian", spec, 0, pairs, 2, lambda: lambda a, b: Curve(a, b))


class Curve:
    """Stands for a sweep: its barrier is a number that tells which trees it got."""

    def __init__(self, a, b):
        value = float(sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))
        self.loss_barrier = Barrier(value, 0.0, 0.5)
        self.error_barrier = Barrier(value / 100, 0.0, 0.5)


@pytest.fixture(scope="module")
def small_outcome():
    problem, steps = small_problem(), []
    result = compare(problem, first_calls=1, advance=lambda: steps.append(1))
    assert len(steps) == count_runs(problem, first_calls=1)
    return result


def test_every_method_runs_on_every_pair_and_key(small_outcome):
    runs = small_outcome.runs
    expected = [(f"pair {i}", 2 * i + j, name) for i in range(2) for j in range(2) for name in METHODS]
    assert sorted((r.pair, r.key, r.method) for r in runs if r.method != UNALIGNED) == sorted(expected)
    assert [r.pair for r in runs if r.method == UNALIGNED] == ["pair 0", "pair 1"]
    assert all(r.seconds > 0 and r.assignments >= 2 for r in runs if r.method != UNALIGNED)
    assert [len(seconds) for seconds in small_outcome.first_calls.values()] == [1, 1]
    # Objective and barrier are of the same permuted network.
    for r in runs:
        assert r.loss_barrier == pytest.approx(r.objective, rel=1e-5)
    unaligned = {r.pair: r.objective for r in runs if r.method == UNALIGNED}
    assert all(r.objective > unaligned[r.pair] for r in runs if r.method != UNALIGNED)


def wide_outcome():
    """As wide as it gets: fifteen losses over two pairs, long names, large numbers."""
    runs = [
        Run(pair, key, method, -123456.0 - (method == OURS), 123.4, 100, 1500, 12.3456, 0.8912)
        for pair in ("seeds 10, 11", "seeds 12, 13")
        for key in range(15)
        for method in METHODS
    ]
    runs += [Run("seeds 10, 11", 0, UNALIGNED, -1234567.8), Run("seeds 12, 13", 0, UNALIGNED, -1234560.8)]
    return Outcome("ResNet-20 w256", "cifar10 e150", 7, runs, {OURS: [123.4], PEER: [1234.5]})


def test_tables_fit_and_json_holds_every_run(small_outcome, tmp_path):
    hardware = {"processor": "abacus", "cores": 2, "load_average": (0.25, 0.0, 0.0)}
    save([small_outcome, wide_outcome()], tmp_path, {"hardware": hardware})
    lines = (tmp_path / "weight_matching.txt").read_text().splitlines()
    assert lines[0] == "abacus, 2 cores, load average 0.2 before"
    assert max(map(len, lines)) <= WIDTH
    assert not any("…" in line for line in lines)
    loss = "  ResNet-20 w256, cifar10 e150, seeds 12, 13, key 4: -123457 against -123456 (-0.0008 %)"
    assert loss in lines
    content = json.loads((tmp_path / "weight_matching.json").read_text())
    assert len(content["outcomes"][0]["runs"]) == len(small_outcome.runs)


def test_networks_that_are_not_there_are_named_with_their_command(tmp_path):
    said = []
    found = find_trained(["vgg16"], tmp_path, keys=1, num_eval=10, data_dir=None, say=said.append)
    assert list(found) == []
    assert said == [
        f"left out, no pair of vgg16 on cifar10 in {tmp_path}; to train three:\n"
        "  python -m experiments.training_trajectories --preset=cpu --model=vgg16 "
        f"--runs_dir={tmp_path} --output_dir=results/cifar10_vgg16"
    ]


def test_gaussian_problems_are_the_widths_asked_for():
    problems = list(gaussian_problems(["mlp", "vgg16"], pairs=2, max_width=8))
    assert [problem.model for problem in problems] == ["MLP 3×512", "VGG-16 w8"]
    (first, _), (second, _) = (pair.load() for pair in problems[1].pairs)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    assert not any(np.array_equal(x, y) for x, y in leaves)
    assert problems[1].parameters == sum(x.size for x in jax.tree.leaves(first))


def run_binary(*arguments):
    command = [sys.executable, "-m", "benchmarks.weight_matching", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_unknown_models_are_refused():
    done = run_binary("--models=perceptron")
    assert done.returncode != 0
    assert "--models=['perceptron']: known: mlp, vgg16, resnet20" in done.stderr


def test_binary_with_nothing_to_compare(tmp_path):
    done = run_binary("--models=resnet20", "--weights=trained", f"--runs_dir={tmp_path}")
    assert (done.returncode, done.stderr) == (1, "error: nothing to compare\n")
    assert "--preset=cpu --model=resnet20" in done.stdout
