"""Bounds on the width at which the layers of two networks with independent neurons can be aligned.

After arXiv 2310.19103, sections 4 and 5. Independent neurons of two layers can be paired the more closely,
the more of them there are and the fewer directions they fill.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import special

from rebasin.errors import ConfigError, problem_list

__all__ = ["WidthBound", "stated_width", "width_bound"]


class WidthBound(NamedTuple):
    """Bounds on the width of each hidden layer, as decimal logarithms, since they grow beyond any float.

    Attributes:
      lower: a layer must be at least this wide.
      upper: a layer of this width is wide enough.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]


def stated_width(dimension: int, *, epsilon: float, depth: int = 1) -> float:
    """Return the order of the width that arXiv 2310.19103 is summed up to state, as a decimal logarithm.

    Two-layer networks of width O(√d/ε) with d inputs are linearly connected with probability 1 − ε. Networks
    of k hidden layers need a width that grows as O(d^k). The statements have no constants, so that only
    ratios of this number are comparable; here the constants are 1, and the second statement has no ε.

    Args:
      dimension: number d of inputs of the first layer.
      epsilon: tolerance ε, in (0, 1).
      depth: number k of hidden layers; one of them makes a two-layer network.

    Raises:
      ConfigError: an argument cannot work.

    Examples:
      >>> stated_width(100, epsilon=0.1), stated_width(100, epsilon=0.1, depth=3)
      (2.0, 6.0)
    """
    _check(_common_problems(dimension, epsilon, depth))
    if depth == 1:
        return math.log10(dimension) / 2 - math.log10(epsilon)
    return depth * math.log10(dimension)


def width_bound(
    dimension: int,
    *,
    epsilon: float,
    depth: int = 1,
    low: int | None = None,
    rest: float = 0.0,
    fraction: float | None = None,
    ratio: float = 0.0,
    constant: float = 1.0,
) -> WidthBound:
    """Bound the widths at which the layers of two networks with independent neurons can be aligned.

    Aligned means that in each layer the expected squared distance of paired neurons is at most ε² of a
    neuron's expected squared norm, E W₂² ≤ ε² E‖w‖².

    Assumptions. The neurons of a layer are independent and Gaussian with mean zero, in both networks alike.
    Layer 1 has `dimension` inputs, each later layer as many as the layer before it is wide, at the bound: the
    bounds are recursive. By default the covariance is isotropic. There are two models of neurons that are
    approximately low-dimensional. With `low`, as many directions share 1 − `rest` of the variance equally in
    every layer, and all others share `rest`. With `fraction`, that fraction e of the directions of a layer,
    and at least one, has the variance λ each, and all others have `ratio` · λ.

    Lower bound. No neuron is paired with a closer one than its nearest. The density of `k` directions of
    variance λ is at most (2πλ)^(-k/2), so n < ½ Γ(k/2 + 1) (√λ/ε)^k neurons leave more than ε². The bound is
    the larger one of the dominating directions and of all.

    Upper bound. With E W₂² ≤ `constant` · n^(-2/d) · E‖w‖² in d dimensions, width (`constant`/ε²)^(d/2)
    is enough. If only k dominating directions are matched, and the others hold the share r of the variance,
    these contribute 2r, so that (T/ε)^k is enough with T² = `constant` · (1 − r)/(1 − 2r/ε²); the smaller one
    of both is taken. T grows without bound as 2r nears ε². With `fraction`, r = (1 − e)·`ratio`/(e +
    (1 − e)·`ratio`), which rises to 1 as e falls to 0, so that T blows up at some e above 0: a low dimension
    alone cannot stay fixed while the layers grow. Where the upper bound is less than the lower one, the
    constant is too small.

    These bounds are derived here from convergence rates, as arXiv 2310.19103 argues in section 5; they are
    not that paper's theorems. What they share with the digest of it that this project has is the recursion,
    by which the width needed is an exponential of the width of the layer before, and T, which blows up as e
    falls to 0. The digest's order d^k for k hidden layers is much less; `stated_width` has it.

    Args:
      dimension: number of inputs of the first layer.
      epsilon: tolerance ε, in (0, 1).
      depth: number of hidden layers.
      low: number of directions that hold most of the variance; `None` for isotropic neurons.
      rest: fraction of the variance in all other directions, in [0, 1).
      fraction: fraction e of a layer's inputs that hold most of the variance, in (0, 1]; not with `low`.
      ratio: variance of each other direction relative to these, in [0, 1].
      constant: constant of the rate; that of the general theorem holds for d > 4 and is not known.

    Raises:
      ConfigError: an argument cannot work; all such arguments are listed.

    Examples:
      >>> bound = width_bound(4, epsilon=0.1)  # 1 / (16 ε⁴) and 1 / ε⁴
      >>> [round(10**x) for x in (*bound.lower, *bound.upper)]
      [625, 10000]
    """
    wanted = _common_problems(dimension, epsilon, depth) | {
        f"low: wanted between 1 and dimension ({dimension}), or None": low is None or 1 <= low <= dimension,
        "rest: wanted at least 0 and less than 1, and 0 without low": 0 <= rest < (1 if low else 1e-300),
        "fraction: wanted more than 0 and at most 1, or None, and None with low": fraction is None
        or (0 < fraction <= 1 and low is None),
        "ratio: wanted between 0 and 1, and 0 without fraction": 0 <= ratio <= (1 if fraction else 0),
        "constant: wanted a positive number": 0 < constant < math.inf,
    }
    _check(wanted)
    shape = functools.partial(_shape, low, rest, fraction, ratio)
    lower, upper = [], []
    for bounds, step in (
        (lower, functools.partial(_lower, epsilon)),
        (upper, functools.partial(_upper, epsilon, constant)),
    ):
        inputs = float(dimension)
        for _ in range(depth):
            bounds.append(max(step(shape(inputs)), 0.0))  # a layer has at least one unit
            inputs = 10.0 ** bounds[-1] if bounds[-1] < 300 else math.inf
    return WidthBound(tuple(lower), tuple(upper))


