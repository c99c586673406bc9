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
from rebasin.diagnosis.streams import match_blocks, stream_groups
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
SPEC = rebasin.infer_spec(network, A, X[:2])
WEIGHTS = weights_of_layers(SPEC, find_layers(trace_program(SPEC, network, A, X)))
STREAM, *HIDDEN = SPEC.groups
PLANTED = rebasin.random_permutation(SPEC, A, key=jax.random.key(3))
B = rebasin.permute(SPEC, PLANTED, A)
TRUTH = {group: np.argsort(np.asarray(rows)) for group, rows in PLANTED.items()}
WRONG = {**TRUTH, STREAM: np.roll(TRUTH[STREAM], 1)}


def chain(tree, x):
    """Two hidden layers."""
    x = jax.nn.relu(jnp.dot(x, tree["w0"]))
    return jnp.dot(jax.nn.relu(jnp.dot(x, tree["w1"])), tree["w2"])


CHAIN_A = {"w0": A["stem"]["w"], "w1": A["block0"]["in"], "w2": 3 * A["block0"]["out"][:, :4]}
CHAIN = rebasin.PermutationSpec.from_axes({"w0": (None, "w0"), "w1": ("w0", "w1"), "w2": ("w1", None)})
CHAIN_B = rebasin.permute(CHAIN, {"w0": PLANTED[STREAM], "w1": PLANTED[HIDDEN[0]]}, CHAIN_A)
RIGHT = {"w0": TRUTH[STREAM], "w1": TRUTH[HIDDEN[0]]}
DATA = Batch(X, jnp.argmax(chain(CHAIN_A, X), axis=-1))


def diagnose_chain(**changes):
    arguments = {"apply_fn": chain, "params_a": CHAIN_A, "params_b": CHAIN_B, "data": DATA, "spec": CHAIN}
    return diagnose(**{**arguments, "permutation": RIGHT, "verify": False, "batch_size": 30, **changes})


@functools.cache
def diagnosed(case):
    wrong = {**RIGHT, "w0": np.roll(RIGHT["w0"], 1)}
    return diagnose_chain(permutation=wrong if case == "wrong" else RIGHT)


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


@pytest.mark.slow
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


def test_blocks_that_need_permutations_of_their_own_are_found():
    order = np.random.default_rng(5).permutation(WIDTH)
    block = A["block1"]
    b = {**A, "block1": {**block, "in": block["in"][order], "out": block["out"][:, order]}}
    assert stream_groups(SPEC, WEIGHTS) == (STREAM,)
    hidden = np.random.default_rng(6).permutation(WIDTH + 3)
    b = rebasin.permute(
        SPEC, {**TRUTH, HIDDEN[1]: hidden}, b
    )  # hidden units are matched by each block itself
    stem, first, second, top = match_blocks(SPEC, WEIGHTS, STREAM, A, b)
    assert (stem.paths, second.paths, top.paths) == (("stem/w",), ("block1/in", "block1/out"), ("top",))
    for match in (stem, first, top):
        assert (match.same, match.own, match.shared) == (1, pytest.approx(1), pytest.approx(1))
        assert abs(match.gain) < 1e-6
    assert second.own == pytest.approx(1)
    assert second.same == np.mean(order == np.arange(WIDTH))
    assert second.shared < 0.7
    assert second.chance < 0.8
    assert second.gain == second.own - max(second.shared, second.chance)


def test_blocks_that_agree_on_another_permutation_do_not_conflict():
    for match in match_blocks(SPEC, WEIGHTS, STREAM, A, rebasin.permute(SPEC, WRONG, B)):
        assert (match.same, match.shared, match.own) == (1, pytest.approx(1), pytest.approx(1))


def test_variance_ratios_are_those_of_the_outputs():
    other = {**CHAIN_A, "w0": draw(2)["stem"]["w"]}
    repair = rebasin.build_repair(CHAIN, CHAIN_A, other, chain, X, batch_size=30)
    middle = rebasin.interpolate(CHAIN_A, other, 0.5)
    found = dict(zip(repair.layers, repair.variance_ratios(middle, 0.5), strict=True))
    outputs = (np.asarray(X, np.float64) @ np.asarray(tree["w0"]) for tree in (CHAIN_A, other, middle))
    a, b, own = (values.std(axis=0) for values in outputs)
    assert found["w0"] == pytest.approx(np.sum(own**2) / np.sum(((a + b) / 2) ** 2), rel=1e-4)
    assert found["w0"] < 0.8


