"""Mean and spread over replicates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["Interval", "Onset", "mean_onset", "onset", "ratio", "student_interval"]


class Interval(NamedTuple):
    """A mean over independent replicates, with its 95 % interval and their standard deviation.

    Attributes:
      mean: mean over replicates.
      low: lower end of the interval of the mean; NaN for one replicate.
      high: upper end of the interval of the mean; NaN for one replicate.
      deviation: standard deviation of the replicates; NaN for one replicate.
    """

    mean: float
    low: float
    high: float
    deviation: float


def ratio(value: ArrayLike, base: ArrayLike) -> np.ndarray:
    """Return ``value / base`` of numbers that are not negative, elementwise, where the base may be 0.

    Two zeros are equal, so that their ratio is 1; any other number is infinitely larger than 0.

    Examples:
      >>> ratio([1.0, 0.0, 1.0], [2.0, 0.0, 0.0]).tolist()
      [0.5, 1.0, inf]
    """
    value, base = np.asarray(value, float), np.asarray(base, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((value == 0) & (base == 0), 1.0, value / base)


def student_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Return Student's t interval for the mean of independent replicates.

    Args:
      values: one number for each replicate, at least one.
      confidence: coverage of the interval.

    Returns:
      The interval mean ± t·s/√n, with n−1 degrees of freedom. One replicate alone says nothing about spread,
      so its interval and deviation are NaN.

    Examples:
      >>> [round(x, 3) for x in student_interval([1.0, 2.0, 3.0])]
      [2.0, -0.484, 4.484, 1.0]
    """
    array = np.asarray(values, np.float64)
    n, mean = array.size, float(array.mean())
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan)
    with np.errstate(invalid="ignore"):  # the spread around an infinite mean is NaN
        deviation = float(array.std(ddof=1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, deviation)


class Onset(NamedTuple):
    """The epoch at which a series falls below a threshold for good, over replicates.

    An onset is infinite where the series never falls. JSON has no infinity, so that it is NaN once it was
    read back from a file.

    Attributes:
      mean_curve: onset of the mean over replicates.
      median: median of the replicates' onsets.
      low: earliest onset of a replicate. [low, high] covers the median of the population with a probability
        of 1 − 2^(1−n): 94 % for five replicates, 75 % for three.
      high: latest onset of a replicate.
      replicates: onset of each replicate.
    """

    mean_curve: float
    median: float
    low: float
    high: float
    replicates: list[float]


def onset(epochs: Sequence[int], values: Sequence[float], threshold: float) -> float:
    """Return the epoch from which on a series stays at or below a threshold.

    Between the last epoch above the threshold and the next one the series is taken to be linear in
    log(1 + epoch), the scale on which experiments space their epochs.

    Args:
      epochs: ascending epochs.
      values: value of the series at each epoch.
      threshold: the level that the series should not exceed.

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
    """Return the onset of the mean over replicates, with the range of the replicates' own onsets.

    Args:
      epochs: ascending epochs.
      series: one series of values for each replicate.
      threshold: the level that a series should not exceed.
    """
    replicates = [onset(epochs, values, threshold) for values in series]
    mean = np.mean(np.asarray(series, np.float64), axis=0).tolist()
    ordered = sorted(replicates)
    # Of two in the middle the upper one, since infinities have no mean.
    median = ordered[len(ordered) // 2]
    return Onset(onset(epochs, mean, threshold), median, ordered[0], ordered[-1], replicates)
