import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import rebasin
from rebasin import Axis, PermutationSpec
from rebasin.errors import TreeMismatchError, VerificationError
from rebasin.matching.partial import partial_weight_matching, rest_in_order, widen
from rebasin.permutation import check_permutation

KEY = jax.random.key(0)
SPEC = PermutationSpec.from_axes({"w0": (None, "P"), "b0": ("P",), "w1": ("P", "Q"), "w2": ("Q", None)})


def network(seed, p, q):
    rng = np.random.default_rng(seed)
    shapes = {"w0": (6, p), "b0": (p,), "w1": (p, q), "w2": (q, 5)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def apply(tree, x):
    return jnp.tanh(jnp.tanh(x @ tree["w0"] + tree["b0"][None]) @ tree["w1"]) @ tree["w2"]


def test_one_group_is_the_rectangular_assignment_of_scipy():
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    for seed in range(10):
        rng = np.random.default_rng(seed)
        a, b = (
            {"w": rng.normal(size=(4, n)).astype(np.float32), "v": rng.normal(size=(n, 3)).astype(np.float32)}
            for n in (5, 9)
        )
        match = partial_weight_matching(spec, a, b, key=KEY)
        similarity = a["w"].T @ b["w"] + a["v"] @ b["v"].T
        rows, columns = linear_sum_assignment(similarity, maximize=True)
        assert match.objective[-1] == pytest.approx(similarity[rows, columns].sum(), rel=1e-5)
        assert match.permutation["P"][:5].tolist() == columns.tolist()
        assert match.permutation["P"][5:].tolist() == sorted(set(range(9)) - set(columns.tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_a_network_is_found_inside_a_wider_one(seed):
    """B is A with further small units, shuffled: A's units come first again, in order."""
    a = network(seed, 12, 10)
    b = {path: 0.05 * leaf for path, leaf in network(seed + 50, 20, 17).items()}
    for path, leaf in a.items():
        b[path][tuple(map(slice, leaf.shape))] = leaf
    b = rebasin.permute(SPEC, rebasin.random_permutation(SPEC, b, key=jax.random.key(seed)), b)
    match = partial_weight_matching(SPEC, a, b, key=KEY)
    aligned = rebasin.permute(SPEC, match.permutation, b)
    for path, leaf in a.items():
        np.testing.assert_array_equal(aligned[path][tuple(map(slice, leaf.shape))], leaf)
    check_permutation(SPEC, b, match.permutation)


def test_equal_widths_are_the_plain_matching():
    a, b = network(0, 8, 9), network(1, 8, 9)
    assert partial_weight_matching(SPEC, a, b, key=KEY) == rebasin.weight_matching(SPEC, a, b, key=KEY)


def test_heads_of_a_wider_network():
    spec = PermutationSpec.from_axes({"q": (None, "H", "D"), "o": ("H", "D", None)}, indexed={"D": ["H"]})
    rng = np.random.default_rng(0)
    a, b = (
        {
            "q": rng.normal(size=(7, h, d)).astype(np.float32) * size,
            "o": rng.normal(size=(h, d, 7)).astype(np.float32) * size,
        }
        for h, d, size in ((2, 5, 1.0), (4, 8, 0.05))
    )
    b["q"][:, :2, :5], b["o"][:2, :5] = a["q"], a["o"]
    b = rebasin.permute(spec, rebasin.random_permutation(spec, b, key=KEY), b)
    match = partial_weight_matching(spec, a, b, key=KEY)
    check_permutation(spec, b, match.permutation)
    aligned = rebasin.permute(spec, match.permutation, b)
    np.testing.assert_array_equal(aligned["q"][:, :2, :5], a["q"])


def flat_spec(channels):
    """Channels flattened with positions, beside a segment that stays."""
    flat = Axis.concatenate(Axis.product(3, ("P", channels)), Axis.product(2))
    return PermutationSpec.from_axes({"conv": (None, "P"), "dense": (flat, None)})


def test_axes_of_several_parts_are_padded_where_their_units_are():
    a = {"conv": np.ones((2, 2), np.float32), "dense": np.arange(16, dtype=np.float32).reshape(8, 2)}
    b = {"conv": np.ones((2, 4), np.float32), "dense": np.ones((14, 2), np.float32)}

    def function(tree, x):
        units = jnp.concatenate([jnp.tile(x @ tree["conv"], 3), jnp.ones(2)])
        return units @ tree["dense"]

    widened = widen(flat_spec(4), a, b, function, jnp.ones(2), spec_a=flat_spec(2))
    assert widened["dense"][:, 0].tolist() == [0, 2, 0, 0, 4, 6, 0, 0, 8, 10, 0, 0, 12, 14]
    match = partial_weight_matching(flat_spec(4), a, b, key=KEY, spec_a=flat_spec(2))
    assert match.permutation["P"].shape == (4,)


def by_head_spec(heads, dims):
    """Heads, each of one dimension that stays and of some that move."""
    axis = Axis.product(("H", heads), Axis.concatenate(Axis.product(1), Axis.product(("D", dims))))
    return PermutationSpec.from_axes({"w": (axis, None)}, indexed={"D": ["H"]})


def test_concatenations_inside_products_are_padded_where_their_units_are():
    a, b = {"w": np.arange(1.0, 7.0)[:, None]}, {"w": np.ones((12, 1))}

    def function(tree, x):
        return x @ jnp.sort(tree["w"], axis=0)[-6:]  # stands for any function that zeros do not change

    widened = widen(by_head_spec(3, 3), a, b, function, jnp.ones((1, 6)), spec_a=by_head_spec(2, 2))
    assert widened["w"][:, 0].tolist() == [1, 2, 3, 0, 4, 5, 6, 0, 0, 0, 0, 0]
    flat = PermutationSpec.from_axes({"w": (Axis.product(("H", 2), ("D", 6)), None)})
    with pytest.raises(TreeMismatchError, match=r"w axis 0: H:2\*\(1 \+ D:2\) in A, H:2\*D:6 in B"):
        partial_weight_matching(flat, a, b, key=KEY, spec_a=by_head_spec(2, 2))


def test_widening_keeps_the_function_and_shapes():
    a, b = network(0, 8, 9), network(1, 12, 9)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    widened = widen(SPEC, a, b, apply, x)
    assert jax.tree.map(np.shape, widened) == jax.tree.map(np.shape, b)
    np.testing.assert_allclose(apply(widened, x), apply(a, x), rtol=1e-5)


def test_widening_under_a_normalisation_is_refused_and_the_group_named():
    def normalised(tree, x):
        hidden = jnp.tanh(x @ tree["w0"] + tree["b0"][None])
        inner = hidden @ tree["w1"]
        inner = (inner - inner.mean(-1, keepdims=True)) / inner.std(-1, keepdims=True)
        return inner @ tree["w2"]

    a, b = network(0, 8, 9), network(1, 12, 14)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    with pytest.raises(VerificationError) as info:
        widen(SPEC, a, b, normalised, x)
    headline, *problems = str(info.value).splitlines()
    assert headline == "A cannot be widened without changing its function:"
    assert len(problems) == 1
    assert problems[0].startswith("  group 'Q': zeros for new units change an output by ")
    assert problems[0].endswith("something, such as a normalisation, is computed over all units of the group")


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(TreeMismatchError) as info:
        partial_weight_matching(SPEC, network(0, 9, 4), network(0, 8, 5), key=KEY)
    headline, *problems = str(info.value).splitlines()
    assert headline == "A cannot be padded to the widths of B:"
    assert problems == [
        f"  {where}: group 'P' has size 9 in A, 8 in B" for where in ("b0 axis 0", "w0 axis 1", "w1 axis 0")
    ]
    other = network(0, 9, 4) | {"w2": np.ones((4, 6), np.float32)}
    with pytest.raises(TreeMismatchError, match="w2 axis 1: what stays has size 5 in A, 6 in B"):
        partial_weight_matching(SPEC, network(0, 9, 4), other, key=KEY)


def test_brute_force_over_injections():
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", "Q"), "u": ("Q", None)})
    for seed in range(3):
        rng = np.random.default_rng(seed)

        def tree(p, q, rng=rng):
            shapes = {"w": (2, p), "v": (p, q), "u": (q, 2)}
            return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}

        a, b = tree(2, 3), tree(4, 4)
        best = max(
            np.vdot(a["w"], b["w"][:, p])
            + np.vdot(a["v"], b["v"][np.ix_(p, q)])
            + np.vdot(a["u"], b["u"][list(q)])
            for p in itertools.permutations(range(4), 2)
            for q in itertools.permutations(range(4), 3)
        )
        match = partial_weight_matching(spec, a, b, key=KEY)
        assert match.objective[-1] == pytest.approx(best, rel=1e-5)


def test_units_that_nothing_of_a_is_matched_to_follow_in_the_order_of_b():
    rows = np.array(
        [[3, 0, 2, 1], [2, 3, 1, 0], [3, 2, 1, 0]], np.int32
    )  # of three heads, of which A has two
    assert rest_in_order(rows, (2, 2)).tolist() == [[3, 0, 1, 2], [2, 3, 0, 1], [0, 1, 2, 3]]
