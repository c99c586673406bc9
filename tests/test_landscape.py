import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin.arithmetic import distance
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


def draw_plane(n=7):
    """Three networks with a counter each, the plane through them, and data."""
    rng = np.random.default_rng(1)
    trees = {
        name: {"w": jnp.asarray(rng.normal(size=3), jnp.float32), "step": jnp.array(i)}
        for i, name in enumerate("abc")
    }
    return rebasin.build_plane(trees), jnp.asarray(rng.normal(size=(n, 3)), jnp.float32)


def test_the_basis_is_orthonormal_and_distances_are_true():
    plane, _ = draw_plane()
    first, second = (np.concatenate([leaf.ravel() for leaf in axis.values()]) for axis in plane.basis)
    np.testing.assert_allclose([first @ first, second @ second, first @ second], [1, 1, 0], atol=1e-12)
    assert plane.coordinates[0].tolist() == [0, 0]
    assert plane.coordinates[1, 1] == 0
    assert (plane.coordinates[[1, 2], [0, 1]] > 0).all()
    trees = list(plane.anchors.values())
    for i, j in itertools.combinations(range(3), 2):
        apart = np.linalg.norm(plane.coordinates[i] - plane.coordinates[j])
        assert apart == pytest.approx(distance(trees[i], trees[j]), rel=1e-6)
    # The axes are those of the coordinates: the origin plus coordinates times basis is the anchor.
    for tree, (x, y) in zip(trees, plane.coordinates, strict=True):
        np.testing.assert_allclose(trees[0]["w"] + x * first + y * second, tree["w"], atol=1e-6)


def test_the_grid_is_plain_evaluation():
    plane, data = draw_plane()
    x, y = plane.grid(4)
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    surface = rebasin.build_plane_sweep(metrics_fn, batch_size=3)(plane, grid, data)
    assert surface.means["loss"].shape == (4, 4)
    first, second = (axis["w"] for axis in plane.basis)
    for i, j in itertools.product(range(4), repeat=2):
        params = {"w": plane.anchors["a"]["w"] + x[j] * first + y[i] * second}
        expected = metrics_fn({"w": jnp.asarray(params["w"], jnp.float32)}, data)
        np.testing.assert_allclose(surface.examples["loss"][i, j], expected["loss"], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(surface.examples["error"][i, j], expected["error"])


def test_the_anchors_are_exactly_the_networks():
    plane, data = draw_plane()
    np.testing.assert_array_equal(plane.shares(plane.coordinates), np.eye(3))

    def seen(params, batch):  # a counter is no weight, and is that of the nearest network
        return metrics_fn(params, batch) | {"step": jnp.full(len(batch), params["step"])}

    surface = rebasin.build_plane_sweep(seen)(plane, plane.coordinates, data)
    for i, tree in enumerate(plane.anchors.values()):
        for name, values in seen(tree, data).items():
            np.testing.assert_allclose(surface.examples[name][i], values, rtol=1e-6)


def test_projection_is_the_nearest_point():
    plane, _ = draw_plane()
    for i, tree in enumerate(plane.anchors.values()):
        coordinates, off = plane.project(tree)
        np.testing.assert_allclose(coordinates, plane.coordinates[i], atol=1e-6)
        assert off == pytest.approx(0, abs=1e-6)
    first, second = (axis["w"] for axis in plane.basis)
    normal = np.cross(first, second)
    away = {"w": jnp.asarray(plane.anchors["a"]["w"] + 2 * first - 3 * second + 5 * normal, jnp.float32)}
    coordinates, off = plane.project(away | {"step": jnp.array(9)})
    np.testing.assert_allclose(coordinates, [2, -3], atol=1e-5)
    assert off == pytest.approx(5, rel=1e-5)


def test_the_grid_holds_anchors_and_further_points():
    plane, _ = draw_plane()
    x, y = plane.grid(5, margin=0.25, around=[[-40.0, 1.0], [2.0, 9.0]])
    width = max(plane.coordinates[:, 0].max(), 2.0) + 40
    assert x[0] == pytest.approx(-40 - 0.25 * width)
    assert y[-1] == pytest.approx(9 + 0.25 * width)
    assert len(x) == len(y) == 5


def test_one_program_for_all_planes_of_a_shape():
    plane, data = draw_plane()
    measure = rebasin.build_plane_sweep(chex.assert_max_traces(n=1)(metrics_fn))
    measure(plane, plane.coordinates, data)
    trees = list(plane.anchors.items())
    measure(rebasin.build_plane(dict(trees[::-1])), plane.coordinates + 1, data)


def test_planes_that_do_not_exist_are_refused():
    plane, data = draw_plane()
    a, b, c = plane.anchors.values()
    middle = {"w": 0.25 * a["w"] + 0.75 * b["w"], "step": a["step"]}
    for trees, message in (
        ({"a": a, "b": b}, r"a plane goes through three networks, got 2: \['a', 'b'\]"),
        ({"a": a, "b": a, "c": c}, "no one plane goes through a, b, c: a and b are equal"),
        ({"a": a, "b": b, "c": a}, "no one plane goes through a, b, c: a and c are equal"),
        ({"a": a, "b": b, "c": b}, "no one plane goes through a, b, c: b and c are equal"),
        ({"a": a, "b": b, "m": middle}, r"a, b, m: they lie on one line \(m is .* away from the line"),
    ):
        with pytest.raises(ConfigError, match=message):
            rebasin.build_plane(trees)
    with pytest.raises(TreeMismatchError, match=r"w: shape \(3,\) in a, \(2,\) in c"):
        rebasin.build_plane({"a": a, "b": b, "c": {"w": jnp.ones(2), "step": a["step"]}})
    with pytest.raises(NonFiniteError, match="b is not finite"):
        rebasin.build_plane({"a": a, "b": b | {"w": jnp.full(3, jnp.inf)}, "c": c})
    measure = rebasin.build_plane_sweep(metrics_fn)
    with pytest.raises(ConfigError, match=r"points must be finite coordinates of shape \[..., 2\], got an"):
        measure(plane, [[1.0, 2.0, 3.0]], data)
    with pytest.raises(ConfigError, match="size must be at least 2, got 1"):
        plane.grid(1)
    with pytest.raises(ConfigError, match="margin must be at least 0, got -1"):
        plane.grid(3, margin=-1)
