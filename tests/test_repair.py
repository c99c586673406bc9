import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rebasin
from rebasin import build_norm_reset, build_repair, build_sweep
from rebasin.batches import Batch
from rebasin.errors import (
    DataError,
    InferenceError,
    NonFiniteError,
    TreeMismatchError,
)
from rebasin.models import ViT


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def network(tree, x):
    for w, b in tree[:-1]:
        x = jnp.tanh(x @ w + b[None])
    return x @ tree[-1][0] + tree[-1][1][None]


def chain(seed, widths=(4, 9, 7, 3)):
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    return [(normal(m, n, seed=seed + i), normal(n, seed=seed + 20 + i)) for i, (m, n) in enumerate(pairs)]


A, B, X = chain(0), chain(100), normal(40, 4, seed=7)
SPEC = rebasin.infer_spec(network, A, X)


def preactivations(tree, x, correction=None):
    """What each hidden layer puts out, by hand in float64, with a correction of it if there is one."""
    x, outputs = np.asarray(x, np.float64), []
    for i, (w, b) in enumerate(tree[:-1]):
        y = x @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
        if correction is not None:
            y = y * np.asarray(correction[i][0], np.float64) + np.asarray(correction[i][1], np.float64)
        outputs.append(y)
        x = np.tanh(y)
    return outputs


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_every_layer_gets_the_statistics_between_the_endpoints(alpha):
    repair = build_repair(SPEC, A, B, network, X)  # one batch, hence exact
    mixed = rebasin.interpolate(A, B, alpha)
    correction = jax.jit(repair.prepare)(mixed, alpha)
    ends = [preactivations(tree, X) for tree in (A, B)]
    for y, a, b in zip(preactivations(mixed, X, correction), *ends, strict=True):
        np.testing.assert_allclose(y.mean(0), alpha * a.mean(0) + (1 - alpha) * b.mean(0), atol=1e-4)
        np.testing.assert_allclose(y.std(0), alpha * a.std(0) + (1 - alpha) * b.std(0), rtol=1e-4)
    # The function applies it as by hand.
    outputs = repair.apply(mixed, X[:5], correction)
    y = preactivations(mixed, X[:5], correction)[-1]
    expected = np.tanh(y) @ np.asarray(mixed[-1][0]) + np.asarray(mixed[-1][1])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [7, pytest.param(20, marks=pytest.mark.slow), 40])
def test_endpoints_stay_whatever_the_batches(batch_size):
    repair = build_repair(SPEC, A, B, network, X, batch_size=batch_size)
    for tree, alpha in ((A, 1.0), (B, 0.0)):
        for scale, shift in repair.prepare(tree, alpha):
            np.testing.assert_allclose(scale, 1, atol=1e-5)
            np.testing.assert_allclose(shift, 0, atol=1e-5)
        np.testing.assert_allclose(
            repair.apply(tree, X, repair.prepare(tree, alpha)), network(tree, X), rtol=1e-4, atol=1e-4
        )


