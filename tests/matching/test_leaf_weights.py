"""Factors of leaves in the objective of weight matching."""

import jax
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.errors import ConfigError

KEY = jax.random.key(0)
CHAIN = PermutationSpec.from_axes(
    {"w0": (None, "P"), "b0": ("P",), "w1": ("P", "Q"), "b1": ("Q",), "w2": ("Q", None)}
)


def network(seed, width=9):
    rng = np.random.default_rng(seed)
    shapes = {"w0": (5, width), "b0": (width,), "w1": (width, width), "b1": (width,), "w2": (width, 4)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def test_weights_of_leaves_are_factors_of_the_objective():
    a, b = network(0), network(1)
    weights = {"w1": 3.0, "b0": 0.0}
    match = rebasin.weight_matching(CHAIN, a, b, key=KEY, leaf_weights=weights)
    moved = rebasin.permute(CHAIN, match.permutation, b)
    expected = sum(weights.get(path, 1.0) * np.vdot(a[path], moved[path]) for path in a)
    assert match.objective[-1] == pytest.approx(expected, rel=1e-5)
    # A weight of zero is the role that leaves the leaf out.
    assert rebasin.weight_matching(CHAIN, a, b, key=KEY, leaf_weights={"b0": 0.0}) == rebasin.weight_matching(
        CHAIN, a, b, key=KEY, roles={"b0": "constant"}
    )


def test_the_longest_name_decides():
    spec = PermutationSpec.from_axes({"x/w": (None, "P"), "x/b": ("P",)})
    a = {"x": {"w": np.ones((1, 2), np.float32), "b": np.ones(2, np.float32)}}
    match = rebasin.weight_matching(spec, a, a, key=KEY, leaf_weights={"x": 4.0, "x/b": 0.25, "": 9.0})
    assert match.objective[-1] == pytest.approx(2 * 4.0 + 2 * 0.25)


def test_weights_that_cannot_work_are_refused():
    a = network(0)
    with pytest.raises(ConfigError) as info:
        rebasin.weight_matching(CHAIN, a, a, key=KEY, leaf_weights={"w1": -2.0, "w2": float("nan")})
    assert str(info.value).splitlines() == [
        "leaf_weights cannot work:",
        "  'w1' has weight -2.0, wanted a finite one of at least 0",
        "  'w2' has weight nan, wanted a finite one of at least 0",
    ]
    with pytest.raises(ConfigError) as info:
        rebasin.weight_matching(CHAIN, a, a, key=KEY, leaf_weights={"w9": 1.0, "v": 1.0})
    assert str(info.value).splitlines() == [
        "leaf_weights cannot work:",
        "  'w9' names no leaf that counts",
        "  'v' names no leaf that counts",
    ]
    with pytest.raises(ConfigError, match="restarts must be at least 0, got -1"):
        rebasin.weight_matching(CHAIN, a, a, key=KEY, restarts=-1)
