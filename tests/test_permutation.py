import json
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rebasin
from rebasin import Axis, PermutationSpec
from rebasin.errors import PermutationError, SpecMismatchError
from rebasin.permutation import check_permutation, compiled_permute, load_permutation, save_permutation

# Every kind of axis at once: whole, segments, factors, a group on two axes, two indexed groups (one by a
# group that stands on another axis of the leaf, one by stacked layers that never move), and a leaf that
# stays.
SPEC = PermutationSpec.from_axes(
    {
        "w": (None, "P0"),
        "flat": (Axis.product(2, ("P0", 4)), Axis.concatenate(Axis.product(("P1", 3)), Axis.product(2))),
        "square": ("P1", "P1"),
        "query": ("P0", "heads", "inner"),
        "fused": (Axis.concatenate(Axis.product(1), Axis.product(("heads", 2), ("inner", 3))),),
        "by_head": (
            Axis.product(("heads", 2), Axis.concatenate(Axis.product(1), Axis.product(("inner", 3)))),
            "P1",
        ),
        "stack": ("layer", "P0", "hidden"),
        "deep": ("turn", "sub", "layer"),
        "count": (),
    },
    indexed={"inner": ["heads"], "hidden": ["layer"], "sub": ["layer"], "turn": ["layer", "sub"]},
    fixed=["layer"],
)
SHAPES = {
    "w": (3, 4),
    "flat": (8, 5),
    "square": (3, 3),
    "query": (4, 2, 3),
    "fused": (7,),
    "by_head": (8, 3),
    "stack": (2, 4, 3),
    "deep": (3, 4, 2),
    "count": (),
}


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}


def draw(tree, seed):
    return rebasin.random_permutation(SPEC, tree, key=jax.random.key(seed))


def reference(permutation, tree):
    """The definition, read off position by position."""
    p = {group: np.asarray(row) for group, row in permutation.items()}
    old, new = {k: np.asarray(v) for k, v in tree.items()}, {k: np.array(v) for k, v in tree.items()}
    for i in range(4):
        new["w"][:, i] = old["w"][:, p["P0"][i]]
        for s in range(2):
            for j in range(5):
                column = p["P1"][j] if j < 3 else j
                new["flat"][4 * s + i, j] = old["flat"][4 * s + p["P0"][i], column]
        for h in range(2):
            for d in range(3):
                source = p["heads"][h], p["inner"][h, d]
                new["query"][i, h, d] = old["query"][p["P0"][i], *source]
                new["fused"][1 + 3 * h + d] = old["fused"][1 + 3 * source[0] + source[1]]
                by_head = old["by_head"][:, p["P1"]]
                new["by_head"][4 * h] = by_head[4 * source[0]]
                new["by_head"][4 * h + 1 + d] = by_head[4 * source[0] + 1 + source[1]]
                new["stack"][h, i, d] = old["stack"][h, p["P0"][i], p["hidden"][h, d]]
    for layer in range(2):
        for s in range(4):
            for t in range(3):
                new["deep"][t, s, layer] = old["deep"][p["turn"][layer, s, t], p["sub"][layer, s], layer]
    new["square"] = old["square"][p["P1"]][:, p["P1"]]
    return new


@pytest.mark.parametrize("seed", range(5))
def test_permute_is_its_definition(tree, seed):
    permutation = draw(tree, seed)
    moved = rebasin.permute(SPEC, permutation, tree)
    chex.assert_trees_all_equal(moved, reference(permutation, tree))
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, tree)


def test_identity_moves_nothing(tree):
    chex.assert_trees_all_equal(rebasin.permute(SPEC, rebasin.identity_permutation(SPEC, tree), tree), tree)


