import itertools

import jax
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.errors import ConfigError
from rebasin.matching.kernels import kernel_pieces

KEY = jax.random.key(0)
CHAIN = PermutationSpec.from_axes(
    {"w0": (None, "P"), "b0": ("P",), "w1": ("P", "Q"), "b1": ("Q",), "w2": ("Q", None)}
)
HEADS = PermutationSpec.from_axes(
    {"e": (None, "R"), "q": ("R", "H", "D"), "o": ("D", "H", "R"), "u": ("R", None)}, indexed={"D": ["H"]}
)


def network(seed, width=9):
    rng = np.random.default_rng(seed)
    shapes = {"w0": (5, width), "b0": (width,), "w1": (width, width), "b1": (width,), "w2": (width, 4)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def heads(seed):
    rng = np.random.default_rng(seed)
    shapes = {"e": (6, 8), "q": (8, 2, 3), "o": (3, 2, 8), "u": (8, 5)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def paired(a, b):
    return {path: (a[path], b[path]) for path in a}


def test_a_cosine_of_one_group_is_the_assignment_of_cosines():
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    rng = np.random.default_rng(0)
    a, b = (
        {"w": rng.normal(size=(3, 5)).astype(np.float32), "v": rng.normal(size=(5, 2)).astype(np.float32)}
        for _ in "ab"
    )
    units = [np.concatenate([tree["w"].T, tree["v"]], axis=1) for tree in (a, b)]
    unit_a, unit_b = (u / np.linalg.norm(u, axis=1, keepdims=True) for u in units)
    cosines = unit_a @ unit_b.T
    best = max(sum(cosines[i, p] for i, p in enumerate(row)) for row in itertools.permutations(range(5)))
    match = rebasin.weight_matching(spec, a, b, key=KEY, kernel="cosine")
    assert match.objective[-1] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(("spec", "tree"), [(CHAIN, network(0)), (HEADS, heads(0))])
def test_every_unit_of_a_rescaled_network_has_norm_one(spec, tree):
    squares = {}
    for piece in kernel_pieces(spec, paired(tree, tree), "cosine"):
        for dim, group in enumerate(piece.labels):
            if group not in (None, "H"):  # the insides of a head have norm one, not the head
                dims = (*piece.index[dim], dim)
                total = np.square(piece.a).sum(axis=tuple(d for d in range(piece.a.ndim) if d not in dims))
                total = np.transpose(total, np.argsort(np.argsort(dims)))
                squares[group] = squares.get(group, 0) + total
    for total in squares.values():
        np.testing.assert_allclose(total, 1, atol=1e-4)


def test_the_cosine_does_not_see_the_scale_of_a_unit():
    """All weights of each unit times a number of its own: the inner product is misled, the cosine is not."""
    rng = np.random.default_rng(0)
    for seed in range(5):
        a = network(seed)
        planted = rebasin.random_permutation(CHAIN, a, key=jax.random.key(seed))
        factors = np.exp(rng.normal(size=9)).astype(np.float32)
        scaled = a | {"w1": a["w1"] * factors, "b1": a["b1"] * factors, "w2": a["w2"] * factors[:, None]}
        b = rebasin.permute(CHAIN, planted, scaled)
        match = rebasin.weight_matching(CHAIN, a, b, key=KEY, kernel="cosine")
        assert rebasin.fixed_points(match.permutation, rebasin.invert(CHAIN, planted)).total == 1.0
        assert match.objective[-1] == pytest.approx(  # A against itself
            rebasin.weight_matching(CHAIN, a, a, key=KEY, kernel="cosine").objective[-1], rel=1e-4
        )


def test_dead_units_keep_their_zeros():
    a = network(0)
    for path, where in (("w0", np.s_[:, 2]), ("b0", np.s_[2]), ("w1", np.s_[2])):
        a[path][where] = 0
    match = rebasin.weight_matching(CHAIN, a, a, key=KEY, kernel="cosine")
    assert np.isfinite(match.objective).all()
    assert rebasin.fixed_points(match.permutation).total == 1.0


def test_weights_of_leaves_are_factors_of_the_objective():
    a, b = network(0), network(1)
    weights = {"w1": 3.0, "b0": 0.0}
    match = rebasin.weight_matching(CHAIN, a, b, key=KEY, leaf_weights=weights)
    moved = rebasin.permute(CHAIN, match.permutation, b)
    expected = sum(weights.get(path, 1.0) * np.vdot(a[path], moved[path]) for path in a)
    assert match.objective[-1] == pytest.approx(expected, rel=1e-5)
    # A weight of zero is the predicate that leaves the leaf out.
    assert rebasin.weight_matching(CHAIN, a, b, key=KEY, leaf_weights={"b0": 0.0}) == rebasin.weight_matching(
        CHAIN, a, b, key=KEY, predicate=lambda path, leaf: path != "b0"
    )


def test_the_longest_name_decides():
    spec = PermutationSpec.from_axes({"x/w": (None, "P"), "x/b": ("P",)})
    a = {"x": {"w": np.ones((1, 2), np.float32), "b": np.ones(2, np.float32)}}
    match = rebasin.weight_matching(spec, a, a, key=KEY, leaf_weights={"x": 4.0, "x/b": 0.25, "": 9.0})
    assert match.objective[-1] == pytest.approx(2 * 4.0 + 2 * 0.25)


def test_options_that_cannot_work_are_refused_all_at_once():
    a = network(0)
    with pytest.raises(ConfigError) as info:
        rebasin.weight_matching(CHAIN, a, a, key=KEY, kernel="rbf", leaf_weights={"w9": 1.0, "w1": -2.0})
    assert str(info.value).splitlines() == [
        "this matching cannot work:",
        "  kernel: unknown 'rbf'; known: 'inner', 'cosine'",
        "  leaf_weights: 'w9' names no leaf that counts",
        "  leaf_weights: 'w1' has weight -2.0, wanted a finite one of at least 0",
    ]
    with pytest.raises(ConfigError, match="restarts must be at least 0, got -1"):
        rebasin.weight_matching(CHAIN, a, a, key=KEY, restarts=-1)
