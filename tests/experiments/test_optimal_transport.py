"""Effective dimensions and dependence by hand, what is written, and the rules of the claims."""

import csv
import io
from types import SimpleNamespace

import numpy as np
import pytest
from small_experiment import reporter

from experiments.harness.networks import run_directory
from experiments.optimal_transport import EXPERIMENT, TransportConfig, judge
from rebasin.errors import ConfigError
from rebasin.training.data import load_dataset, normalise
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory
from rebasin.transport import dependence_test, effective_dimension, transport_neurons

DIGITS = load_dataset("digits")
RECIPE = build_recipe(
    "optimal_transport", dataset="digits", model="mlp", width=16, epochs=2, batch_size=32, num_train=600
)


def small_config(**changes):
    fields = {
        "recipe": RECIPE,
        "replicates": 1,
        "seed": 0,
        "rates": (0.05,),
        "num_alphas": 3,
        "num_test": 200,
        "num_match": 100,
    }
    return TransportConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("transport"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


@pytest.mark.slow
def test_numbers_are_those_by_hand(finished):
    results, folder, _ = finished
    settings = small_config().settings
    assert [record.setting for record in results.records] == list(settings)
    assert settings["adam"].optimizer == "adam"
    record = results.records[-1]
    a, b = (Trajectory(run_directory(folder / "runs", settings["adam"], seed)).last for seed in (0, 1))
    first_a, first_b = (np.asarray(tree["params"]["Dense_0"]["kernel"], float).T for tree in (a, b))
    images = normalise(DIGITS.take(num_train=100).train.inputs, DIGITS.mean, DIGITS.std)
    x = np.asarray(images, float).reshape(100, -1)
    y = np.maximum(x @ first_a.T + np.asarray(a["params"]["Dense_0"]["bias"]), 0)
    sigma = x.T @ x / 100
    moments = (first_a.T @ first_a, first_a @ sigma @ first_a.T, y.T @ y)
    first = record.layers[0]
    assert (first.weights, first.covariance, first.activations) == pytest.approx(
        [effective_dimension(moment) for moment in moments], rel=1e-4
    )
    second = np.asarray(a["params"]["Dense_1"]["kernel"], float)
    assert record.layers[1].weights == pytest.approx(effective_dimension(second @ second.T), rel=1e-5)
    assert len(record.layers) == 3
    scale = np.sqrt((first_a**2).sum(1).mean())
    assert record.distance == pytest.approx(transport_neurons(first_a, first_b).distance / scale, rel=1e-5)
    scale = np.sqrt(((first_a @ x.T) ** 2).mean(1).mean())
    distance = transport_neurons(first_a, first_b, second_moment=sigma).distance
    assert record.covariance_distance == pytest.approx(distance / scale, rel=1e-4)
    test = dependence_test([first_a, first_b])
    assert (record.dependence, record.p_value) == pytest.approx((test.z_score, test.p_value), rel=1e-5)


@pytest.mark.slow
def test_csv_figure_and_tables(finished):
    results, folder, text = finished
    with (folder / "out/transport.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 3
    assert float(rows[0]["dimension"]) == pytest.approx(results.records[0].layers[0].weights, rel=1e-5)
    assert (folder / "out/optimal_transport.png").stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:"))]
    assert [line for line in lines if len(line) > 80] == []
    for word in ("weight decay", "dependence", "dim."):
        assert word in text


def made_up(setting, dimension, loss):
    """A record with one layer whose dimensions are equal, and equal losses by all methods."""
    layer = SimpleNamespace(weights=dimension, covariance=dimension, activations=dimension)
    match = SimpleNamespace(plain=SimpleNamespace(midpoint_loss=loss))
    methods = dict.fromkeys(("weights", "covariance", "activations"), match)
    return SimpleNamespace(setting=setting, layers=(layer,), methods=methods)


def test_claims_follow_their_rules():
    config = SimpleNamespace(rates=(0.1, 0.2, 0.4))

    def holds(dimensions, losses):
        records = [
            made_up(f"{rate:g}", dimension + x, loss)
            for x in (0, 0.01, 0.02)
            for rate, dimension, loss in zip(config.rates, dimensions, losses, strict=True)
        ]
        return {claim.id: claim.holds for claim in judge(config, [*records, made_up("adam", 99, 0)])}

    falling = holds((9, 7, 4), (3, 2, 1))
    assert falling["dimension_falls_with_the_rate_weights"]
    assert not falling["dimension_rises_with_the_rate_covariance"]
    assert falling["dimension_goes_with_loss_weights"]
    rising = holds((4, 7, 9), (3, 2, 1))
    assert not rising["dimension_falls_with_the_rate_weights"]
    assert rising["dimension_rises_with_the_rate_activations"]
    assert not rising["dimension_goes_with_loss_activations"]


def test_other_models_are_refused():
    recipe = build_recipe("optimal_transport", dataset="digits", model="vit", width=16, epochs=2)
    with pytest.raises(ConfigError, match="model: wanted mlp, got 'vit'"):
        small_config(recipe=recipe)
