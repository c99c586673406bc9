"""Failures planted between trained networks, and pairs without one: which cause the diagnosis names."""

import collections

import pytest

from benchmarks.planted_failures import confusion, judge, plant_all

SEEDS = range(6)


@pytest.fixture(scope="module")
def verdicts():
    return [judge(planted) for planted in plant_all(SEEDS)]


@pytest.mark.slow
def test_the_planted_cause_is_named_first(verdicts):
    failures = [v for v in verdicts if v.planted.cause != "none"]
    counts = collections.Counter(v.planted.cause for v in failures)
    assert len(failures) >= 40
    assert min(counts.values()) >= 5
    missed = [(v.planted.name, v.planted.cause, v.planted.where, v.causes) for v in failures if not v.right]
    assert len(missed) <= len(failures) // 10, missed


@pytest.mark.slow
def test_nothing_stands_out_where_nothing_was_planted(verdicts):
    alarms = [(v.planted.name, v.causes) for v in verdicts if v.planted.cause == "none" and v.causes]
    assert alarms == []


def test_the_table_counts_what_was_named():
    assert [row[:2] for row in confusion([])] == [
        (cause, "0") for cause in ("none", "group", "scale", "stream", "variance")
    ]
