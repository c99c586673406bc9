import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rebasin
from rebasin import build_sweep
from rebasin.barrier import Barrier, BarrierCurve
from rebasin.errors import ConfigError, DataError, NonFiniteError, TreeMismatchError


def quadratic(params, batch):
    """Loss (w − x)² of each example x, and whether w is above it."""
    loss = (params["w"] - batch["x"]) ** 2
    return {"loss": loss, "error": (params["w"] > batch["x"]).astype(jnp.float32)}


def scalar(value):
    return {"w": jnp.asarray(value, jnp.float32)}


@settings(max_examples=15)  # each shape compiles
@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(2, 9), st.integers(1, 12), st.integers(0, 1000))
def test_curve_is_plain_evaluation_at_each_point(a, b, num_alphas, batch_size, seed):
    x = np.random.default_rng(seed).normal(size=7).astype(np.float32)
    curve = rebasin.sweep(
        scalar(a), scalar(b), {"x": x}, quadratic, num_alphas=num_alphas, batch_size=batch_size
    )
    w = curve.alphas * np.float32(a) + (1 - curve.alphas) * np.float32(b)
    assert curve.examples["loss"].shape == (num_alphas, 7)
    # One multiplication and one addition in float32 on values of at most 36.
    np.testing.assert_allclose(curve.loss, ((w[:, None] - x) ** 2).mean(axis=1), rtol=1e-5, atol=1e-5)


def test_barrier_of_a_parabola_in_closed_form():
    """On −w² between 1 and −1 the chord is −1 and the barrier 1, at the middle."""
    curve = rebasin.sweep(
        scalar(1), scalar(-1), {"x": np.zeros(5)}, lambda p, batch: {"loss": 0 * batch["x"] - p["w"] ** 2}
    )
    assert curve.loss_barrier == Barrier(1.0, 0.0, 0.5)
    np.testing.assert_allclose(curve.loss, -((2 * curve.alphas - 1) ** 2), atol=1e-6)


def test_conventions_differ_where_the_ends_do():
    """Ends 4 (A) and 0 (B), middle 5, maximum 5.5: the chord's middle and the ends' mean are both 2."""
    values = np.array([[0.0], [5.0], [5.0], [5.5], [4.0]])
    curve = BarrierCurve(np.linspace(0, 1, 5), {"loss": values})
    assert curve.barrier("loss").value == 4.0
    assert curve.barrier("loss").alpha == 0.25
    assert curve.barrier("loss", convention="midpoint").value == 3.0
    assert curve.barrier("loss", convention="endpoint_mean").value == 3.5


@given(st.integers(0, 10**6))
def test_the_barrier_is_never_negative_and_mirrors(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(6, 3))
    curve = BarrierCurve(np.linspace(0, 1, 6), {"loss": values})
    mirrored = BarrierCurve(np.linspace(0, 1, 6), {"loss": values[::-1]})
    assert curve.loss_barrier.value >= 0
    np.testing.assert_allclose(curve.loss_barrier.value, mirrored.loss_barrier.value, atol=1e-12)
    if curve.loss_barrier.value > 0:  # a barrier of 0 stands at either end
        np.testing.assert_allclose(curve.loss_barrier.alpha, 1 - mirrored.loss_barrier.alpha, atol=1e-12)


def test_standard_error_is_paired():
    """Every example rises by exactly 1 at the middle: no spread, although the losses spread widely."""
    ends = np.array([0.0, 10.0, 20.0])
    curve = BarrierCurve(np.linspace(0, 1, 3), {"loss": np.stack([ends, ends + 1, ends])})
    assert curve.loss_barrier == Barrier(1.0, 0.0, 0.5)
    np.testing.assert_allclose(curve.standard_errors["loss"], 10 / np.sqrt(3))
    uneven = BarrierCurve(np.linspace(0, 1, 3), {"loss": np.stack([ends, ends + [0, 1, 2], ends])})
    np.testing.assert_allclose(uneven.loss_barrier.standard_error, 1 / np.sqrt(3))