def test_batches_agree_with_the_whole_up_to_their_spread():
    whole, parts = (
        build_repair(SPEC, A, B, network, X, batch_size=n).prepare(rebasin.interpolate(A, B, 0.5), 0.5)
        for n in (40, 15)
    )
    # The first layer sees the data as they are, so that moments pooled over batches are those of the whole.
    for one, other in zip(whole[0], parts[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole[1][0], parts[1][0], rtol=0.2)


def test_sweep_with_repair_traces_once_and_keeps_its_ends():
    def metrics(params, batch, correction=None):
        logits = network(params, batch) if correction is None else repair.apply(params, batch, correction)
        return {"loss": jnp.sum(jnp.square(logits - 1), axis=1)}

    repair = build_repair(SPEC, A, B, network, X)
    plain = build_sweep(metrics, num_alphas=5)(A, B, X)
    repaired = build_sweep(metrics, num_alphas=5, prepare=repair.prepare, batch_size=15)(A, B, X)
    np.testing.assert_allclose(repaired.loss[[0, -1]], plain.loss[[0, -1]], rtol=1e-4)
    assert not np.allclose(repaired.loss[1:-1], plain.loss[1:-1], rtol=1e-2)
    assert repair.layers == ("0/0", "1/0")


def test_data_are_arguments_of_compiled_programs():
    """Closed over, they would be copied into each, and what XLA knows of them computed when it compiles."""
    repair = build_repair(SPEC, A, B, network, X)
    tree = Normed().init(jax.random.key(0), X)
    reset = build_norm_reset(tree, update, X)
    for prepare, params in ((repair.prepare, A), (reset, tree)):
        assert any(np.array_equal(leaf, X) for leaf in jax.tree.leaves(prepare))
        program = jax.make_jaxpr(lambda prepare, params: prepare(params, 0.5))(prepare, params)
        assert sum(np.size(const) for const in program.consts) < 10

    def traced(offset, params, alpha):
        assert isinstance(offset, jax.core.Tracer)
        return offset

    prepare = jax.tree_util.Partial(traced, jnp.ones(3))
    measure = build_sweep(lambda tree, x, extra: {"loss": x[:, 0] + extra[0]}, num_alphas=3, prepare=prepare)
    np.testing.assert_array_equal(measure(A, B, X).examples["loss"], np.tile(X[:, 0] + 1, (3, 1)))


def test_constant_channels_are_shifted_only():
    a, b = ([(w, b) for w, b in tree] for tree in (A, B))
    mixed = rebasin.interpolate(a, b, 0.5)
    mixed[0] = (mixed[0][0].at[:, 2].set(0.0), mixed[0][1])  # silent in the middle, alive at the ends
    scale, shift = build_repair(SPEC, a, b, network, X).prepare(mixed, 0.5)[0]
    assert scale[2] == 1
    # Its output is the bias alone, which lies between the ends' by itself.
    target = 0.5 * (np.asarray(X @ a[0][0]) + np.asarray(X @ b[0][0])).mean(0)[2]
    np.testing.assert_allclose(shift[2], target, rtol=1e-4)


@pytest.mark.slow
def test_transformer_and_scan():
    model, x = ViT(8, 3, depth=1, num_heads=2), normal(6, 4, 4, 1)
    a, b = (model.init(jax.random.key(seed), x) for seed in (0, 1))
    repair = build_repair(rebasin.infer_spec(model.apply, a, x), a, b, model.apply, x)
    wanted = {"query", "key", "value", "out", "up_0", "down_0", "embed"}
    assert {name.split("/")[-2] for name in repair.layers} == wanted
    np.testing.assert_allclose(
        jax.jit(repair.apply)(a, x[:2], jax.jit(repair.prepare)(a, 1.0)),
        model.apply(a, x[:2]),
        rtol=1e-3,
        atol=1e-4,
    )


def test_steps_of_a_scan_are_corrected_one_by_one():
    def stacked(tree, x):
        h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ tree["i"]), tree["w"])[0]
        return h @ tree["v"]

    a, b = ({"i": normal(4, 6, seed=s), "w": normal(2, 6, 6, seed=s + 1), "v": normal(6, 2)} for s in (0, 5))
    repair = build_repair(rebasin.infer_spec(stacked, a, X), a, b, stacked, X)
    correction = repair.prepare(rebasin.interpolate(a, b, 0.5), 0.5)
    assert [scale.shape for scale, _ in correction] == [(6,), (2, 6)]


