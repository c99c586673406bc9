"""Bounds on widths: by hand, against samples, and how they grow."""

import math

import numpy as np
import pytest

from rebasin.bounds import stated_width, width_bound
from rebasin.errors import ConfigError
from rebasin.transport import transport_neurons


def test_width_bounds_by_hand():
    # d = 2: ½ Γ(2) (1/√2 / ε)² = 1 / (4 ε²) = 25, and (1/ε²)^1 = 100. The next layer has 25 or 100 inputs:
    # ½ Γ(13.5) (1/√25 / 0.1)^25, with Γ(13.5) = 1.7106e9 and 2^25 = 3.3554e7, and 100^50.
    bound = width_bound(2, epsilon=0.1, depth=2)
    assert bound.lower == pytest.approx((math.log10(25), math.log10(0.5 * 1.710572e9 * 2**25)), rel=1e-6)
    assert bound.upper == pytest.approx((2, 100))
    # Two of six directions hold all but 0.002: 1/ε² is replaced by 0.998 / (0.01 - 0.004), to the power 1.
    low = width_bound(6, epsilon=0.1, low=2, rest=0.002)
    assert low.upper == pytest.approx((math.log10(0.998 / 0.006),))
    # ½ Γ(2) (0.998 / 2 / 0.01); the other four directions of 0.0005 shrink the bound of all six, Γ(4) = 6:
    # ½ · 6 · 49.9 · (0.0005 / 0.01)².
    assert low.lower == pytest.approx((math.log10(0.5 * 49.9),))
    # With a variance of 0.004 each they do not: ½ · 6 · (0.984 / 2 / 0.0004) · (0.004 / 0.0004)².
    wide = width_bound(6, epsilon=0.02, low=2, rest=0.016)
    assert wide.lower == pytest.approx((math.log10(3 * 1230 * 100),))
    # There the rest is more than the tolerance, so all six directions must be matched: (1 / 0.0004)³.
    assert wide.upper == pytest.approx((3 * math.log10(2500),))


def test_width_bounds_grow_with_depth_unless_the_dimension_is_low():
    bound = width_bound(8, epsilon=0.3, depth=4)
    assert bound.upper[0] < bound.upper[1] < bound.upper[2]
    assert bound.upper[3] == math.inf
    low = width_bound(8, epsilon=0.3, depth=4, low=3, rest=0.01)
    assert len(set(low.upper)) == 1
    # As the rest nears half of the squared tolerance, the bound grows until that of all directions is less.
    series = [
        width_bound(50, epsilon=0.3, low=3, rest=rest).upper[0] for rest in (0, 0.02, 0.04, 0.0449, 0.045)
    ]
    assert series == sorted(set(series))
    assert series[-1] == pytest.approx(25 * math.log10(1 / 0.09))


def test_no_sample_beats_the_lower_bound():
    """Two samples of fewer neurons than the bound are on average further apart than the tolerance."""
    rng, epsilon = np.random.default_rng(5), 0.25
    for dimension in (2, 4):
        n = math.floor(10 ** width_bound(dimension, epsilon=epsilon).lower[0])
        samples = rng.normal(size=(40, 2, n, dimension)) / math.sqrt(dimension)
        assert np.mean([transport_neurons(*pair).cost for pair in samples]) > epsilon**2


def test_a_fraction_of_the_directions_by_hand():
    # Half of 8 directions dominate and the others have no variance: (1/ε²)^2 and ½ Γ(3) (1/4 / 0.01)². The
    # next layer has 625 or 10,000 inputs: half of them are 312.5, or 5,000, which gives 100^2500.
    bound = width_bound(8, epsilon=0.1, depth=2, fraction=0.5)
    assert bound.upper == pytest.approx((4, 5000))
    first = math.log10(0.5 * 2 * 625)
    second = (math.lgamma(157.25) + 156.25 * math.log(1 / 312.5 / 0.01) - math.log(2)) / math.log(10)
    assert bound.lower == pytest.approx((first, second), rel=1e-6)
    # Two of 8, the others with 1/100 of the variance: these hold 0.06/2.06 of it, more than half of
    # ε² = 0.04, so that all 8 directions must be matched. With 1/1000 they hold 0.006/2.006.
    assert width_bound(8, epsilon=0.2, fraction=0.25, ratio=0.01).upper == pytest.approx(
        (4 * math.log10(25),)
    )
    rest = 0.006 / 2.006
    low = width_bound(8, epsilon=0.2, fraction=0.25, ratio=0.001)
    assert low.upper == pytest.approx((math.log10((1 - rest) / (0.04 - 2 * rest)),))


def test_a_low_dimension_blows_up_as_its_fraction_vanishes():
    """T² in (T/ε)^k grows without bound as the fraction falls, while the ratio of variances stays."""
    d, epsilon, constants = 1000, 0.3, []
    for fraction in (1.0, 0.3, 0.1, 0.03, 0.023):
        upper = width_bound(d, epsilon=epsilon, fraction=fraction, ratio=1e-3).upper[0]
        constants.append(epsilon**2 * 10 ** (2 * upper / (fraction * d)))
    assert constants == sorted(constants)
    assert constants[0] == pytest.approx(1)
    assert constants[-1] > 10
    # Below 2r = ε² nothing but all directions is enough.
    gone = width_bound(d, epsilon=epsilon, fraction=0.02, ratio=1e-3).upper[0]
    assert gone == pytest.approx(d / 2 * math.log10(1 / epsilon**2))


def test_the_recursion_grows_far_beyond_the_order_that_is_stated():
    d, epsilon = 6, 0.3
    bound = width_bound(d, epsilon=epsilon, depth=3)
    stated = [stated_width(d, epsilon=epsilon, depth=k) for k in (1, 2, 3)]
    assert stated == pytest.approx([math.log10(math.sqrt(6) / 0.3), math.log10(36), math.log10(216)])
    assert all(low <= high for low, high in zip(bound.lower, bound.upper, strict=True))
    assert bound.lower[1] > stated[1]
    assert bound.lower[2] > 10 * stated[2]
    # Each upper bound is an exponential of the one before: log n₂ = n₁ log(1/ε).
    assert bound.upper[1] == pytest.approx(10 ** bound.upper[0] * math.log10(1 / epsilon))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: width_bound(0, epsilon=1.0, depth=0, low=3, rest=1.0, constant=0.0),
            "this bound cannot be computed:\n  dimension: wanted at least 1\n"
            "  epsilon: wanted a number between 0 and 1\n  depth: wanted at least 1\n"
            "  low: wanted between 1 and dimension (0), or None\n"
            "  rest: wanted at least 0 and less than 1, and 0 without low\n"
            "  constant: wanted a positive number",
        ),
        (
            lambda: width_bound(4, epsilon=0.5, low=2, fraction=0.5),
            "this bound cannot be computed:\n"
            "  fraction: wanted more than 0 and at most 1, or None, and None with low",
        ),
        (
            lambda: width_bound(4, epsilon=0.5, ratio=0.5),
            "this bound cannot be computed:\n  ratio: wanted between 0 and 1, and 0 without fraction",
        ),
        (
            lambda: stated_width(4, epsilon=0.0),
            "this bound cannot be computed:\n  epsilon: wanted a number between 0 and 1",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ConfigError) as info:
        call()
    assert str(info.value) == message
