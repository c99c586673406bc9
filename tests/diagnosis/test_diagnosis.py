"""The diagnosis of a path: its numbers against other ways to compute them, and causes that are planted."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import Batch, diagnose
from rebasin.diagnosis.layers import singular_overlaps, weights_of_layers
from rebasin.diagnosis.scales import norm_ratios, rescale
from rebasin.diagnosis.streams import match_blocks, stream_groups, untie
from rebasin.errors import ConfigError, DataError, NonFiniteError, PermutationError, TreeMismatchError
from rebasin.tracing.program import trace_program
from rebasin.tracing.sites import find_layers

WIDTH = 12
X = jnp.asarray(np.random.default_rng(0).normal(size=(60, 6)), jnp.float32)


def network(tree, x):
    """A residual network: a stem, two blocks that read and write the stream, and a head."""
    x = jnp.dot(x, tree["stem"]["w"])
    for name in ("block0", "block1"):
        block = tree[name]
        h = jax.nn.relu(jnp.dot(x, block["in"]) + block["bias"][None])
        x = x + jnp.dot(h, block["out"])
    return jnp.dot(x, tree["top"])


def draw(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    def block():
        return {"in": normal(WIDTH, WIDTH + 3), "bias": normal(WIDTH + 3), "out": normal(WIDTH + 3, WIDTH)}

    return {
        "stem": {"w": normal(6, WIDTH)},
        "block0": block(),
        "block1": block(),
        "top": 3 * normal(WIDTH, 4),
    }


A = draw(1)
DATA = Batch(X, jnp.argmax(network(A, X), axis=-1))
SPEC = rebasin.infer_spec(network, A, X[:2])
WEIGHTS = weights_of_layers(SPEC, find_layers(trace_program(SPEC, network, A, X)))
STREAM, *HIDDEN = SPEC.groups
PLANTED = rebasin.random_permutation(SPEC, A, key=jax.random.key(3))
B = rebasin.permute(SPEC, PLANTED, A)
TRUTH = {group: np.argsort(np.asarray(rows)) for group, rows in PLANTED.items()}
WRONG = {**TRUTH, STREAM: np.roll(TRUTH[STREAM], 1)}


@functools.cache
def diagnosed(case):
    permutation = {"right": TRUTH, "wrong": WRONG}[case]
    return diagnose(network, A, B, DATA, permutation, spec=SPEC, verify=False, batch_size=30)


def test_layers_know_what_they_read_and_write():
    assert [(w.path, w.axis) for w in WEIGHTS] == [
        ("stem/w", 1),
        ("block0/in", 1),
        ("block0/out", 1),
        ("block1/in", 1),
        ("block1/out", 1),
        ("top", 0),
    ]
    assert [w.writes for w in WEIGHTS] == [{STREAM}, {HIDDEN[0]}, {STREAM}, {HIDDEN[1]}, {STREAM}, set()]
    assert [w.reads for w in WEIGHTS] == [set(), {STREAM}, {HIDDEN[0]}, {STREAM}, {HIDDEN[1]}, {STREAM}]


def test_singular_overlaps_are_the_sum_over_pairs_of_singular_vectors():
    other = draw(2)
    moved = rebasin.permute(SPEC, TRUTH, other)
    found = singular_overlaps(SPEC, WEIGHTS, A, other, TRUTH)
    for path, leaves in {"block0/in": (A["block0"]["in"], moved["block0"]["in"])}.items():
        (u, s, v), (u2, s2, v2) = (np.linalg.svd(np.asarray(x, np.float64)) for x in leaves)
        pairs = [(i, j) for i in np.flatnonzero(s >= 0.3 * s[0]) for j in np.flatnonzero(s2 >= 0.3 * s2[0])]
        total = sum((u[:, i] @ u2[:, j]) * (v[i] @ v2[j]) for i, j in pairs)
        counts = len({i for i, _ in pairs}) * len({j for _, j in pairs})
        assert found[path][1] == pytest.approx(total / np.sqrt(counts), abs=1e-5)
    planted = singular_overlaps(SPEC, WEIGHTS, A, B, TRUTH)
    np.testing.assert_allclose([after for _, after in planted.values()], 1, atol=1e-5)
    assert max(before for before, _ in planted.values()) < 0.8


def test_a_convolution_is_a_matrix_of_outputs_by_the_rest():
    tree = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2, 5)), jnp.float32)}
    spec = rebasin.PermutationSpec.from_axes({"w": (None, None, None, "P0")})
    order = np.array([4, 2, 0, 1, 3])
    other = {"w": tree["w"][..., order]}
    weights = weights_of_layers(spec, ())
    assert weights == ()
    weight = [WEIGHTS[0]._replace(path="w", axis=3)]
    found = singular_overlaps(spec, weight, tree, other, {"P0": np.argsort(order)})
    assert found["w"][1] == pytest.approx(1, abs=1e-5)


def test_over_scaled_layers_are_brought_back_where_the_function_allows_it():
    block = {**A["block0"], "in": 5 * A["block0"]["in"], "bias": 5 * A["block0"]["bias"]}
    block["out"] = A["block0"]["out"] / 5
    scaled = {**A, "block0": block}
    ratios = norm_ratios(WEIGHTS, A, scaled)
    assert ratios["block0/in"] == pytest.approx(0.2, rel=1e-5)
    assert ratios["block0/out"] == pytest.approx(5, rel=1e-5)
    assert ratios["block1/in"] == 1
    back = rescale(SPEC, WEIGHTS, A, scaled, lambda params: network(params, X))
    assert back.paths == ("block0/in",)
    chex.assert_trees_all_close(back.params, A, rtol=1e-5)


def test_layers_stay_where_no_scale_is_a_symmetry():
    def smooth(tree):
        return jnp.dot(jnp.tanh(jnp.dot(X, tree["stem"]["w"])), tree["block0"]["in"])

    scaled = {**A, "stem": {"w": 3 * A["stem"]["w"]}}
    kept = rescale(SPEC, WEIGHTS[:2], A, scaled, smooth)
    assert kept.paths == ()
    chex.assert_trees_all_equal(kept.params, scaled)


def test_a_layer_in_front_of_a_norm_is_scaled_alone():
    def normed(tree, x):
        h = jnp.dot(x, tree["a"]["w"]) + tree["a"]["b"][None]
        h = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True))
        return jnp.dot(h * tree["n"][None], tree["z"])

    a = {"a": {"w": X[:6, :4] + 2, "b": X[7, :4]}, "n": X[8, :4], "z": X[9:13, :3]}
    b = {**a, "a": jax.tree.map(lambda x: x / 8, a["a"])}
    spec = rebasin.infer_spec(normed, a, X[:2])
    weights = weights_of_layers(spec, find_layers(trace_program(spec, normed, a, X[:2])))
    back = rescale(spec, weights, a, b, lambda params: normed(params, X))
    assert back.paths == ("a/w",)
    chex.assert_trees_all_close(back.params, a, rtol=1e-5)


def test_blocks_that_need_permutations_of_their_own_are_found_and_untied():
    order = np.random.default_rng(5).permutation(WIDTH)
    block = A["block1"]
    b = {**A, "block1": {**block, "in": block["in"][order], "out": block["out"][:, order]}}
    assert stream_groups(SPEC, WEIGHTS) == (STREAM,)
    stem, first, second, top = match_blocks(SPEC, WEIGHTS, STREAM, A, b)
    assert (stem.paths, second.paths, top.paths) == (("stem/w",), ("block1/in", "block1/out"), ("top",))
    for match in (stem, first, top):
        assert (match.same, match.own, match.shared) == (1, pytest.approx(1), pytest.approx(1))
    assert second.own == pytest.approx(1)
    assert second.shared < 0.5
    assert second.chance < 0.8
    np.testing.assert_array_equal(order[second.rows], np.arange(WIDTH))
    chex.assert_trees_all_equal(untie(SPEC, STREAM, (stem, first, second, top), b), A)


def test_variance_ratios_are_those_of_the_outputs():
    other = draw(2)
    repair = rebasin.build_repair(SPEC, A, other, network, X, batch_size=25)
    middle = rebasin.interpolate(A, other, 0.5)
    found = dict(zip(repair.layers, repair.variance_ratios(middle, 0.5), strict=True))
    deviations = [
        np.std(np.asarray(jnp.dot(X, t["stem"]["w"]), np.float64), axis=0) for t in (A, other, middle)
    ]
    wanted = np.sum(deviations[2] ** 2) / np.sum(((deviations[0] + deviations[1]) / 2) ** 2)
    assert found["stem/w"] == pytest.approx(wanted, rel=1e-4)
    assert found["stem/w"] < 0.8
    same = rebasin.build_repair(SPEC, A, A, network, X, batch_size=25)
    np.testing.assert_allclose(same.variance_ratios(A, 0.5), 1, rtol=1e-5)


def test_nothing_stands_out_between_equal_networks():
    diagnosis = diagnosed("right")
    assert diagnosis.findings == ()
    assert diagnosis.midpoint.permuted == diagnosis.midpoint.a == diagnosis.midpoint.b
    assert diagnosis.midpoint.permuted.error == 0
    assert diagnosis.midpoint.before.error > 0.3
    assert [group.moved for group in diagnosis.groups] == [0, 0, 0]
    np.testing.assert_allclose([layer.variance for layer in diagnosis.layers[:-1]], 1, rtol=1e-3)
    assert diagnosis.layers[-1].variance is None
    text = str(diagnosis)
    assert "Nothing stands out: the midpoint's error lies 0.0 points above that of A and B" in " ".join(
        text.split()
    )
    assert "Try" not in text


def test_a_wrong_permutation_of_one_group_is_named():
    diagnosis = diagnosed("wrong")
    first = diagnosis.findings[0]
    assert (first.cause, first.where) == ("group", (STREAM,))
    assert first.removes == pytest.approx(1)
    stream, *hidden = diagnosis.groups
    assert stream.replaced == diagnosis.midpoint.a
    assert stream.moved == 1
    assert stream.best_correlation == pytest.approx(1, abs=1e-4)
    assert stream.correlation < 0.5
    assert all(group.replaced == diagnosis.midpoint.permuted for group in hidden)
    after = {layer.path: layer.overlap for layer in diagnosis.layers}
    assert after["stem/w"] < 0.5
    # What the blocks need is one permutation, which is not the shared one; that is no conflict between them.
    rows = [block.rows for block in diagnosis.streams[0].blocks]
    np.testing.assert_array_equal(rows, [rows[0]] * len(rows))


def test_the_report_fits_a_terminal_and_says_what_to_try():
    text = str(diagnosed("wrong"))
    assert max(map(len, text.splitlines())) <= 80
    assert "1. The permutation of stem/w" in text
    assert "Try: match this group again" in " ".join(text.split())
    layers = tuple(row._replace(path="params/" * 20 + row.path) for row in diagnosed("wrong").layers)
    long = dataclasses.replace(diagnosed("wrong"), layers=layers)
    assert max(map(len, str(long).splitlines())) <= 80


def test_without_labels_the_classes_of_both_networks_stand_in():
    diagnosis = diagnose(network, A, B, X, WRONG, spec=SPEC, verify=False, batch_size=30)
    # A and B compute one function, whose classes are the labels.
    assert diagnosis.midpoint == diagnosed("wrong").midpoint
    assert "There are no labels" in str(diagnosis)


@pytest.mark.slow
def test_outputs_that_are_no_logits_leave_the_loss_out():
    def two(tree, x):
        return network(tree, x), x

    diagnosis = diagnose(two, A, B, X, WRONG, spec=SPEC, verify=False, batch_size=30)
    assert diagnosis.midpoint is None
    assert diagnosis.findings == ()
    assert diagnosis.groups[0].replaced is None
    assert "The outputs are no logits" in str(diagnosis)
    scaled = {**B, "top": 3 * B["top"]}
    diagnosis = diagnose(two, A, scaled, X, TRUTH, spec=SPEC, verify=False, batch_size=30)
    assert [finding.cause for finding in diagnosis.findings] == ["scale"]
    assert "is 3 times as large in B" in " ".join(str(diagnosis).split())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params_b": {**B, "top": B["top"][:, :3]}}, TreeMismatchError, "top: shape (12, 4) in params_a"),
        ({"params_b": {**B, "top": B["top"] * np.nan}}, NonFiniteError, "params_b is not finite:\n  top: 48"),
        ({"params_a": {**A, "act": jnp.tanh}}, TreeMismatchError, "act: <"),
        ({"data": Batch(X, DATA.labels[:3])}, DataError, "labels: 3 examples"),
        ({"data": Batch(X, DATA.labels + 3)}, DataError, "labels must be 0 to 3"),
        ({"data": Batch(X, X)}, DataError, "need integer labels of shape [n]"),
        ({"data": X[:0]}, DataError, "data hold no examples"),
        ({"data": X * np.inf}, NonFiniteError, "data is not finite"),
        ({"permutation": {STREAM: TRUTH[STREAM]}}, PermutationError, "group 'block0/in': missing"),
        ({"permutation": None, "method": "sinkhorn"}, ConfigError, "has no loss for the method 'sinkhorn'"),
        ({"method": "magic"}, ConfigError, "no matching method is called 'magic'"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(change, error, message):
    arguments = {"apply_fn": network, "params_a": A, "params_b": B, "data": DATA, "permutation": TRUTH}
    with pytest.raises(error) as raised:
        diagnose(**{**arguments, "spec": SPEC, "verify": False, **change})
    assert message in str(raised.value)