def test_errors():
    with pytest.raises(DataError, match="no examples"):
        build_repair(SPEC, A, B, network, X[:0])
    with pytest.raises(NonFiniteError, match="data is not finite"):
        build_repair(SPEC, A, B, network, X.at[0, 0].set(jnp.nan))
    with pytest.raises(NonFiniteError, match="params_b is not finite"):
        build_repair(SPEC, A, jax.tree.map(lambda leaf: leaf * jnp.nan, B), network, X)
    with pytest.raises(TreeMismatchError, match="0/0: shape"):
        build_repair(SPEC, A, chain(0, (4, 8, 7, 3)), network, X)
    with pytest.raises(InferenceError, match=r"cannot be traced with batch float32\[40, 3\]"):
        build_repair(SPEC, A, B, network, X[:, :3])
    repair = build_repair(SPEC, A, B, network, X)
    with pytest.raises(
        InferenceError, match="the correction is for 1 layers, but with this batch there are 2"
    ):
        repair.apply(A, X, repair.prepare(A, 1.0)[:1])
    for forgotten in ((A, X), (A,)):
        with pytest.raises(InferenceError, match="the last argument must be a correction"):
            repair.apply(*forgotten)


def two_inputs(tree, x, y):
    return jnp.tanh(x @ tree["w"] + y @ tree["u"]) @ tree["v"]


def test_batches_and_several_inputs():
    """Labels are ignored; several inputs are handed over one by one."""
    repaired = build_repair(SPEC, A, B, network, X, batch_size=15).prepare(A, 0.5)
    for data in (Batch(X), Batch(X, np.full(40, np.nan)), (X,)):
        again = build_repair(SPEC, A, B, network, data, batch_size=15).prepare(A, 0.5)
        jax.tree.map(np.testing.assert_array_equal, again, repaired)

    y = normal(40, 2, seed=8)
    a, b = ({"w": normal(4, 6, seed=s), "u": normal(2, 6, seed=s + 1), "v": normal(6, 3)} for s in (0, 5))
    spec = rebasin.infer_spec(two_inputs, a, X, y)
    repair = build_repair(spec, a, b, two_inputs, Batch((X, y), np.arange(40)))
    mixed = rebasin.interpolate(a, b, 0.5)
    outputs = repair.apply(mixed, X[:5], y[:5], repair.prepare(mixed, 0.5))
    assert repair.layers == ("w", "u")

    # Each of the two products is a layer; their means and deviations are between those of the endpoints.
    expected = np.zeros((5, 6))
    for name, x in (("w", X), ("u", y)):
        of_a, of_b, own = (np.asarray(x @ tree[name], np.float64) for tree in (a, b, mixed))
        scale = (of_a.std(0) + of_b.std(0)) / 2 / own.std(0)
        expected += (own[:5] - own.mean(0)) * scale + (of_a.mean(0) + of_b.mean(0)) / 2
    np.testing.assert_allclose(outputs, np.tanh(expected) @ np.asarray(mixed["v"]), rtol=1e-3, atol=1e-4)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (8, 6):
            x = nn.Dense(width)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(2)(x)


def update(tree, batch):
    return tree | Normed().apply(tree, batch, train=True, mutable=["batch_stats"])[1]


def test_repair_of_batch_norm_holds_whatever_the_running_statistics_are():
    a, b = (
        jax.tree.map(lambda x, seed=seed: jnp.abs(normal(*x.shape, seed=seed)) + 0.5, tree)
        for seed, tree in enumerate([Normed().init(jax.random.key(0), X)] * 2)
    )
    spec = rebasin.infer_spec(Normed().apply, a, X)
    repair = build_repair(spec, a, b, Normed().apply, X)
    prepare, apply = jax.jit(repair.prepare), jax.jit(repair.apply)
    for tree, alpha in ((a, 1.0), (b, 0.0)):
        repaired = apply(tree, X, prepare(tree, alpha))
        np.testing.assert_allclose(repaired, Normed().apply(tree, X), rtol=1e-4, atol=1e-4)

    mixed = rebasin.interpolate(a, b, 0.5)
    other = mixed | {"batch_stats": b["batch_stats"]}
    outputs = [apply(tree, X, prepare(tree, 0.5)) for tree in (mixed, other)]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)

    def first_norm(tree):
        _, state = Normed().apply(tree, X, capture_intermediates=True, mutable=["intermediates"])
        return np.asarray(state["intermediates"]["BatchNorm_0"]["__call__"][0], np.float64)

    scale, shift = (np.asarray(x) for x in prepare(mixed, 0.5)[0])
    y, ends = first_norm(mixed) * scale + shift, [first_norm(tree) for tree in (a, b)]
    np.testing.assert_allclose(y.mean(0), np.mean([z.mean(0) for z in ends], 0), rtol=1e-4)
    np.testing.assert_allclose(y.std(0), np.mean([z.std(0) for z in ends], 0), rtol=1e-4)