def _common_problems(dimension: int, epsilon: float, depth: int) -> dict[str, bool]:
    """Return for each line about the arguments that all functions here take whether it does not apply."""
    return {
        "dimension: wanted at least 1": dimension >= 1,
        "epsilon: wanted a number between 0 and 1": 0 < epsilon < 1,
        "depth: wanted at least 1": depth >= 1,
    }


def _check(wanted: dict[str, bool]) -> None:
    if problems := [text for text, fits in wanted.items() if not fits]:
        raise ConfigError(problem_list("this bound cannot be computed:", problems))


class _Shape(NamedTuple):
    """The spectrum of a layer's neurons.

    Attributes:
      inputs: number of all directions.
      low: number of the dominating directions, which are all of them for isotropic neurons.
      rest: share of the variance in the others.
    """

    inputs: float
    low: float
    rest: float


def _shape(low: int | None, rest: float, fraction: float | None, ratio: float, inputs: float) -> _Shape:
    """Return the spectrum of the neurons of a layer with so many inputs."""
    if fraction is not None:
        large = max(1.0, fraction * inputs)
        if math.isinf(inputs):
            other = (1 - fraction) * ratio
            return _Shape(inputs, inputs, other / (fraction + other))
        other = (inputs - large) * ratio
        return _Shape(inputs, min(large, inputs), other / (large + other))
    if low is None or low >= inputs:
        return _Shape(inputs, inputs, 0.0)
    return _Shape(inputs, low, rest)


def _lower(epsilon: float, shape: _Shape) -> float:
    """Return the logarithm of the least width of a layer."""

    def bound(blocks: Sequence[tuple[float, float]]) -> float:
        count = sum(size for size, _ in blocks)
        if math.isinf(count):
            return math.inf
        volume = sum(size * math.log(share / size / epsilon**2) / 2 for size, share in blocks)
        return (float(special.gammaln(count / 2 + 1)) + volume - math.log(2)) / math.log(10)

    leading = (shape.low, 1 - shape.rest)
    if not shape.rest or shape.low >= shape.inputs:
        return bound([leading])
    whole = [leading, (shape.inputs - shape.low, shape.rest)]
    return max(bound([leading]), bound(whole) if math.isfinite(shape.inputs) else 0.0)


def _upper(epsilon: float, constant: float, shape: _Shape) -> float:
    """Return the logarithm of a width that is enough for a layer."""
    whole = shape.inputs / 2 * math.log10(constant / epsilon**2) if constant > epsilon**2 else 0.0
    left = epsilon**2 - 2 * shape.rest
    if left <= 0:
        return whole
    return min(whole, shape.low / 2 * math.log10(constant * (1 - shape.rest) / left))
