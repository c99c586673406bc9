import numpy as np
import pytest

import rebasin
from benchmarks.problems import Pair
from benchmarks.symmetry import compare_orders


def draw(seed, widths):
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(widths)}


def test_one_assignment_is_symmetric():
    spec = rebasin.PermutationSpec.from_axes({"w0": (None, "P0"), "w1": ("P0", None)})
    pair = Pair("draws", lambda: (draw(0, [(3, 9), (9, 2)]), draw(1, [(3, 9), (9, 2)])))
    assert compare_orders(spec, pair, 0) == pytest.approx((0, 0, 0, False), abs=1e-6)


def test_the_order_of_units_does_not_matter_in_a_deeper_network():
    spec = rebasin.PermutationSpec.from_axes({"w0": (None, "P0"), "w1": ("P0", "P1"), "w2": ("P1", None)})
    shapes = [(4, 12), (12, 12), (12, 3)]
    some = [
        compare_orders(spec, Pair("draws", lambda i=i: (draw(2 * i, shapes), draw(2 * i + 1, shapes))), i)
        for i in range(6)
    ]
    assert [pair.reordered for pair in some if not pair.identity] == pytest.approx([0] * 6, abs=1e-6)
