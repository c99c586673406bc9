import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rebasin
from rebasin import Axis, PermutationSpec
from rebasin.matching.soft import assign_matrices, harden, soft_permute, soften, uniform_soft

# Segments, factors, a group on two axes, indices that move, that stay, and that are indexed themselves.
SPEC = PermutationSpec.from_axes(
    {
        "joined": (Axis.concatenate(Axis.product(2, ("P", 3)), Axis.product(("Q", 4))), None),
        "recurrent": ("P", "P"),
        "query": ("P", "H", "D"),
        "bias": (Axis.product(("H", 3), ("D", 2)),),
        "by_head": (Axis.product(("H", 3), Axis.concatenate(Axis.product(1), Axis.product(("D", 2)))), "Q"),
        "stacked": ("E", "layer", "G", None),
        "gate": ("layer", "G"),
        "step": (None,),
    },
    indexed={"D": ["H"], "G": ["layer"], "E": ["layer", "G"]},
    fixed=["layer"],
)
SHAPES = {
    "joined": (10, 2),
    "recurrent": (3, 3),
    "query": (3, 3, 2),
    "bias": (6,),
    "by_head": (9, 4),
    "stacked": (2, 2, 3, 2),
    "gate": (2, 3),
}


def draw_tree(seed):
    rng = np.random.default_rng(seed)
    tree = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
    return {**tree, "step": jnp.arange(5)}


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_a_permutation_is_a_soft_permutation(seed):
    """Oracle: `permute`, which knows nothing of matrices; and `harden` finds the permutation again."""
    tree = draw_tree(seed)
    permutation = rebasin.random_permutation(SPEC, tree, key=jax.random.key(seed))
    soft = soften(SPEC, permutation, tree)
    softly, hardly = soft_permute(SPEC, soft, tree), rebasin.permute(SPEC, permutation, tree)
    for path in tree:
        np.testing.assert_allclose(softly[path], hardly[path], rtol=1e-6, atol=1e-6, err_msg=path)
        assert softly[path].dtype == tree[path].dtype
    found = harden(SPEC, soft)
    assert tuple(found) == SPEC.groups
    assert rebasin.fixed_points(found, permutation).total == 1.0


def test_shapes_are_pairs_of_outer_positions_that_move():
    uniform = uniform_soft(SPEC, draw_tree(0))
    assert {group: matrices.shape for group, matrices in uniform.items()} == {
        "P": (3, 3),
        "Q": (4, 4),
        "H": (3, 3),
        "D": (3, 3, 2, 2),
        "G": (2, 3, 3),
        "E": (2, 3, 3, 2, 2),
    }
    assert all((matrices.sum(axis=-1) == pytest.approx(1)) for matrices in uniform.values())


def test_the_definition_of_an_indexed_group():
    """new[h, d] = Σ_k outer[h, k] Σ_e inner[h, k, d, e] old[k, e], by loops."""
    spec = PermutationSpec.from_axes({"w": ("H", "D")}, indexed={"D": ["H"]})
    rng = np.random.default_rng(0)
    old, outer, inner = rng.random((3, 2)), rng.random((3, 3)), rng.random((3, 3, 2, 2))
    new = np.zeros((3, 2))
    for h, k, d, e in np.ndindex(3, 3, 2, 2):
        new[h, d] += outer[h, k] * inner[h, k, d, e] * old[k, e]
    tree = {"w": jnp.asarray(old, jnp.float32)}
    soft = {"H": jnp.asarray(outer, jnp.float32), "D": jnp.asarray(inner, jnp.float32)}
    np.testing.assert_allclose(soft_permute(spec, soft, tree)["w"], new, rtol=1e-5)


def test_moving_is_linear_in_each_group():
    tree = draw_tree(0)
    first, second = (
        soften(SPEC, rebasin.random_permutation(SPEC, tree, key=jax.random.key(i)), tree) for i in range(2)
    )
    for group in ("Q", "H", "D", "G", "E"):  # P stands on both axes of `recurrent`
        ends = [first, first | {group: second[group]}]
        middle = first | {group: 0.25 * first[group] + 0.75 * second[group]}
        moved = [soft_permute(SPEC, soft, tree) for soft in (*ends, middle)]
        for path in SHAPES:
            expected = 0.25 * moved[0][path] + 0.75 * moved[1][path]
            np.testing.assert_allclose(moved[2][path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_rounding_follows_the_outer_rows_chosen():
    """Of the matrices for all pairs of heads those count that the heads' own matrix makes."""
    spec = PermutationSpec.from_axes({"w": ("H", "D")}, indexed={"D": ["H"]})
    inner = np.zeros((2, 2, 2, 2))
    inner[0, 1] = [[0.1, 0.9], [0.9, 0.1]]
    inner[1, 0] = [[0.8, 0.2], [0.2, 0.8]]
    rows = harden(spec, {"H": np.array([[0.4, 0.6], [0.6, 0.4]]), "D": inner})
    assert (rows["H"].tolist(), rows["D"].tolist()) == ([1, 0], [[1, 0], [0, 1]])


def test_a_similarity_that_says_nothing_keeps_the_matrix():
    current = np.array([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])
    similarity = np.array([[[3.0, 3.0], [3.0, 3.0]], [[0.0, 1.0], [1.0, 0.0]]])
    chosen = assign_matrices(similarity, current)
    assert chosen.tolist() == [[[0.5, 0.5], [0.5, 0.5]], [[0.0, 1.0], [1.0, 0.0]]]