@settings(max_examples=25)
@given(st.integers(0, 2**30))
def test_inverse_undoes_permute_exactly(seed):
    tree = {path: jnp.arange(np.prod(shape, dtype=int)).reshape(shape) for path, shape in SHAPES.items()}
    permutation = draw(tree, seed)
    inverse = rebasin.invert(SPEC, permutation)
    chex.assert_trees_all_equal(
        rebasin.permute(SPEC, inverse, rebasin.permute(SPEC, permutation, tree)), tree
    )
    both_ways = rebasin.compose(SPEC, permutation, inverse)
    assert rebasin.fixed_points(both_ways).total == 1.0


@settings(max_examples=25)
@given(st.integers(0, 2**30), st.integers(0, 2**30))
def test_compose_is_one_after_the_other(first_seed, second_seed):
    tree = {path: jnp.arange(np.prod(shape, dtype=int)).reshape(shape) for path, shape in SHAPES.items()}
    first, second = draw(tree, first_seed), draw(tree, second_seed)
    one_by_one = rebasin.permute(SPEC, second, rebasin.permute(SPEC, first, tree))
    chex.assert_trees_all_equal(rebasin.permute(SPEC, rebasin.compose(SPEC, first, second), tree), one_by_one)


def test_permute_under_jit_and_vmap(tree):
    permutations = [draw(tree, seed) for seed in range(3)]
    traces = []

    @jax.jit
    def compiled(p, t):
        traces.append(None)
        return rebasin.permute(SPEC, p, t)

    one_by_one = [rebasin.permute(SPEC, p, tree) for p in permutations]
    for permutation, expected in zip(permutations, one_by_one, strict=True):
        chex.assert_trees_all_equal(compiled(permutation, tree), expected)
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *permutations)
    together = jax.vmap(lambda p: rebasin.permute(SPEC, p, tree))(stacked)
    chex.assert_trees_all_equal(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one))


def test_compiled_permute_is_permute(tree):
    permutation = draw(tree, 0)
    chex.assert_trees_all_equal(
        compiled_permute(SPEC, permutation, tree), rebasin.permute(SPEC, permutation, tree)
    )