def test_means_are_taken_in_float64():
    """2²⁴ + 1 is 2²⁴ in float32, so a mean in float32 would lose the three small losses."""
    middle = np.array([2**24, 1, 1, 1], np.float32)
    ends = np.zeros_like(middle)
    curve = BarrierCurve(np.linspace(0, 1, 3), {"loss": np.stack([ends, middle, ends])})
    assert curve.loss.dtype == np.float64
    assert curve.loss.tolist() == [0.0, (2**24 + 3) / 4, 0.0]
    for convention in ("chord", "endpoint_mean", "midpoint"):
        assert curve.barrier("loss", convention=convention).value == (2**24 + 3) / 4


def test_one_trace_for_a_shape_whatever_the_networks():
    traces = []

    def metrics(params, batch):
        traces.append(None)
        return quadratic(params, batch)

    measure = rebasin.build_sweep(metrics, num_alphas=5, batch_size=4)
    for a, b in ((1, 2), (3, -1), (0, 0)):
        measure(scalar(a), scalar(b), {"x": jnp.arange(10.0) * a})
    assert len(traces) == 1
    assert measure(scalar(2), scalar(2), {"x": jnp.zeros(10)}).error_barrier.value == 0


def test_ends_are_the_networks_to_the_last_bit():
    key = jax.random.key(0)
    a, b = ({"w": jax.random.normal(k, (50,))} for k in jax.random.split(key))
    curve = rebasin.sweep(a, b, jnp.ones((3, 50)), lambda p, batch: {"loss": batch @ p["w"]}, num_alphas=25)
    plain = [jax.jit(lambda p: jnp.ones((3, 50)) @ p["w"])(p) for p in (b, a)]
    np.testing.assert_allclose(curve.examples["loss"][[0, -1]], plain, rtol=1e-6)


def test_prepare_sees_each_interpolated_network_and_its_alpha():
    curve = rebasin.sweep(
        scalar(3),
        scalar(1),
        jnp.zeros(2),
        lambda p, batch, extra: {"loss": batch + extra},
        num_alphas=3,
        prepare=lambda p, alpha: 10 * p["w"] + alpha,
    )
    assert curve.loss.tolist() == [10.0, 20.5, 31.0]


def test_bad_input_is_refused_before_anything_runs():
    def never(params, batch):
        raise AssertionError("evaluated")

    for count in (1, 0):
        with pytest.raises(ConfigError, match=f"num_alphas must be at least 2, got {count}"):
            rebasin.build_sweep(never, num_alphas=count)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        rebasin.build_sweep(never, batch_size=0)
    measure = rebasin.build_sweep(never)
    with pytest.raises(DataError, match="data hold no examples: at least one is needed"):
        measure(scalar(1), scalar(2), {"x": np.zeros((0, 3))})
    with pytest.raises(DataError) as info:
        measure(scalar(1), scalar(2), {"x": np.zeros((4, 3)), "y": np.zeros(5), "z": np.zeros(())})
    assert str(info.value).splitlines() == [
        "data must be arrays [n, …] with one common n:",
        "  x: 4 examples",
        "  y: 5 examples",
        "  z: scalar",
    ]
    with pytest.raises(TreeMismatchError, match=r"w: shape \(\) in params_a, \(2,\) in params_b"):
        measure(scalar(1), {"w": jnp.ones(2)}, {"x": np.zeros(3)})
    with pytest.raises(NonFiniteError, match="params_b is not finite"):
        measure(scalar(1), scalar(np.nan), {"x": np.zeros(3)})
    curve = BarrierCurve(np.linspace(0, 1, 4), {"loss": np.zeros((4, 2))})
    with pytest.raises(ConfigError, match="the midpoint needs an odd number of alphas, got 4"):
        curve.barrier("loss", convention="midpoint")
    with pytest.raises(ConfigError, match=r"no metric 'accuracy' in this curve; it has \['loss'\]"):
        curve.barrier("accuracy")
    with pytest.raises(ConfigError, match="unknown convention 'mean'"):
        curve.barrier("loss", convention="mean")


