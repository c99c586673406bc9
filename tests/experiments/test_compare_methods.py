"""Comparisons of matching methods in small: their numbers, their files, and what is refused."""

import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments import compare_methods, learning_rates
from experiments.harness.experiment import Setup
from experiments.harness.methods import MethodComparison
from experiments.harness.networks import Pair, run_directory
from experiments.harness.record import MethodsRecord
from experiments.harness.results import Results, Seconds
from experiments.harness.serialisation import to_json
from rebasin.barrier import classification_metrics
from rebasin.batches import Batch
from rebasin.errors import ConfigError
from rebasin.models import BatchNorm, build_model
from rebasin.training.data import load_dataset, normalise
from rebasin.training.loop import build_apply
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory

RECIPE = build_recipe(
    "trajectory", dataset="digits", model="mlp", width=16, epochs=3, warmup_epochs=1, batch_size=32
)
SIZES = {"num_alphas": 5, "num_test": 200, "num_match": 300}


def methods_config(**changes):
    fields = {"recipe": RECIPE, "replicates": 2, "seed": 0, "methods": ("weights", "activations")}
    return compare_methods.MethodsConfig(**{**fields, **SIZES, "num_repair": 100, "num_steps": 5, **changes})


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    text = io.StringIO()
    results = compare_methods.EXPERIMENT.run(
        methods_config(),
        load_dataset("digits"),
        output_dir=folder / "out",
        runs_dir=folder / "runs",
        reporter=reporter(text),
    )
    return results, folder, text.getvalue()


@pytest.fixture(scope="module")
def pair(methods):
    _, folder, _ = methods
    return [Trajectory(run_directory(folder / "runs", RECIPE, seed)).last for seed in (0, 1)]


def test_the_first_row_is_the_pair_as_it_was_trained(methods, pair):
    results, _, _ = methods
    dataset = load_dataset("digits")
    model = build_model("mlp", width=16, num_classes=10)
    data = dataset.take(num_train=1, num_test=200).test
    metrics = classification_metrics(build_apply(model, dataset))
    curve = rebasin.sweep(*pair, data, metrics, num_alphas=5)
    record = results.records[0].methods["none"]
    np.testing.assert_allclose(record.plain.loss_barrier, curve.loss_barrier.value, rtol=1e-5)
    np.testing.assert_allclose(record.plain.midpoint_error, curve.error[2], rtol=1e-5)
    assert record.objective is None


def test_objective_and_distance_of_weight_matching(methods, pair):
    """‖A − P[B]‖² = ‖A‖² + ‖B‖² − 2⟨A, P[B]⟩ ties the two columns together."""
    results, _, _ = methods
    a, b = ([np.asarray(x, np.float64) for x in layers.values()] for layers in map(flat, pair))
    squares = sum((x**2).sum() for x in (*a, *b))
    record = results.records[0].methods["weights"]
    assert record.distance**2 == pytest.approx(squares - 2 * record.objective.end, rel=1e-5)
    assert record.distance < results.records[0].methods["none"].distance


def flat(tree, name=""):
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, inner in tree.items() for k, v in flat(inner, f"{name}/{key}").items()}


def test_repair_is_measured_and_not_the_plain_path_again(methods, pair):
    results, _, _ = methods
    dataset = load_dataset("digits")
    chosen = dataset.take(num_train=SIZES["num_match"], num_test=SIZES["num_test"])
    apply_fn = build_apply(build_model("mlp", width=16, num_classes=10), dataset)
    images = jnp.asarray(chosen.train.inputs[:100])  # num_repair
    spec = rebasin.infer_spec(apply_fn, pair[0], images[:1])
    repair = rebasin.build_repair(spec, *pair, apply_fn, images)
    metrics = classification_metrics(repair.apply)
    curve = rebasin.sweep(*pair, chosen.test, metrics, num_alphas=3, prepare=repair.prepare)
    record = results.records[0].methods["none"]
    assert record.repaired.midpoint_loss == pytest.approx(curve.loss[1], rel=1e-4)
    assert record.plain.midpoint_loss != pytest.approx(curve.loss[1], rel=1e-2)


def test_repair_leaves_the_endpoints_alone(methods):
    results, _, _ = methods
    for record in results.records[0].methods.values():
        plain, repaired = record.plain.error, record.repaired.error
        assert [plain[0], plain[-1]] == pytest.approx([repaired[0], repaired[-1]], abs=0.006)