def test_permute_on_sharded_arrays():
    """Two devices, the permuted axis itself sharded, automatically or explicitly; and a network on each."""
    program = """
import jax, numpy as np
import rebasin
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rebasin import Axis

by_head = Axis.product(("H", 2), Axis.concatenate(Axis.product(2), Axis.product(("D", 2))))
axes = {"w": (None, "P0"), "v": ("P0", None), "u": (None, by_head)}
spec = rebasin.PermutationSpec.from_axes(axes, indexed={"D": ["H"]})
tree = {"w": np.arange(24.0).reshape(3, 8), "v": np.arange(16.0).reshape(8, 2)}
tree["u"] = tree["w"]
permutation = rebasin.random_permutation(spec, tree, key=jax.random.key(0))
row = np.asarray(permutation["P0"])
expected = np.asarray(rebasin.permute(spec, permutation, tree)["u"])
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    parts = {"w": PartitionSpec(None, "x"), "v": PartitionSpec("x"), "u": PartitionSpec(None, "x")}
    sharded = jax.device_put(tree, {k: NamedSharding(mesh, part) for k, part in parts.items()})
    for function in (rebasin.permute, jax.jit(rebasin.permute, static_argnums=0)):
        moved = function(spec, permutation, sharded)
        assert (np.asarray(moved["w"]) == tree["w"][:, row]).all()
        assert (np.asarray(moved["v"]) == tree["v"][row]).all()
        assert (np.asarray(moved["u"]) == expected).all()

# Networks on different devices meet on that of A.
one, other = (jax.device_put(tree, device) for device in jax.devices())
assert rebasin.weight_matching(spec, one, other, key=jax.random.key(0)).converged
middle = rebasin.interpolate(one, other, 0.5)
assert middle["w"].devices() == one["w"].devices() != other["w"].devices()
curve = rebasin.sweep(one, other, np.ones(4), lambda t, x: {"loss": t["w"].sum() * x}, num_alphas=3)
assert curve.loss_barrier.value == 0
print(len(jax.devices()))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "2"


def test_random_permutations_are_uniform():
    """24 permutations of 4, 2,400 draws, 100 expected of each: beyond 60 and 140 lie 4 σ."""
    spec = PermutationSpec.from_axes({"b": ("P0",)})
    keys = jax.random.split(jax.random.key(0), 2400)
    rows = jax.vmap(lambda key: rebasin.random_permutation(spec, {"b": np.zeros(4)}, key=key)["P0"])(keys)
    _, counts = np.unique(np.asarray(rows), axis=0, return_counts=True)
    assert len(counts) == 24
    assert 60 < counts.min() <= counts.max() < 140


def test_groups_are_drawn_independently():
    spec = PermutationSpec.from_axes({"a": ("P0",), "b": ("P1",)})
    drawn = rebasin.random_permutation(spec, {"a": np.zeros(50), "b": np.zeros(50)}, key=jax.random.key(0))
    assert not np.array_equal(drawn["P0"], drawn["P1"])


def test_inner_permutations_are_drawn_independently(tree):
    rows = np.asarray(draw(tree, 1)["inner"])
    assert rows.shape == (2, 3)
    assert any(not np.array_equal(*np.asarray(draw(tree, seed)["inner"])) for seed in range(4))


def test_every_problem_of_a_permutation_is_listed(tree):
    permutation = rebasin.identity_permutation(SPEC, tree)
    del permutation["P0"]
    broken = permutation | {
        "P1": np.array([0, 1, 1]),
        "heads": np.array([0.0, 1.0]),
        "inner": np.arange(3),
        "layer": np.arange(2),
    }
    with pytest.raises(PermutationError) as info:
        check_permutation(SPEC, tree, broken)
    assert str(info.value).splitlines() == [
        "the permutation does not fit the spec:",
        "  group 'P0': missing",
        "  group 'layer': not in the spec",
        "  group 'P1': not a permutation of 0 to 2",
        "  group 'heads': wanted an integer array of shape (2,), got float64 array of shape (2,)",
        "  group 'inner': wanted an integer array of shape (2, 3), got int64 array of shape (3,)",
    ]


def test_permute_refuses_values_that_are_no_permutation(tree):
    twice = rebasin.identity_permutation(SPEC, tree) | {"P1": np.array([0, 1, 1])}
    with pytest.raises(PermutationError, match="group 'P1': not a permutation of 0 to 2"):
        rebasin.permute(SPEC, twice, tree)


def test_permute_refuses_another_tree(tree):
    with pytest.raises(SpecMismatchError, match=r"query axis 0: size 4, but group 'P0' has size 5 from w"):
        rebasin.permute(SPEC, draw(tree, 0), tree | {"w": jnp.zeros((3, 5))})


def test_fixed_points_of_appendix_g():
    first = {"P0": np.array([0, 1, 2, 3]), "P1": np.array([1, 0])}
    second = {"P0": np.array([0, 1, 3, 2]), "P1": np.array([0, 1])}
    points = rebasin.fixed_points(first, second)
    # FP_i = trace(P₁ᵀP₂), by the matrices themselves.
    for group, row in first.items():
        matrices = np.eye(len(row))[row], np.eye(len(row))[second[group]]
        assert points.counts[group] == np.trace(matrices[0].T @ matrices[1])
    assert points.fractions == {"P0": 0.5, "P1": 0.0}
    assert points.total == 2 / 6
    with pytest.raises(PermutationError, match="permutations of different groups or sizes"):
        rebasin.fixed_points(first, {"P0": second["P0"]})


def test_fixed_points_of_an_inner_group_are_counted_at_every_outer_position():
    points = rebasin.fixed_points({"inner": np.array([[0, 1, 2], [0, 2, 1]])})
    assert (points.counts, points.sizes) == ({"inner": 4}, {"inner": 6})


def test_save_and_load(tmp_path, tree):
    permutation, path = draw(tree, 3), tmp_path / "permutation.json"
    rebasin.save_permutation(path, SPEC, permutation)
    chex.assert_trees_all_equal(rebasin.load_permutation(path, SPEC), jax.device_get(permutation))
    other = PermutationSpec.from_axes({"b": ("P0",)})
    with pytest.raises(PermutationError, match="saved for another spec"):
        rebasin.load_permutation(path, other)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PermutationError, match="not a saved permutation"):
        rebasin.load_permutation(path, SPEC)


HEADS = PermutationSpec.from_axes({"w": (None, "H", "D")}, indexed={"D": ["H"]})


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ({"P0": [0, 0, 2]}, "group 'P0': not a permutation of 0 to 2"),
        ({"P0": [-1, 0, 1]}, "group 'P0': not a permutation of 0 to 2"),
        ({"P0": [7, 8, 9]}, "group 'P0': not a permutation of 0 to 2"),
        (
            {"P0": [0.9, 1.9, 2.9]},
            "group 'P0': wanted an integer array with 1 axes, got float64 array of shape (3,)",
        ),
        (
            {"P0": [[0, 1]]},
            "group 'P0': wanted an integer array with 1 axes, got int64 array of shape (1, 2)",
        ),
        ({}, "group 'P0': missing"),
        ({"P0": [0, 1, 2], "Q": [0]}, "group 'Q': not in the spec"),
    ],
)
def test_a_file_that_holds_no_permutation_is_refused(tmp_path, groups, problem):
    spec, path = PermutationSpec.from_axes({"bias": ("P0",)}), tmp_path / "p.json"
    save_permutation(path, spec, {"P0": np.arange(3)})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": groups}))
    with pytest.raises(PermutationError) as info:
        load_permutation(path, spec)
    assert str(info.value).splitlines() == [f"{path}: the permutation does not fit the spec:", f"  {problem}"]


@pytest.mark.parametrize("change", [{"version": 99}, {"format": "rebasin.spec"}])
def test_a_permutation_of_another_version_or_form_is_refused(tmp_path, change):
    spec, path = PermutationSpec.from_axes({"bias": ("P0",)}), tmp_path / "p.json"
    save_permutation(path, spec, {"P0": np.arange(3)})
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    with pytest.raises(PermutationError) as info:
        load_permutation(path, spec)
    got = f"{content['format']} version {content['version']}"
    assert str(info.value) == f"{path}: wanted rebasin.permutation version 1, got {got}"


@pytest.mark.parametrize("text", ['{"groups": 3}', "[1, 2]", "not json", '{"groups": {"P0": [[0], [1, 2]]}}'])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(PermutationError, match="not a saved permutation"):
        load_permutation(path, PermutationSpec.from_axes({"bias": ("P0",)}))


def test_invert_and_compose_refuse_what_is_no_permutation():
    spec = PermutationSpec.from_axes({"bias": ("P0",)})
    good, wrong = {"P0": np.arange(3)}, {"P0": np.array([0, 1, 9])}
    with pytest.raises(
        PermutationError, match=r"the permutation does not fit the spec:\n  group 'P0': not a"
    ):
        rebasin.invert(spec, wrong)
    with pytest.raises(PermutationError, match="the second permutation does not fit the spec"):
        rebasin.compose(spec, good, wrong)
    with pytest.raises(
        PermutationError, match=r"two permutations of different sizes:\n  group 'P0': \(2,\) and"
    ):
        rebasin.compose(spec, {"P0": np.arange(2)}, good)
    with pytest.raises(PermutationError, match="group 'D': 2 positions of group 'H', which has 3"):
        rebasin.invert(HEADS, {"H": np.arange(3), "D": np.zeros((2, 1), int)})
    # Under jit the values are not known, and only the arrays are looked at.
    assert jax.jit(lambda p: rebasin.invert(spec, p))(good)["P0"].tolist() == [0, 1, 2]
