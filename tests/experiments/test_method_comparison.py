"""Comparisons of matching methods in small: their numbers, their files, and what is refused."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

import rebasin
from experiments import method_comparison, rate_comparison
from experiments.console import Reporter
from experiments.pairs import run_directory
from rebasin.data import load_dataset
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.recipes import build_recipe
from rebasin.training import build_metrics
from rebasin.trajectory import Trajectory

RECIPE = build_recipe(
    "trajectory", dataset="digits", model="mlp", width=16, epochs=3, warmup_epochs=1, batch_size=32
)
SIZES = {"num_alphas": 5, "num_test": 200, "num_match": 300}


def reporter(text=None):
    return Reporter(Console(file=text or io.StringIO(), width=80))


def methods_config(**changes):
    fields = {"recipe": RECIPE, "replicates": 2, "seed": 0, "methods": ("weights", "activations")}
    return method_comparison.Config(**{**fields, **SIZES, "num_repair": 100, "num_steps": 5, **changes})


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    text = io.StringIO()
    results = method_comparison.run(
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
    metrics = build_metrics(model, dataset.mean, dataset.std)
    curve = rebasin.sweep(*pair, data, metrics, num_alphas=5)
    record = results.curves[0]["methods"]["none"]
    np.testing.assert_allclose(record["plain"]["loss_barrier"], curve.loss_barrier.value, rtol=1e-5)
    np.testing.assert_allclose(record["plain"]["midpoint_error"], curve.error[2], rtol=1e-5)
    assert record["objective"] is None


def test_objective_and_distance_of_weight_matching(methods, pair):
    """‖A − P[B]‖² = ‖A‖² + ‖B‖² − 2⟨A, P[B]⟩ ties the two columns together."""
    results, _, _ = methods
    a, b = ([np.asarray(x, np.float64) for x in layers.values()] for layers in map(flat, pair))
    squares = sum((x**2).sum() for x in (*a, *b))
    record = results.curves[0]["methods"]["weights"]
    assert record["distance"] ** 2 == pytest.approx(squares - 2 * record["objective"][1], rel=1e-5)
    assert record["distance"] < results.curves[0]["methods"]["none"]["distance"]


def flat(tree, name=""):
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, inner in tree.items() for k, v in flat(inner, f"{name}/{key}").items()}


def test_repair_leaves_the_endpoints_alone(methods):
    results, _, _ = methods
    for record in results.curves[0]["methods"].values():
        plain, repaired = (record[variant]["segment_error"] for variant in ("plain", "repaired"))
        assert [plain[0], plain[-1]] == pytest.approx([repaired[0], repaired[-1]], abs=0.006)


def test_files_and_table(methods):
    _, folder, text = methods
    out = folder / "out"
    rows = list(csv.DictReader((out / "methods.csv").read_text().splitlines()))
    assert len(rows) == 2 * 3 * 2
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert list(summary["methods"]) == ["none", "weights", "activations"]
    assert (out / "compare_methods.png").stat().st_size > 10_000
    assert all(len(line) <= 80 for line in text.splitlines() if str(out) not in line)
    assert "activations" in text


def test_a_finished_run_is_only_drawn_anew(methods, monkeypatch):
    _, folder, _ = methods
    monkeypatch.setattr(method_comparison, "train_networks", None)
    before = (folder / "out" / "results.json").read_text()
    (folder / "out" / "compare_methods.png").unlink()
    method_comparison.run(
        methods_config(),
        load_dataset("digits"),
        output_dir=folder / "out",
        runs_dir=folder / "none",
        reporter=reporter(),
    )
    assert (folder / "out" / "results.json").read_text() == before
    assert (folder / "out" / "compare_methods.png").exists()


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError) as info:
        methods_config(methods=("weights", "telepathy"), num_alphas=4, replicates=0)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  replicates: wanted at least 1, got 0",
        "  num_alphas: wanted an odd number from 3 on, got 4",
        f"  methods: wanted names among {', '.join(rebasin.METHODS)}, got ['weights', 'telepathy']",
    ]


def test_rates(tmp_path, monkeypatch):
    """Two rates and one pair each; an interrupted run goes on where it stopped."""
    config = rate_comparison.Config(RECIPE, (0.01, 0.1), 1, 0, **SIZES)
    folders = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs"}
    measure = rate_comparison._measure
    calls = []

    def interrupted(*args):
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(rate_comparison, "_measure", interrupted)
    dataset = load_dataset("digits")
    with pytest.raises(KeyboardInterrupt):
        rate_comparison.run(config, dataset, **folders, reporter=reporter())
    with pytest.raises(ConfigError, match="unfinished run"):
        rate_comparison.run(config, dataset, **folders, reporter=reporter())
    results = rate_comparison.run(config, dataset, **folders, resume=True, reporter=reporter())
    assert calls == [0.01, 0.1, 0.1]
    assert [curve["rate"] for curve in results.curves] == [0.01, 0.1]
    weights, covariance = (
        results.curves[0]["methods"][name]["plain"]["midpoint_loss"] for name in ("weights", "covariance")
    )
    assert results.claims[0].measured == pytest.approx(weights - covariance, rel=1e-5)
    assert results.claims[0].holds == (weights > covariance)
    assert (tmp_path / "out" / "learning_rates.png").stat().st_size > 10_000


def test_rates_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"rates: wanted ascending positive learning rates, got \[0\.1, 0"):
        rate_comparison.Config(RECIPE, (0.1, 0.01), 1, 0, **SIZES)
