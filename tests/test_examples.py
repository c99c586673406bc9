"""The scripts under examples/ run, are short, and show what they promise."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def numbers(name):
    """Run an example in a folder of its own; return the percentages that it prints, as fractions, by line."""
    command, environment = [sys.executable, EXAMPLES[name]], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = (line.rpartition(": ")[2] for line in done.stdout.splitlines())
    return [[float(x) / 100 for x in re.findall(r"(-?[\d.]+)%", line)] for line in lines]


def test_examples_are_three_short_scripts():
    assert list(EXAMPLES) == ["average", "federated", "task_vector"]
    assert max(len(path.read_text().splitlines()) for path in EXAMPLES.values()) <= 40


@pytest.mark.slow
def test_an_aligned_average_is_as_good_as_its_networks():
    (a, b), (plain,), (aligned,) = numbers("average")
    assert plain < 0.8 < min(a, b) - 0.05 < aligned


@pytest.mark.slow
def test_most_of_a_task_moves_in_the_right_order():
    _, (_, plain), (_, ordered) = numbers("task_vector")
    assert plain < 0.3 < 0.5 < ordered


@pytest.mark.slow
def test_matching_helps_in_the_first_round():
    rounds = [value for (value,) in numbers("federated")]
    assert len(rounds) == 6
    assert rounds[3] > rounds[0] + 0.1
