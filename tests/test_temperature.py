"""The temperature of networks on a path: its fit, against a search, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import rebasin
from rebasin import Batch, build_sweep, build_temperature
from rebasin.errors import DataError

KEYS = jax.random.split(jax.random.key(0), 5)
DATA = Batch(jax.random.normal(KEYS[0], (50, 4)), jax.random.randint(KEYS[1], (50,), 0, 3))
A, B = ({"w": 3 * jax.random.normal(key, (4, 3))} for key in KEYS[2:4])


def apply(params, x):
    return x @ params["w"]


def loss(params, data, beta=1.0):
    logits = beta * np.asarray(apply(params, data.inputs), np.float64)
    chosen = logits[np.arange(len(logits)), np.asarray(data.labels)]
    return np.log(np.exp(logits).sum(axis=1)) - chosen


@pytest.mark.parametrize("batch_size", [7, 500])
def test_the_fit_minimises_loss_and_prior(batch_size):
    temperature = build_temperature(apply, DATA, batch_size=batch_size)
    for alpha in (0.25, 0.5):
        middle = rebasin.interpolate(A, B, alpha)
        found = minimize_scalar(
            lambda t, middle=middle: loss(middle, DATA, np.exp(t)).sum() + t**2 / 2,
            bounds=(-4, 4),
            method="bounded",
            options={"xatol": 1e-9},
        )
        fitted = jax.jit(temperature.prepare)(middle, alpha)
        assert float(fitted) == pytest.approx(np.exp(-found.x), rel=1e-3)
        assert abs(found.x) > 0.1


def test_one_sweep_has_both_losses_and_keeps_its_ends():
    traces = []
    temperature = build_temperature(lambda *arguments: traces.append(None) or apply(*arguments), DATA)
    sweep = build_sweep(temperature.metrics_fn, num_alphas=5, prepare=temperature.prepare)
    curve, before = sweep(A, B, DATA), len(traces)
    sweep(B, A, DATA)
    assert len(traces) == before > 0  # the same program
    plain = rebasin.sweep(A, B, DATA, rebasin.classification_metrics(apply), num_alphas=5)
    for metric in ("loss", "error"):
        np.testing.assert_allclose(curve.examples[metric], plain.examples[metric], rtol=1e-5, atol=1e-5)
    tempered = curve.means["tempered_loss"]
    np.testing.assert_array_equal(tempered[[0, -1]], curve.loss[[0, -1]])
    assert (tempered[1:-1] < curve.loss[1:-1]).all()
    for i, alpha in enumerate(curve.alphas[1:-1], 1):
        middle = rebasin.interpolate(A, B, alpha)
        beta = 1 / float(temperature.prepare(middle, alpha))
        assert tempered[i] == pytest.approx(loss(middle, DATA, beta).mean(), rel=1e-4)


def test_the_applied_temperature_is_that_of_the_metrics():
    temperature = build_temperature(apply, DATA)
    metrics_fn = rebasin.classification_metrics(temperature.apply)
    found = metrics_fn(A, DATA, jnp.float32(2.0))
    both = temperature.metrics_fn(A, DATA, jnp.float32(2.0))
    np.testing.assert_array_equal(found["loss"], both["tempered_loss"])
    np.testing.assert_array_equal(found["error"], both["error"])


def test_temperatures_stay_finite_where_all_examples_are_right():
    data = Batch(10 * jnp.eye(3), jnp.arange(3))
    params = {"w": jnp.eye(3)}
    fitted = float(build_temperature(apply, data).prepare(params, 0.5))
    # Without the prior the best temperature is 0; without data that speak for it, it is 1.
    assert 0.5 < fitted < 1


def test_on_a_simplex_the_corners_keep_their_temperature():
    temperature = build_temperature(apply, DATA)
    sweep = rebasin.build_simplex_sweep(temperature.metrics_fn, resolution=2, prepare=temperature.prepare)
    surface = sweep([A, B, {"w": A["w"] - B["w"]}], DATA)
    same = surface.means["tempered_loss"] == surface.means["loss"]
    assert same.tolist() == [True] * 3 + [False] * (len(same) - 3)


def test_labels_are_checked():
    with pytest.raises(DataError, match=r"integer labels of shape \[n\], got Batch"):
        build_temperature(apply, Batch(DATA.inputs))
    with pytest.raises(DataError, match=r"got float32 \(50,\)"):
        build_temperature(apply, Batch(DATA.inputs, jnp.ones(50)))
