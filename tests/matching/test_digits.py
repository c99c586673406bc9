"""Real networks: every method lowers the barrier, and alignment through a universe is consistent."""

import itertools

import jax
import numpy as np
import pytest

import rebasin
from rebasin.matching.registry import METHODS
from rebasin.models import MLP
from rebasin.training.data import load_dataset, normalise
from rebasin.training.loop import build_metrics, train
from rebasin.training.recipes import build_recipe

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Three trained networks with their model and spec, and the training data."""
    dataset = load_dataset("digits")
    recipe = build_recipe("trajectory", dataset="digits", model="mlp", width=64, epochs=15, batch_size=32)
    folder = tmp_path_factory.mktemp("runs")
    trees = [train(recipe, dataset, seed=seed, directory=folder / str(seed)).last for seed in range(3)]
    model = MLP((64, 64, 64), 10)
    spec = rebasin.infer_spec(model.apply, trees[0], jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32))
    return model, spec, trees, dataset


# The methods that learn take a hundred steps.
LEARN = ("straight_through", "sinkhorn")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] if m in LEARN else []) for m in METHODS]
)
def test_the_error_barrier_nearly_vanishes(digits, method):
    model, spec, (a, b, _), dataset = digits
    metrics_fn, data = build_metrics(model, dataset.mean, dataset.std), jax.device_put(dataset.train)
    offered = {
        "loss_fn": lambda params, batch: metrics_fn(params, batch)["loss"],
        "apply_fn": lambda params, images: model.apply(params, normalise(images, dataset.mean, dataset.std)),
        "num_steps": 10,
        "data": data,
    }
    known = (*METHODS[method].needs, *METHODS[method].options)
    options = {name: value for name, value in offered.items() if name in known}
    if "apply_fn" in known:
        options["data"] = data.images
    sweep = rebasin.build_sweep(metrics_fn, num_alphas=5)
    assert sweep(a, b, data).error_barrier.value > 0.3
    match = rebasin.match(spec, a, b, method, key=KEY, **options)
    moved = rebasin.permute(spec, match.permutation, b)
    assert sweep(a, moved, data).error_barrier.value < 0.05


def test_a_universe_is_consistent_where_pairs_are_not(digits):
    model, spec, trees, dataset = digits
    metrics_fn, data = build_metrics(model, dataset.mean, dataset.std), jax.device_put(dataset.train)
    pairs = list(itertools.combinations(range(3), 2))
    apart = {(i, j): rebasin.weight_matching(spec, trees[i], trees[j], key=KEY).permutation for i, j in pairs}
    assert rebasin.cycle_error(spec, apart) > 0.5
    result = rebasin.universe_matching(spec, trees)
    assert rebasin.cycle_error(spec, {(i, j): result.pairwise(spec, i, j) for i, j in pairs}) == 0.0
    measure = rebasin.build_simplex_sweep(metrics_fn, resolution=1)
    assert measure(trees, data).means["error"][-1] > 0.5
    assert measure(result.align(spec, trees), data).means["error"][-1] < 0.05
