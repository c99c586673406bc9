"""Mean and spread over replicates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Interval", "Onset", "interval_at", "mean_onset", "onset", "student_interval", "summarise"]


class Interval(NamedTuple):
    """A mean over independent replicates, with its confidence interval and their standard deviation."""

    mean: float
    low: float
    high: float
    deviation: float


def student_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent replicates.

    Args:
      values: one number for each replicate, at least one.
      confidence: coverage of the interval.

    Returns:
      mean ± t·s/√n, with n−1 degrees of freedom; one replicate alone says nothing about spread, so its
      interval and deviation are NaN.

    Examples:
      >>> [round(x, 3) for x in student_interval([1.0, 2.0, 3.0])]
      [2.0, -0.484, 4.484, 1.0]
    """
    array = np.asarray(values, np.float64)
    n, mean = array.size, float(array.mean())
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan)
    deviation = float(array.std(ddof=1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, deviation)


def summarise(records: Sequence[Any]) -> Any:
    """Mean, 95 % interval and standard deviation of every number in records of one structure.

    Args:
      records: one nested mapping or list of numbers for each replicate, all alike.

    Returns:
      The same structure, in which each number, or list of numbers, is a dict of the fields of `Interval`.

    Examples:
      >>> summarise([{"loss": [1.0, 5.0]}, {"loss": [3.0, 5.0]}])["loss"]["mean"]
      [2.0, 5.0]
    """
    first = records[0]
    if isinstance(first, Mapping):
        return {key: summarise([record[key] for record in records]) for key in first}
    if isinstance(first, list | tuple) and any(isinstance(item, list | tuple | Mapping) for item in first):
        return [summarise(items) for items in zip(*records, strict=True)]
    if isinstance(first, list | tuple):
        intervals = [student_interval(column) for column in zip(*records, strict=True)]
        return {name: [getattr(interval, name) for interval in intervals] for name in Interval._fields}
    return student_interval(records)._asdict()


def interval_at(series: Mapping[str, Sequence[float]], i: int) -> dict[str, float]:
    """One interval of a list of numbers that `summarise` summed up."""
    return {name: values[i] for name, values in series.items()}


class Onset(NamedTuple):
    """When a series falls below a threshold for good, over replicates.

    Attributes:
      mean_curve: the onset of the mean over replicates; infinite where it never falls.
      median: the median of the replicates' onsets.
      low: the earliest of them. [low, high] covers the median of the population with a probability of
        1 − 2^(1−n): 94 % for five replicates, 75 % for three.
      high: the latest of them, infinite if some replicate never falls.
      replicates: the onset of each.
    """

    mean_curve: float
    median: float
    low: float
    high: float
    replicates: list[float]


def onset(epochs: Sequence[int], values: Sequence[float], threshold: float) -> float:
    """The epoch from which on a series stays at or below a threshold.

    Between the last epoch above and the next one, which is below, the series is taken to be linear in
    log(1 + epoch), on which experiments space their epochs.

    Args:
      epochs: ascending epochs.
      values: the series, one number for each.
      threshold: the level.

    Returns:
      The first epoch if no value is above the threshold, infinity if the last one is.

    Examples:
      >>> round(onset([0, 1, 3], [0.5, 0.3, 0.1], 0.2), 3), onset([0, 1, 3], [0.5, 0.1, 0.3], 0.2)
      (1.828, inf)
    """
    above = [i for i, value in enumerate(values) if value > threshold]
    if not above:
        return float(epochs[0])
    i = above[-1]
    if i + 1 == len(values):
        return math.inf
    share = (values[i] - threshold) / (values[i] - values[i + 1])
    low, high = math.log1p(epochs[i]), math.log1p(epochs[i + 1])
    return math.expm1(low + share * (high - low))


def mean_onset(epochs: Sequence[int], series: Sequence[Sequence[float]], threshold: float) -> Onset:
    """The onset of the mean over replicates, with the spread of the replicates' own.

    Args:
      epochs: ascending epochs.
      series: one for each replicate.
      threshold: the level.
    """
    replicates = [onset(epochs, values, threshold) for values in series]
    mean = np.mean(np.asarray(series, np.float64), axis=0).tolist()
    ordered = sorted(replicates)
    # The upper of the two in the middle: infinities have no mean.
    median = ordered[len(ordered) // 2]
    return Onset(onset(epochs, mean, threshold), median, ordered[0], ordered[-1], replicates)
