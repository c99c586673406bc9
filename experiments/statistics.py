"""Mean and spread over replicates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Interval", "student_interval"]


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
