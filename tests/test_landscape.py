import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin.errors import ConfigError, DataError, NonFiniteError, TreeMismatchError
from rebasin.landscape import SimplexSurface, simplex_grid


def metrics_fn(params, batch):
    error = (params["w"][None] - batch) ** 2
    return {"loss": error.sum(axis=1), "error": (error.max(axis=1) > 1).astype(jnp.float32)}


def draw(count, n=7):
    rng = np.random.default_rng(0)
    trees = [{"w": jnp.asarray(rng.normal(size=3), jnp.float32)} for _ in range(count)]
    return trees, jnp.asarray(rng.normal(size=(n, 3)), jnp.float32)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("resolution", [1, 3, 4])
def test_the_grid_is_every_composition(count, resolution):
    grid = simplex_grid(count, resolution)
    np.testing.assert_array_equal(grid[:count], np.eye(count))
    np.testing.assert_allclose(grid[-1], 1 / count)
    compositions = {
        tuple(np.array(c) / resolution)
        for c in itertools.product(range(resolution + 1), repeat=count)
        if sum(c) == resolution
    }
    assert {tuple(row) for row in grid} == compositions | {tuple(grid[-1])}
    assert len({tuple(row) for row in grid}) == len(grid)


@pytest.mark.parametrize("batch_size", [3, 7, 500])
def test_every_point_is_the_average_evaluated(batch_size):
    trees, data = draw(3)
    surface = rebasin.build_simplex_sweep(metrics_fn, resolution=3, batch_size=batch_size)(trees, data)
    for i, weights in enumerate(surface.weights):
        expected = metrics_fn(rebasin.average(trees, weights), data)
        for name, values in expected.items():
            np.testing.assert_allclose(surface.examples[name][i], values, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(surface.means["loss"], surface.examples["loss"].mean(axis=1), rtol=1e-6)


def test_barriers_by_hand():
    """w ↦ 4w(1 − w) on the line between 0 and 1, and its mirror image downwards for every other example."""
    trees = [{"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}]

    def bump(params, batch):
        return {"loss": batch * 4 * params["w"] * (1 - params["w"]) + params["w"]}

    measure = rebasin.build_simplex_sweep(bump, resolution=4)
    up = measure(trees, jnp.array([1.0, 3.0]))
    assert up.barrier("loss").value == pytest.approx(2.0)
    assert up.barrier("loss").standard_error == pytest.approx(1.0)
    assert up.barrier("loss").weights.tolist() == [0.5, 0.5]
    assert up.average_barrier("loss").value == pytest.approx(2.0)
    down = measure(trees, jnp.array([-1.0, -3.0]))
    assert down.barrier("loss").value == 0.0
    assert down.average_barrier("loss").value == pytest.approx(-2.0)
    assert np.isnan(measure(trees, jnp.array([1.0])).barrier("loss").standard_error)


def test_means_are_taken_in_float64():
    """2²⁴ + 1 is 2²⁴ in float32."""
    losses = np.array([[2**24, 1, 1, 1]], np.float32)
    surface = SimplexSurface(np.array([[1.0]]), {"loss": losses})
    assert surface.means["loss"].tolist() == [(2**24 + 3) / 4]


def test_an_edge_is_the_barrier_of_two():
    trees, data = draw(2)
    surface = rebasin.build_simplex_sweep(metrics_fn, resolution=8)(trees, data)
    curve = rebasin.sweep(*trees, data, metrics_fn, num_alphas=9)
    for metric in ("loss", "error"):
        assert surface.barrier(metric).value == pytest.approx(curve.barrier(metric).value, abs=1e-6)


def test_prepare_sees_the_average_and_its_weights():
    trees, data = draw(2)
    measure = rebasin.build_simplex_sweep(
        lambda params, batch, extra: {"loss": jnp.full(len(batch), extra)},
        resolution=2,
        prepare=lambda params, weights: weights[0] * 10 + params["w"][0],
    )
    surface = measure(trees, data)
    expected = [10 * w[0] + w @ [tree["w"][0] for tree in trees] for w in surface.weights]
    np.testing.assert_allclose(surface.means["loss"], expected, rtol=1e-5)


def test_one_program_for_equal_shapes():
    trees, data = draw(3)
    measure = rebasin.build_simplex_sweep(chex.assert_max_traces(n=1)(metrics_fn), resolution=2)
    measure(trees, data)
    measure(trees[::-1], data + 1)


def test_what_cannot_work_is_refused():
    trees, data = draw(2)
    measure = rebasin.build_simplex_sweep(metrics_fn)
    with pytest.raises(ConfigError, match="num_networks must be at least 2, got 1"):
        measure(trees[:1], data)
    with pytest.raises(ConfigError, match="resolution must be at least 1, got 0"):
        rebasin.build_simplex_sweep(metrics_fn, resolution=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        rebasin.build_simplex_sweep(metrics_fn, batch_size=0)
    with pytest.raises(TreeMismatchError, match=r"w: shape \(3,\) in network 0, \(2,\) in network 1"):
        measure([trees[0], {"w": jnp.ones(2)}], data)
    with pytest.raises(NonFiniteError, match="network 1 is not finite"):
        measure([trees[0], {"w": jnp.full(3, jnp.nan)}], data)
    with pytest.raises(DataError, match="data hold no examples: at least one is needed"):
        measure(trees, data[:0])
    with pytest.raises(
        ConfigError, match=r"no metric 'accuracy' on this surface; it has \['error', 'loss'\]"
    ):
        measure(trees, data).barrier("accuracy")
