"""Effective dimensions by their spectra, of matrices and of whole networks."""

import jax
import numpy as np
import pytest

import rebasin
from rebasin.dimensions import effective_dimension, effective_dimensions, network_dimensions
from rebasin.errors import RebasinError


def test_effective_dimensions_follow_the_spectrum_of_each_matrix():
    rng = np.random.default_rng(4)
    w, x, y = rng.normal(size=(5, 7)), rng.normal(size=(90, 7)), rng.normal(size=(90, 5))

    def by_spectrum(matrix):
        values = np.linalg.eigvalsh(matrix)
        return values.sum() ** 2 / (values**2).sum()

    assert tuple(effective_dimensions(w, x, y)) == pytest.approx(
        (by_spectrum(w.T @ w), by_spectrum(w @ (x.T @ x / 90) @ w.T), by_spectrum(y.T @ y))
    )
    assert effective_dimension(np.eye(6)) == pytest.approx(6)
    assert effective_dimension(np.outer(w[0], w[0])) == pytest.approx(1)


def test_dimensions_of_a_network_are_those_of_its_layers():
    rng = np.random.default_rng(0)
    params = {
        f"w{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate([(6, 5), (5, 7), (7, 3)])
    }
    x = rng.normal(size=(23, 6)).astype(np.float32)

    def apply(tree, x):
        return jax.nn.relu(jax.nn.relu(x @ tree["w0"]) @ tree["w1"]) @ tree["w2"]

    found = network_dimensions(rebasin.infer_spec(apply, params, x), params, apply, x, batch_size=10)
    assert list(found) == ["w0", "w1"]  # the output layer is not matched
    hidden = np.maximum(x @ params["w0"], 0)
    last = np.maximum(hidden @ params["w1"], 0)
    for name, entering, leaving in (("w0", x, hidden), ("w1", hidden, last)):
        assert tuple(found[name]) == pytest.approx(
            tuple(effective_dimensions(params[name].T, entering, leaving)), rel=1e-4
        )


def test_dimensions_of_a_convolution_are_those_of_its_patches():
    rng = np.random.default_rng(1)
    params = {"k": rng.normal(size=(3, 3, 2, 4)).astype(np.float32), "v": np.ones((4, 1), np.float32)}
    images = rng.normal(size=(5, 6, 6, 2)).astype(np.float32)

    def apply(tree, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, tree["k"], (1, 1), "SAME", dimension_numbers=dimensions)
        return jax.nn.relu(y).mean((1, 2)) @ tree["v"]

    spec = rebasin.infer_spec(apply, params, images)
    (found,) = network_dimensions(spec, params, apply, images).values()
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 18)
    neurons = params["k"].reshape(18, 4).T
    by_hand = effective_dimensions(neurons, patches, np.maximum(patches @ neurons.T, 0))
    assert tuple(found) == pytest.approx(tuple(by_hand), rel=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: effective_dimension(np.zeros((2, 2))),
            RebasinError,
            "moment: wanted a matrix that is not zero, got zeros alone",
        ),
        (
            lambda: effective_dimensions(np.ones((2, 3)), np.ones((5, 3)), np.ones((5, 3))),
            RebasinError,
            "wanted entering [examples, 3] and activations [examples, 2] for neurons [2, 3], "
            "got [5, 3] and [5, 3]",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error) as info:
        call()
    assert str(info.value) == message
