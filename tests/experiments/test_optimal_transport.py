"""Effective dimensions and dependence by hand, what is written, and the rules of the claims."""

import csv
import dataclasses
import io

import jax
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments.harness.networks import Pair, run_directory
from experiments.harness.paths import infer_model_spec
from experiments.harness.record import MatchRecord, TestPath
from experiments.harness.transport import Dimensions, SettingRecord
from experiments.learning_rates import METHODS
from experiments.optimal_transport import EXPERIMENT, TransportConfig, judge
from rebasin.dimensions import effective_dimension
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset, normalise
from rebasin.training.loop import build_apply
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory
from rebasin.transport import dependence_test, transport_neurons

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
        "widths": (),
        "lengths": (1,),
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
    assert list(settings) == ["0.05", "1 epoch", "the recipe", "no momentum", "weight decay", "adam"]
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
    assert [layer.leaf for layer in record.layers] == [f"params/Dense_{i}/kernel" for i in range(3)]
    test = dependence_test([first_a, first_b])
    assert (record.dependence, record.p_value) == pytest.approx((test.z_score, test.p_value), rel=1e-5)


@pytest.mark.slow
def test_layer_losses_are_of_one_layer_halfway_to_the_aligned_network(finished):
    results, folder, _ = finished
    config, record = small_config(), results.records[0]
    a, b = (Trajectory(run_directory(folder / "runs", config.settings["0.05"], s)).last for s in (0, 1))
    model = build_model("mlp", width=16, num_classes=10)
    spec, apply = infer_model_spec(model, DIGITS), build_apply(model, DIGITS)
    moved = rebasin.permute(spec, rebasin.weight_matching(spec, a, b, key=jax.random.key(0)).permutation, b)
    test = DIGITS.take(num_test=200).test
    for layer, found in enumerate(record.layer_losses["weights"]):
        name = f"Dense_{layer}"
        middle = jax.tree.map(lambda x, y: (x + y) / 2, a["params"][name], moved["params"][name])
        hybrid = {"params": a["params"] | {name: middle}}
        loss = rebasin.classification_metrics(apply)(hybrid, test)["loss"].mean()
        assert found == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.slow