def test_nothing_stands_out_between_equal_networks():
    diagnosis = diagnosed("right")
    assert diagnosis.findings == ()
    assert diagnosis.midpoint.permuted == diagnosis.midpoint.a == diagnosis.midpoint.b
    assert diagnosis.midpoint.permuted.error == 0
    assert diagnosis.midpoint.before.error > 0.3
    assert [group.moved for group in diagnosis.groups] == [0, 0]
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
    assert (first.cause, first.where) == ("group", ("w0",))
    assert first.removes == pytest.approx(1)
    wrong, right = diagnosis.groups
    assert wrong.replaced == wrong.rematched == diagnosis.midpoint.a
    assert wrong.moved == 1
    assert wrong.best_correlation == pytest.approx(1, abs=1e-4)
    assert wrong.correlation < 0.5
    assert right.replaced == diagnosis.midpoint.permuted
    assert [layer.overlap < 0.6 for layer in diagnosis.layers] == [True, True, False]


def test_the_report_fits_a_terminal_and_says_what_to_try():
    text = str(diagnosed("wrong"))
    assert max(map(len, text.splitlines())) <= 80
    assert "1. The permutation of w0" in text
    assert "Try: match this group again" in " ".join(text.split())
    layers = tuple(row._replace(path="params/" * 20 + row.path) for row in diagnosed("wrong").layers)
    long = dataclasses.replace(diagnosed("wrong"), layers=layers)
    assert max(map(len, str(long).splitlines())) <= 80


@pytest.mark.slow
def test_without_labels_the_classes_of_both_networks_stand_in():
    diagnosis = diagnose_chain(data=X)
    # A and B compute one function, whose classes are the labels.
    assert diagnosis.midpoint == diagnosed("right").midpoint
    assert "There are no labels" in str(diagnosis)


@pytest.mark.slow
def test_outputs_that_are_no_logits_leave_the_loss_out():
    def two(tree, x):
        return chain(tree, x), x

    diagnosis = diagnose_chain(data=X, apply_fn=two)
    assert diagnosis.midpoint is None
    assert diagnosis.findings == ()
    assert diagnosis.groups[0].replaced is None
    assert "The outputs are no logits" in str(diagnosis)
    diagnosis = diagnose_chain(data=X, apply_fn=two, params_b={**CHAIN_B, "w2": 3 * CHAIN_B["w2"]})
    assert [finding.cause for finding in diagnosis.findings] == ["scale"]
    assert "is 3 times as large in B" in " ".join(str(diagnosis).split())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params_b": {**CHAIN_B, "w2": X[:, :3]}}, TreeMismatchError, "w2: shape (15, 4) in params_a"),
        ({"params_b": {**CHAIN_B, "w2": X[:15, :4] * np.nan}}, NonFiniteError, "params_b is not finite:"),
        ({"params_a": {**CHAIN_A, "act": jnp.tanh}}, TreeMismatchError, "act: <"),
        ({"data": Batch(X, DATA.labels[:3])}, DataError, "labels: 3 examples"),
        ({"data": Batch(X, DATA.labels + 3)}, DataError, "labels must be 0 to 3"),
        ({"data": Batch(X, X)}, DataError, "need integer labels of shape [n]"),
        ({"data": X[:0]}, DataError, "data hold no examples"),
        ({"data": X * np.inf}, NonFiniteError, "data is not finite"),
        ({"permutation": {"w0": RIGHT["w0"]}}, PermutationError, "group 'w1': missing"),
        ({"permutation": None, "method": "sinkhorn"}, ConfigError, "has no loss for the method 'sinkhorn'"),
        ({"method": "magic"}, ConfigError, "no matching method is called 'magic'"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(change, error, message):
    with pytest.raises(error) as raised:
        diagnose_chain(**change)
    assert message in str(raised.value)
