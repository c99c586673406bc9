"""The comparison of two runs that differ in their matching algorithm alone, on the committed digits."""

import dataclasses
import io
import pathlib

import numpy as np
import pytest
from rich.console import Console

from experiments.compare_algorithms import check_comparable, first_good_epochs, report
from experiments.harness.console import Reporter
from experiments.training_trajectories import EXPERIMENT
from rebasin.errors import ConfigError

RESULTS = pathlib.Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def runs():
    return [EXPERIMENT.load(RESULTS / name / "results.json") for name in ("digits_mlp_paper", "digits_mlp")]


def test_first_good_epoch_is_the_one_behind_the_last_bad_one():
    at_end = np.array([[0.9, 0.1, 0.1], [0.9, 0.1, 0.12], [0.1, 0.1, 0.1], [0.0, 0.9, 0.5]])
    assert first_good_epochs(at_end, [0, 3, 7], 0.01).tolist() == [3, 3, 0, 7]
    assert first_good_epochs(at_end, [0, 3, 7], 0.5).tolist() == [3, 3, 0, 0]


def test_the_table_has_both_algorithms_and_their_paired_difference(runs):
    output = io.StringIO()
    report(runs, Reporter(Console(file=output, width=80, highlight=False)), 0.02)
    third = runs[0].config.epochs.index(3)
    at_end = np.array(
        [[pair.epochs[third].methods["weights"].at_end.test_error for pair in run.records] for run in runs]
    )
    row = next(line for line in output.getvalue().splitlines() if line.startswith(" 3 "))
    means = 100 * at_end.mean(axis=1)
    assert [cell.split("±")[0] for cell in row.split()[1:3]] == [f"{mean:.1f}" for mean in means]
    assert row.split()[3] == f"{means[0] - means[1]:.1f}"
    assert max(map(len, output.getvalue().splitlines())) <= 80


def test_other_networks_and_equal_algorithms_are_refused(runs):
    with pytest.raises(ConfigError, match="algorithm: wanted two different ones, got 'best' twice"):
        check_comparable([runs[1], runs[1]])
    other = dataclasses.replace(runs[1], config=dataclasses.replace(runs[1].config, seed=7), summary=None)
    with pytest.raises(ConfigError, match=r"run 2 is unfinished\n.*seed: wanted the same in both, got 100 "):
        check_comparable([runs[0], other])


def test_runs_are_compared_by_the_methods_that_both_have(runs):
    def with_methods(run, *methods):
        return dataclasses.replace(run, config=dataclasses.replace(run.config, methods=methods))

    output, chosen = io.StringIO(), [runs[0], with_methods(runs[1], "activations")]
    check_comparable(chosen)
    report(chosen, Reporter(Console(file=output, width=80, highlight=False)), 0.02)
    assert "matching of activations" in output.getvalue()
    assert "matching of weights" not in output.getvalue()
    with pytest.raises(ConfigError, match="methods: wanted one that is in both, got "):
        check_comparable([with_methods(runs[0], "weights"), chosen[1]])
