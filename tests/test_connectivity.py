"""Definitions of connectivity as matrices of barriers: what they imply, and what they do not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rebasin
from rebasin import PermutationSpec
from rebasin.connectivity import (
    Transitivity,
    align_pairs,
    align_to_all,
    entezari_barriers,
    simultaneous_barriers,
    strong_barriers,
    strong_transitivity,
    transitivity,
    weak_barriers,
)
from rebasin.errors import ConfigError, PermutationError
from rebasin.matching.many import cycle_error, match_to_reference, universe_matching

SPEC = PermutationSpec.from_axes({"w0": (None, "P0"), "w1": ("P0", "P1"), "w2": ("P1", None)})
SHAPES = {"w0": (3, 6), "w1": (6, 5), "w2": (5, 2)}
INPUTS = jax.random.normal(jax.random.key(0), (20, 3))
KEY = jax.random.key(0)


def apply(params, x):
    return jnp.tanh(jnp.tanh(x @ params["w0"]) @ params["w1"]) @ params["w2"]


def draw(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def shuffled(seed):
    return rebasin.random_permutation(SPEC, TREES[0], key=jax.random.key(100 + seed))


TREES = [draw(i) for i in range(4)]
DATA = rebasin.Batch(INPUTS, apply(TREES[0], INPUTS))
SWEEP = rebasin.build_sweep(
    lambda params, batch: {"loss": jnp.square(apply(params, batch.inputs) - batch.labels).mean(1)},
    num_alphas=5,
)
# Barriers are differences of losses of size 1 in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def path(params_a, params_b):
    return SWEEP(params_a, params_b, DATA)


@given(st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_strong_implies_weak(seed):
    """Q = Q_A⁻¹ Q_B has the barrier that Q_A and Q_B have together."""
    permutations = [shuffled(seed + i) for i in range(4)]
    strong = strong_barriers(SPEC, TREES, permutations, path)["loss"]
    pairwise = {
        (i, j): rebasin.compose(SPEC, permutations[j], rebasin.invert(SPEC, permutations[i]))
        for i, j in itertools.combinations(range(4), 2)
    }
    weak = weak_barriers(SPEC, TREES, pairwise, path)["loss"]
    np.testing.assert_allclose(strong, weak, **CLOSE)
    assert strong.max() > 0.01
    assert cycle_error(SPEC, pairwise) == 0


@given(st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_barriers_do_not_change_under_one_permutation_of_all_networks(seed):
    common = shuffled(seed)
    permutations = [shuffled(seed + i) for i in range(4)]
    moved = [rebasin.compose(SPEC, permutation, common) for permutation in permutations]
    before, after = (strong_barriers(SPEC, TREES, p, path)["loss"] for p in (permutations, moved))
    np.testing.assert_allclose(before, after, **CLOSE)
    # Nor does the Entezari property, where all networks are renamed alike.
    renamed = [rebasin.permute(SPEC, common, tree) for tree in TREES]
    undo = rebasin.invert(SPEC, common)
    conjugated = [rebasin.compose(SPEC, rebasin.compose(SPEC, undo, p), common) for p in permutations]
    before, after = (
        entezari_barriers(SPEC, trees, p, path)["loss"]
        for trees, p in ((TREES, permutations), (renamed, conjugated))
    )
    np.testing.assert_allclose(before, after, **CLOSE)


@pytest.mark.parametrize(
    "align",
    [
        lambda trees: match_to_reference(SPEC, trees, key=KEY, reference=1),
        lambda trees: universe_matching(SPEC, trees),
    ],
    ids=["reference", "universe"],
)
def test_planted_networks_are_strongly_connected(align):
    """Four copies of one network have no barrier, and pairs that agree with each other."""
    trees = [rebasin.permute(SPEC, shuffled(i), TREES[0]) for i in range(4)]
    found = align(trees)
    np.testing.assert_allclose(strong_barriers(SPEC, trees, found.permutations, path)["loss"], 0, atol=1e-6)
    pairwise = align_pairs(SPEC, trees, key=KEY)
    assert cycle_error(SPEC, pairwise) == 0
    np.testing.assert_allclose(weak_barriers(SPEC, trees, pairwise, path)["loss"], 0, atol=1e-6)
    unaligned = strong_barriers(SPEC, trees, [rebasin.identity_permutation(SPEC, trees[0])] * 4, path)
    assert unaligned["loss"].max() > 0.01


def test_matrices_have_the_barriers_of_single_paths():
    permutations = [shuffled(i) for i in range(4)]
    matrix = entezari_barriers(SPEC, TREES, permutations, path)["loss"]
    for i, j in itertools.product(range(4), repeat=2):
        curve = path(rebasin.permute(SPEC, permutations[i], TREES[i]), TREES[j])
        assert matrix[i, j] == pytest.approx(curve.loss_barrier.value, rel=1e-6)
    pairwise = align_pairs(SPEC, TREES[:3], key=KEY)
    sequences = [[tree, jax.tree.map(lambda x: 2 * x, tree)] for tree in TREES[:3]]
    found = simultaneous_barriers(SPEC, sequences, pairwise, path)["loss"]
    assert found.shape == (2, 3, 3)
    for t in range(2):
        trees = [sequence[t] for sequence in sequences]
        np.testing.assert_array_equal(found[t], weak_barriers(SPEC, trees, pairwise, path)["loss"])
    assert (found == found.transpose(0, 2, 1)).all()
    assert (found[0] != found[1]).any()


def test_networks_are_aligned_with_the_mean_of_the_others():
    found = align_to_all(SPEC, TREES, key=KEY)
    mean = jax.tree.map(lambda *x: sum(x) / 3, *TREES[1:])
    expected = rebasin.weight_matching(SPEC, mean, TREES[0], key=KEY).permutation
    assert rebasin.fixed_points(found[0], expected).total == 1


def test_what_is_counted_of_triplets():
    """A ~ B ~ C ~ D in a row: two chains, neither closed."""
    row = np.array([[0, 1, 9, 9], [1, 0, 1, 9], [9, 1, 0, 1], [9, 9, 1, 0]])
    assert transitivity(row, 1) == Transitivity(chains=2, broken=2, triplets=12)
    assert transitivity(row, 9) == Transitivity(chains=12, broken=0, triplets=12)
    assert transitivity(row, 0) == Transitivity(chains=0, broken=0, triplets=12)
    assert strong_transitivity(row, np.zeros((4, 4)), 1) == {2: (3, 3), 3: (0, 0), 4: (0, 0)}
    assert strong_transitivity(np.zeros((4, 4)), row, 1) == {2: (6, 3), 3: (4, 0), 4: (1, 0)}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="connectivity needs at least 2 networks, got 1"):
        align_pairs(SPEC, TREES[:1], key=KEY)
    with pytest.raises(PermutationError, match=r"each pair of 3 networks, missing \[\(1, 2\)\]"):
        weak_barriers(SPEC, TREES[:3], {(0, 1): shuffled(0), (0, 2): shuffled(0)}, path)
    with pytest.raises(PermutationError, match="one permutation for each of 4 networks, got 1"):
        strong_barriers(SPEC, TREES, [shuffled(0)], path)
    with pytest.raises(ConfigError, match=r"one common length of at least 1, got \[1, 2\]"):
        simultaneous_barriers(SPEC, [TREES[:1], TREES[:2]], {}, path)
