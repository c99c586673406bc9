"""Onsets and summaries."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.harness.record import summarise
from experiments.harness.statistics import mean_onset, onset, student_interval


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_from_its_onset_on_a_series_stays_below_and_before_it_does_not(values, threshold):
    epochs = [2**i - 1 for i in range(len(values))]
    found = onset(epochs, values, threshold)
    later = [value for epoch, value in zip(epochs, values, strict=True) if epoch > found]
    assert all(value <= threshold for value in later)
    if math.isinf(found):
        assert values[-1] > threshold
    elif found > epochs[0]:
        # The last recorded epoch that is not after the onset is above, unless the onset is on it.
        last = max(i for i, epoch in enumerate(epochs) if epoch <= found + 1e-9)
        assert values[last] > threshold or epochs[last] == pytest.approx(found)


def test_onset_interpolates_in_log_epochs():
    # From 1 to 3 is from log 2 to log 4; a quarter of the way is log 2^1.25.
    assert onset([1, 3], [0.06, 0.02], 0.05) == pytest.approx(2**1.25 - 1)
    assert onset([0, 5], [0.01, 0.0], 0.02) == 0.0
    assert onset([2, 5], [0.5, 0.5], 0.02) == math.inf
    # A dip does not count.
    assert onset([0, 1, 3], [0.0, 0.04, 0.0], 0.02) == pytest.approx(2**1.5 - 1)


def test_mean_onset_has_the_range_of_the_replicates():
    found = mean_onset([0, 1, 3], [[0.1, 0.0, 0.0], [0.1, 0.04, 0.0], [0.1, 0.1, 0.1]], 0.02)
    assert found.replicates == [pytest.approx(2**0.8 - 1), pytest.approx(2**1.5 - 1), math.inf]
    assert (found.low, found.median, found.high) == (*found.replicates[:2], math.inf)
    assert found.mean_curve == math.inf


def test_summaries_keep_the_structure():
    records = [{"a": x, "b": [x, 2 * x], "c": {"d": [[x, 1.0], [0.0, x]]}} for x in (1.0, 2.0, 6.0)]
    summary = summarise(records)
    assert summary["a"] == student_interval([1.0, 2.0, 6.0])
    assert [interval.mean for interval in summary["b"]] == [3.0, 6.0]
    assert [[interval.mean for interval in row] for row in summary["c"]["d"]] == [[3.0, 1.0], [0.0, 3.0]]
    deviations = [interval.deviation for interval in summary["b"]]
    np.testing.assert_allclose(deviations, np.std([[1, 2, 6], [2, 4, 12]], axis=1, ddof=1))


def test_student_interval_against_the_table():
    """t with 4 degrees of freedom is 2.776 at 97.5 %."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    interval = student_interval(values)
    half = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(interval, [3.0, 3.0 - half, 3.0 + half, np.std(values, ddof=1)], rtol=1e-3)
    assert np.isnan(student_interval([2.0])[1:]).all()