class Normed(nn.Module):
    """One hidden layer with BatchNorm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12)(x.reshape(len(x), -1))
        return nn.Dense(10)(nn.relu(BatchNorm()(x)))


@pytest.fixture(scope="module")
def normed():
    """Two networks with BatchNorm that were never trained, and the results of comparing methods on them."""
    dataset, model = load_dataset("digits"), Normed()
    images = normalise(dataset.train.inputs[:300], dataset.mean, dataset.std)
    trees = []
    for seed in (0, 1):
        tree = model.init(jax.random.key(seed), images)
        # Running statistics of the initialisation say nothing: those of the data.
        trees.append(tree | model.apply(tree, images, mutable=["batch_stats"])[1])
    spec = rebasin.infer_spec(model.apply, trees[0], images[:1])
    setup = Setup(methods_config(), dataset, model, spec, None, Seconds(), reporter())
    comparison = MethodComparison(setup, ("weights",), num_test=200, num_repair=100)
    *_, measured = comparison.measure(
        [SimpleNamespace(last=tree) for tree in trees], Pair(None, (0, 1)), "", {}
    )
    config = methods_config(methods=("weights",), replicates=1)
    results = Results("compare_methods", config, records=[MethodsRecord((0, 1), measured)])
    return dataset, model, trees, results


@pytest.mark.slow
def test_new_norm_statistics_are_those_of_the_network_in_the_middle(normed):
    dataset, model, (a, b), results = normed
    chosen = dataset.take(num_train=300, num_test=200)
    pixels, test = (
        np.asarray(normalise(images, dataset.mean, dataset.std))
        for images in (chosen.train.inputs[:100], chosen.test.inputs)
    )
    params = jax.tree.map(lambda x, y: (x + y) / 2, a["params"], b["params"])
    dense = params["Dense_0"]
    before = pixels.reshape(100, -1) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    statistics = {"mean": jnp.mean(before, 0), "var": jnp.var(before, 0)}
    variables = {"params": params, "batch_stats": {"BatchNorm_0": statistics}}
    metrics = classification_metrics(model.apply)(variables, Batch(test, chosen.test.labels))
    loss = float(jnp.mean(metrics["loss"]))
    record = results.records[0].methods["none"]
    assert record.reset.midpoint_loss == pytest.approx(loss, rel=1e-4)
    assert record.plain.midpoint_loss != pytest.approx(loss, rel=1e-2)


def test_distance_is_that_of_the_weights_alone(normed):
    """Running statistics are not part of the distance between networks."""
    _, _, (a, b), results = normed
    leaves = zip(*(jax.tree.leaves(tree["params"]) for tree in (a, b)), strict=True)
    weights = np.sqrt(sum(((x - np.asarray(y, np.float64)) ** 2).sum() for x, y in leaves))
    leaves = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    everything = np.sqrt(sum(((x - np.asarray(y, np.float64)) ** 2).sum() for x, y in leaves))
    distance = results.records[0].methods["none"].distance
    assert distance == pytest.approx(weights, rel=1e-6)
    assert distance != pytest.approx(everything, rel=1e-4)


def test_new_norm_statistics_have_rows_a_table_and_marks_of_their_own(normed, tmp_path):
    results = normed[-1]
    experiment, text = compare_methods.EXPERIMENT, io.StringIO()
    results.summary = experiment.summarise(results.config, results.records)
    rows = list(experiment.rows(results))
    assert [row["statistics"] for row in rows] == ["plain", "repaired", "reset"] * 2
    experiment.report(results, reporter(text))
    assert "With new running statistics of every norm" in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= 80
    for draw in experiment.figures.values():
        draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_files_and_table(methods):
    _, folder, text = methods
    out = folder / "out"
    rows = list(csv.DictReader((out / "methods.csv").read_text().splitlines()))
    assert len(rows) == 2 * 3 * 2
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert list(summary["methods"]) == ["none", "weights", "activations"]
    assert (out / "compare_methods.png").stat().st_size > 10_000
    assert all(len(line) <= 80 for line in text.splitlines() if str(folder) not in line)
    assert "activations" in text


def test_a_finished_run_is_only_drawn_anew(methods, tmp_path):
    _, folder, _ = methods
    before = (folder / "out" / "results.json").read_text()
    (folder / "out" / "compare_methods.png").unlink()
    compare_methods.EXPERIMENT.run(
        methods_config(),
        load_dataset("digits"),
        output_dir=folder / "out",
        runs_dir=tmp_path / "none",
        reporter=reporter(),
    )
    assert (folder / "out" / "results.json").read_text() == before
    assert (folder / "out" / "compare_methods.png").exists()
    assert not (tmp_path / "none").exists()


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError) as info:
        methods_config(methods=("weights", "telepathy"), num_alphas=4, replicates=0, num_repair=1)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  replicates: wanted at least 1, got 0",
        "  num_alphas: wanted an odd number from 3 on, got 4",
        f"  methods: wanted some of {', '.join(rebasin.METHODS)}, got 'telepathy'",
        "  num_repair: wanted at least 2 examples, got 1",
    ]
    with pytest.raises(ConfigError, match=r"rates: wanted ascending positive learning rates, got \[0\.1, 0"):
        rates_config(rates=(0.1, 0.01))


def without_seconds(value):
    if not isinstance(value, dict | list):
        value = to_json(value)
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_killed_comparison_ends_with_the_same_numbers(methods, tmp_path, monkeypatch):
    """Killed in the second pair; of the networks trained here, the last epochs alone are left."""
    complete, _, _ = methods
    experiment, dataset = compare_methods.EXPERIMENT, load_dataset("digits")
    config = methods_config(methods=("weights",))
    folders = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs", "reporter": reporter()}
    measure, calls = MethodComparison.measure, []

    def killed(*arguments):
        calls.append(arguments[-1])
        for methods in measure(*arguments):
            yield methods
            if len(calls) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(MethodComparison, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, dataset, **folders, keep="ends")
    # Of the second pair what was measured before is stored.
    begun = experiment.load(tmp_path / "out/results.json").records
    assert [list(record.methods) for record in begun] == [["none", "weights"], ["none"]]
    with pytest.raises(ConfigError, match="pass --resume to go on with it"):
        experiment.run(config, dataset, **folders, keep="ends")
    experiment.run(config, dataset, **folders, keep="ends", resume=True)
    assert [list(begun) for begun in calls] == [[], [], ["none"]]
    resumed = experiment.load(tmp_path / "out/results.json")
    for ours, theirs in zip(resumed.records, complete.records, strict=True):
        for name, record in ours.methods.items():
            assert without_seconds(record) == without_seconds(theirs.methods[name])
    for name, summary in resumed.summary.methods.items():
        assert without_seconds(summary) == without_seconds(complete.summary.methods[name])
    assert not (tmp_path / "runs").exists()
    stored = [Trajectory(run_directory(tmp_path / "out/networks", RECIPE, seed)) for seed in range(4)]
    assert [trajectory.epochs for trajectory in stored] == [(3,)] * 4


@pytest.mark.slow
def test_every_method_in_a_comparison(tmp_path):
    results = compare_methods.EXPERIMENT.run(
        methods_config(methods=compare_methods.METHODS, replicates=1, num_steps=2),
        load_dataset("digits"),
        output_dir=tmp_path / "out",
        runs_dir=tmp_path / "runs",
        reporter=reporter(),
    )
    assert list(results.records[0].methods) == ["none", *rebasin.METHODS]
    for name, record in results.records[0].methods.items():
        assert name == "none" or record.objective.end >= record.objective.start


def rates_config(**changes):
    fields = {"recipe": RECIPE, "rates": (0.01, 0.1), "replicates": 1, "seed": 0, **SIZES}
    return learning_rates.RatesConfig(**{**fields, **changes})


def test_rates(tmp_path, monkeypatch):
    """Two rates and one pair each; then from the first rate on again, with networks that are dropped."""
    used, match = [], rebasin.CovarianceMatching.match
    monkeypatch.setattr(
        rebasin.CovarianceMatching, "match", lambda *args, **kw: used.append(args[0]) or match(*args, **kw)
    )
    experiment, dataset = learning_rates.EXPERIMENT, load_dataset("digits")
    text = io.StringIO()
    folders = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs"}
    experiment.run(rates_config(), dataset, **folders, reporter=reporter(text))
    results = experiment.load(tmp_path / "out/results.json")
    partial = dataclasses.replace(results, records=results.records[:1], summary=None, claims=[])
    (tmp_path / "again").mkdir()
    partial.save(tmp_path / "again/results.json")
    folders = {"output_dir": tmp_path / "again", "runs_dir": tmp_path / "none"}
    experiment.run(rates_config(), dataset, **folders, keep="none", resume=True, reporter=reporter())
    resumed = experiment.load(tmp_path / "again/results.json")
    assert resumed.records[0] == results.records[0]
    assert without_seconds(resumed.records) == without_seconds(results.records)
    assert without_seconds(resumed.summary) == without_seconds(results.summary)
    assert resumed.claims == results.claims
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "again/networks").exists()

    assert set(used) == {rebasin.CovarianceMatching(order="depth")}  # as in the paper
    assert [record.rate for record in results.records] == [0.01, 0.1]
    for rate, record in zip((0.01, 0.1), results.records, strict=True):
        recipe = dataclasses.replace(RECIPE, peak_learning_rate=rate)
        assert Trajectory(run_directory(tmp_path / "runs", recipe, record.seeds[1])).complete
    weights, covariance = (
        results.records[0].methods[name].plain.midpoint_loss for name in ("weights", "covariance")
    )
    assert results.claims[0].measured == pytest.approx(weights - covariance, rel=1e-5)
    assert results.claims[0].holds == (weights > covariance)
    assert (tmp_path / "out" / "learning_rates.png").stat().st_size > 10_000
    lines = [line for line in text.getvalue().splitlines() if not line.startswith(("/", "disk:"))]
    assert max(map(len, lines)) <= 80