def test_shared_ends_are_taken_and_only_what_lies_between_is_evaluated():
    evaluated = []

    def metrics(params, batch):
        jax.debug.callback(lambda w: evaluated.append(float(w)), params["w"])
        return quadratic(params, batch)

    data = {"x": jnp.arange(4.0)}
    measure = rebasin.build_sweep(metrics, num_alphas=5)
    full = measure(scalar(4), scalar(0), data)
    jax.effects_barrier()
    evaluated.clear()
    marked = full._replace(examples={name: values + 100 for name, values in full.examples.items()})
    shared = measure(scalar(4), scalar(0), data, ends=marked)
    jax.effects_barrier()
    assert sorted(evaluated) == [1.0, 2.0, 3.0]
    for name, values in full.examples.items():
        np.testing.assert_array_equal(shared.examples[name][1:-1], values[1:-1])
        np.testing.assert_array_equal(shared.examples[name][[0, -1]], values[[0, -1]] + 100)
    with pytest.raises(ConfigError, match=r"ends: wanted metrics and numbers of examples .*: 3.*, got .*: 4"):
        measure(scalar(4), scalar(0), {"x": jnp.arange(3.0)}, ends=full)
    assert measure(scalar(4), scalar(0), data, ends=full).alphas.tolist() == full.alphas.tolist()


def linear(params, x):
    return x @ params["w"]


def classify(apply_fn, params, batch, *extra):
    return jax.jit(rebasin.classification_metrics(apply_fn))(params, batch, *extra)


def test_classification_metrics_are_cross_entropy_and_error():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(20, 3)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    labels = rng.integers(4, size=20)
    metrics = classify(linear, {"w": w}, rebasin.Batch(x, labels))
    logits = x.astype(np.float64) @ w
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # Logits of at most 10 in float32.
    np.testing.assert_allclose(metrics["loss"], -np.log(probabilities[range(20), labels]), atol=1e-5)
    np.testing.assert_array_equal(metrics["error"], (logits.argmax(axis=1) != labels).astype(float))
    assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}


def test_classification_metrics_are_stable():
    """Exponentials of these logits overflow, and those of their negatives vanish."""
    logits = jnp.array([[1e4, 0.0], [-1e4, 0.0], [3e38, 3e38]])
    batch = rebasin.Batch(logits, jnp.array([1, 0, 0]))
    metrics = classify(lambda params, x: x, {}, batch)
    np.testing.assert_allclose(metrics["loss"], [1e4, 1e4, 0.0], rtol=1e-6)
    gradient = jax.grad(lambda x: classify(lambda p, x: x, {}, batch._replace(inputs=x))["loss"].sum())(
        logits
    )
    np.testing.assert_allclose(gradient, [[1, -1], [-1, 1], [-0.5, 0.5]], atol=1e-6)
    half = classify(
        lambda params, x: x.astype(jnp.bfloat16), {}, rebasin.Batch(jnp.ones((1, 3)), jnp.array([0]))
    )
    np.testing.assert_allclose(half["loss"], np.log(3), rtol=1e-6)


def test_classification_metrics_pass_every_input_and_what_prepare_returns():
    def apply_fn(params, x, y, scale):
        return scale * (x + y) * params["w"]

    x, y, labels = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]]), jnp.array([0])
    metrics_fn = rebasin.classification_metrics(apply_fn)
    metrics = metrics_fn(scalar(1), rebasin.Batch((x, y), labels), 3.0)
    assert metrics["error"].tolist() == [1.0]
    np.testing.assert_allclose(metrics["loss"], np.log(1 + np.exp(3.0)), rtol=1e-6)
    curve = rebasin.sweep(
        scalar(1), scalar(0), rebasin.Batch((x, y), labels), metrics_fn, num_alphas=3, prepare=lambda p, a: a
    )
    np.testing.assert_allclose(curve.loss, np.log(1 + np.exp([0, 0.25, 1])), rtol=1e-6)