def test_csv_figure_and_tables(finished):
    results, folder, text = finished
    with (folder / "out/transport.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 3 * 3
    assert float(rows[0]["dimension"]) == pytest.approx(results.records[0].layers[0].weights, rel=1e-5)
    for name in EXPERIMENT.figures:
        assert (folder / "out" / name).stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:"))]
    assert [line for line in lines if len(line) > 80] == []
    for word in ("weight decay", "dependence", "dim."):
        assert word in text


def made_up(setting, dimension, loss, dependence=0.0, *, pair=0):
    """A record with one layer whose dimensions are equal, and equal losses by all methods."""
    layer = Dimensions("w", dimension, dimension, dimension)
    path = TestPath(loss, loss, loss, loss, (loss, loss, loss))
    methods = dict.fromkeys(METHODS, MatchRecord(None, 0.0, 0.0, path))
    losses = dict.fromkeys(METHODS, (loss,))
    seeds = (2 * pair, 2 * pair + 1)
    return SettingRecord(seeds, setting, (layer,), 1.0, 1.0, dependence, 0.5, methods, losses)


def records_of(config, *, dimensions, losses, scores=lambda name, pair: 0.0):
    """Records of three pairs; settings that are not named have a dimension and a loss of 1."""
    return [
        made_up(
            name, dimensions.get(name, 1) + 0.01 * pair, losses.get(name, 1), scores(name, pair), pair=pair
        )
        for name in config.settings
        for pair in range(3)
    ]


RATES = {"0.1": 0, "0.2": 1, "0.4": 2}


def test_families_share_the_recipe_under_one_name():
    recipe = dataclasses.replace(RECIPE, peak_learning_rate=0.4)
    config = small_config(recipe=recipe, rates=(0.1, 0.2, 0.4), widths=(4, 16), lengths=(1,))
    assert {family: list(settings) for family, settings in config.families.items()} == {
        "rates": ["0.1", "0.2", "0.4"],
        "widths": ["width 4", "0.4"],
        "lengths": ["1 epoch", "0.4"],
        "optimizers": ["no momentum", "weight decay", "adam", "0.4"],
    }
    assert config.epochs_of(Pair(config.settings["1 epoch"], (0, 1))) == (1,)
    assert len(config.pairs) == len(config.settings) == 8


def test_claims_follow_their_rules():
    config = small_config(rates=(0.1, 0.2, 0.4), replicates=3)

    def holds(dimensions, losses, **scores):
        given = (dict(zip(RATES, values, strict=True)) for values in (dimensions, losses))
        records = records_of(config, **dict(zip(("dimensions", "losses"), given, strict=True)), **scores)
        return {claim.id: claim.holds for claim in judge(config, records)}

    falling = holds((9, 7, 4), (3, 2, 1))
    assert falling["dimension_falls_with_the_rate_weights"]
    assert not falling["dimension_rises_with_the_rate_covariance"]
    assert falling["dimension_goes_with_loss_weights"]
    rising = holds((4, 7, 9), (3, 2, 1))
    assert not rising["dimension_falls_with_the_rate_weights"]
    assert rising["dimension_rises_with_the_rate_activations"]
    assert not rising["dimension_goes_with_loss_activations"]
    gathered = holds((9, 7, 4), (3, 2, 1), scores=lambda name, pair: (name == "adam") * 5 + pair - 1)
    assert gathered["independent_neurons_weight_decay"]
    assert gathered["independent_neurons_momentum"]
    assert not gathered["independent_neurons_adam"]


def test_methods_are_ordered_by_their_barriers_at_the_lower_rates():
    config = small_config(rates=(0.1, 0.2, 0.4), replicates=3)

    def left(record, losses):
        paths = {name: TestPath(loss, loss, 0.0, loss, (loss,)) for name, loss in losses.items()}
        methods = {name: MatchRecord(None, 0.0, 0.0, path) for name, path in paths.items()}
        return dataclasses.replace(record, methods=methods)

    low = {"weights": 3.0, "covariance": 2.0, "activations": 2.5}
    high = {"weights": 0.0, "covariance": 9.0, "activations": 0.0}  # at 0.4, which does not count
    records = records_of(config, dimensions={}, losses={})
    claims = judge(config, [left(r, high if r.setting == "0.4" else low) for r in records])
    found = {claim.id: (claim.measured, claim.holds) for claim in claims}
    assert found["covariance_better_than_weights_by_barrier"] == (pytest.approx(1), True)
    assert found["activations_better_than_covariance_by_barrier"] == (pytest.approx(-0.5), False)


def test_correlations_are_over_the_settings_of_a_family():
    config = small_config(rates=(0.1, 0.2, 0.4), replicates=3, widths=(4, 8), lengths=())
    dimensions = {"0.1": 9, "0.2": 7, "0.4": 4, "width 4": 3, "width 8": 2}
    losses = {"0.1": 3, "0.2": 2, "0.4": 1, "width 4": 1, "width 8": 2}

    def score(name, pair):
        return {"0.1": -3, "0.2": -2}.get(name, 0.0)

    summary = EXPERIMENT.summarise(
        config, records_of(config, dimensions=dimensions, losses=losses, scores=score)
    )
    assert set(summary.correlations) == {"rates", "widths"}  # and not over lengths, nor over one layer
    assert summary.correlations["rates"]["weights"].midpoint_loss.mean == pytest.approx(1)
    # Dimensions 3, 2 and 9 against losses 1, 2 and 3; the recipe's own rate is 0.1.
    assert summary.correlations["widths"]["covariance"].loss_barrier.mean == pytest.approx(0.5)
    # Losses 3, 2, 1, 1, 1, 1, 1 have the scores −3, −2, 0, …: the order is exactly opposite.
    assert summary.dependence.midpoint_loss.mean == pytest.approx(-1)


def test_other_models_are_refused():
    recipe = build_recipe("optimal_transport", dataset="digits", model="vit", width=16, epochs=2)
    with pytest.raises(ConfigError, match="model: wanted one of mlp, vgg16, resnet20, got 'vit'"):
        small_config(recipe=recipe)