def test_norm_statistics_are_those_of_the_data():
    tree = Normed().init(jax.random.key(0), X)
    for batch_size in (8, 40):
        new = jax.jit(build_norm_reset(tree, update, X, batch_size=batch_size))(tree)
        y = np.asarray(X @ tree["params"]["Dense_0"]["kernel"] + tree["params"]["Dense_0"]["bias"][None])
        first = new["batch_stats"]["BatchNorm_0"]
        np.testing.assert_allclose(first["mean"], y.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(first["var"], y.var(0), rtol=1e-3)
        assert new["params"] is not None
        np.testing.assert_array_equal(new["params"]["Dense_1"]["kernel"], tree["params"]["Dense_1"]["kernel"])
    # All data in one batch: evaluation is what training mode would compute.
    trained = Normed().apply(tree, X, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(Normed().apply(new, X), trained, rtol=1e-3, atol=1e-3)


def test_norm_reset_fits_a_sweep_and_restores_the_variance():
    a, b = (Normed().init(jax.random.key(seed), X) for seed in (0, 1))
    reset = build_norm_reset(a, update, X)
    a, b = reset(a), reset(b)

    def metrics(params, batch, new=None):
        return {"loss": Normed().apply(params if new is None else new, batch)[:, 0]}

    plain = build_sweep(metrics, num_alphas=3)(a, b, X)
    repaired = build_sweep(metrics, num_alphas=3, prepare=reset)(a, b, X)
    np.testing.assert_allclose(repaired.examples["loss"][[0, 2]], plain.examples["loss"][[0, 2]], atol=1e-3)
    assert repaired.examples["loss"][1].std() > plain.examples["loss"][1].std()


def test_norm_reset_takes_batches_and_several_inputs():
    tree = Normed().init(jax.random.key(0), X)
    alone = build_norm_reset(tree, update, X, batch_size=8)(tree)
    jax.tree.map(
        np.testing.assert_array_equal,
        build_norm_reset(tree, update, Batch(X, np.arange(40)), batch_size=8)(tree),
        alone,
    )
    parts = X[:, :1], X[:, 1:]

    def update_parts(tree, x, y):
        return update(tree, jnp.concatenate([x, y], 1))

    both = build_norm_reset(tree, update_parts, parts, batch_size=8)(tree)
    jax.tree.map(np.testing.assert_array_equal, both, alone)
    with pytest.raises(DataError, match="labels: 39 examples"):
        build_norm_reset(tree, update, Batch(X, np.arange(39)))


def test_norm_reset_refuses_another_tree():
    with pytest.raises(TreeMismatchError, match="what update_fn returns"):
        build_norm_reset(Normed().init(jax.random.key(0), X), lambda tree, batch: tree["params"], X)


def test_leaf_that_is_not_updated_stays():
    tree = {"w": jnp.ones(2), "batch_stats": {"mean": jnp.full(2, 5.0), "kept": jnp.full(2, 3.0)}}

    def partial_update(tree, batch):
        stats = tree["batch_stats"]
        return tree | {"batch_stats": stats | {"mean": 0.5 * stats["mean"] + 0.5 * batch.mean(0)}}

    new = build_norm_reset(tree, partial_update, jnp.array([[2.0, 4.0], [4.0, 8.0]]), batch_size=1)(tree)
    np.testing.assert_allclose(new["batch_stats"]["mean"], [3, 6])
    np.testing.assert_array_equal(new["batch_stats"]["kept"], [3, 3])