def test_classification_metrics_of_a_sweep_do_not_depend_on_batches():
    rng = np.random.default_rng(0)
    a, b = ({"w": rng.normal(size=(3, 4)).astype(np.float32)} for _ in range(2))
    data = rebasin.Batch(rng.normal(size=(7, 3)).astype(np.float32), rng.integers(4, size=7))
    metrics_fn = rebasin.classification_metrics(linear)
    whole, cut = (rebasin.sweep(a, b, data, metrics_fn, num_alphas=3, batch_size=size) for size in (7, 3))
    for name in ("loss", "error"):
        assert whole.examples[name].shape == (3, 7)
        np.testing.assert_allclose(cut.examples[name], whole.examples[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (jnp.ones((2, 3)), r"need labels: wanted Batch\(inputs, labels\), got a \w*Tracer"),
        ((jnp.ones((2, 3)), jnp.arange(2)), r"need labels: wanted Batch\(inputs, labels\), got a tuple"),
        (rebasin.Batch(jnp.ones((2, 3))), "need labels: .* got a Batch without labels"),
        (rebasin.Batch(jnp.ones((2, 3)), jnp.ones(2)), r"integer labels of shape \[n\], got a float32 array"),
        (rebasin.Batch(jnp.ones((2, 3)), jnp.eye(2, 4, dtype=int)), r"got a int32 array of shape \(2, 4\)"),
        (
            rebasin.Batch(jnp.ones((3, 3)), jnp.arange(2)),
            r"a floating array of shape \(2, classes\) for a batch of 2; "
            r"apply_fn returned a float32 array of shape \(3, 4\)",
        ),
    ],
)
def test_batches_without_proper_labels_are_refused_while_tracing(batch, message):
    with pytest.raises(DataError, match=message):
        jax.eval_shape(rebasin.classification_metrics(linear), {"w": jnp.ones((3, 4))}, batch)


@pytest.mark.parametrize(
    ("apply_fn", "message"),
    [
        (lambda params, x: x[:, 0], r"float32 array of shape \(2,\)"),
        (lambda params, x: x[:, None], r"float32 array of shape \(2, 1, 3\)"),
        (lambda params, x: x.argmax(axis=1, keepdims=True), r"int32 array of shape \(2, 1\)"),
        (lambda params, x: (x, {}), "apply_fn returned a tuple"),
    ],
)
def test_networks_that_are_no_classifiers_are_refused_while_tracing(apply_fn, message):
    batch = rebasin.Batch(jnp.ones((2, 3)), jnp.arange(2))
    with pytest.raises(DataError, match=rf"need logits of shape \[n, classes\].* .*{message}"):
        jax.eval_shape(rebasin.classification_metrics(apply_fn), {}, batch)


@pytest.mark.parametrize(
    ("metrics_fn", "problem"),
    [
        (lambda p, x: {"loss": jnp.mean(p["w"] * x)}, "'loss' has shape ()"),
        (lambda p, x: {"loss": jnp.stack([p["w"] * x] * 3, axis=1)}, "'loss' has shape (4, 3)"),
        (lambda p, x: {"loss": p["w"] * x, "error": x[:1]}, "'error' has shape (1,)"),
    ],
)
def test_metrics_of_another_shape_than_one_value_an_example_are_refused(metrics_fn, problem):
    """A mean over each batch gave 3.75 here in place of 4.5: the last batch is filled up with copies."""
    a, b = {"w": jnp.ones(())}, {"w": jnp.zeros(())}
    with pytest.raises(DataError) as info:
        build_sweep(metrics_fn, num_alphas=3, batch_size=4)(a, b, jnp.arange(10.0))
    lines = str(info.value).splitlines()
    assert lines[0] == "metrics_fn must return one value for each of 4 examples:"
    assert lines[1].strip() == problem


def test_metrics_that_are_no_dictionary_are_refused():
    a = {"w": jnp.ones(())}
    with pytest.raises(DataError, match=r"must return a dictionary of arrays \[n\], got "):
        build_sweep(lambda p, x: p["w"] * x, num_alphas=3)(a, a, jnp.arange(10.0))


def test_a_barrier_that_is_not_a_number_says_where():
    values = np.array([[1.0, 2.0], [np.nan, 1.0], [1.0, np.inf]])
    curve = BarrierCurve(np.array([0.0, 0.5, 1.0]), {"loss": values})
    with pytest.raises(NonFiniteError) as info:
        curve.barrier("loss")
    assert str(info.value) == "'loss' is not finite at alpha 0.5, 1: there is no barrier to tell"
