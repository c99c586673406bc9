"""Children of two networks: their barriers, the onset, and what a killed run ends with."""

import csv
import dataclasses
import io
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments.harness.networks import child_seed, run_directory
from experiments.harness.paths import PathMeter
from experiments.harness.record import METRICS, FamilyRecord, Metrics, ParentsRecord, SpawnRecord
from experiments.sgd_instability import EXPERIMENT, InstabilityConfig, judge
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import InitialState, build_apply, train
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
RECIPE = build_recipe("instability", dataset="digits", model="mlp", width=16, epochs=4, batch_size=32)


def small_config(**changes):
    fields = {
        "recipe": RECIPE,
        "replicates": 2,
        "seed": 0,
        "methods": ("weights",),
        "epochs": (0, 1, 3),
        "onset_at_most": 0.02,
        "num_alphas": 5,
        "num_eval": 200,
        "num_match": 100,
    }
    return InstabilityConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("instability"), io.StringIO()
    results = EXPERIMENT.run(
        small_config(),
        DIGITS,
        output_dir=folder / "out",
        runs_dir=folder / "runs",
        reporter=reporter(text),
    )
    return results, folder, text.getvalue()


def test_barriers_are_those_of_children_trained_by_hand(finished, tmp_path):
    """Parents and children of the second pair anew, with a whole sweep for each barrier."""
    results, _, _ = finished
    a, b = (train(RECIPE, DIGITS, seed=s, directory=tmp_path / f"{s}") for s in (2, 3))
    model = build_model("mlp", width=16, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    p_end = rebasin.weight_matching(spec, a.last, b.last, key=jax.random.key(2)).permutation
    p_1 = rebasin.weight_matching(spec, a[1], b[1], key=jax.random.key(2)).permutation

    def child(parent, number):
        seed = child_seed(parent.seed, 1, number)
        directory = tmp_path / f"child_{seed}"
        return train(RECIPE, DIGITS, seed=seed, directory=directory, start=InitialState(parent[1], 1)).last

    a1, a2, b1 = child(a, 1), child(a, 2), child(b, 1)
    metrics_fn = classification_metrics(build_apply(model, DIGITS))
    meter = PathMeter(metrics_fn, DIGITS, num_alphas=5, num_eval=200)
    record = results.records[1]
    spawn = record.spawns[1]
    for params_a, params_b, permutation, stored in (
        (a1, a2, None, spawn.siblings),
        (a1, b1, None, spawn.unaligned),
        (a1, b1, p_end, spawn.children["weights"]),
        (a.last, b.last, p_1, spawn.at_end["weights"]),
        (a.last, b.last, p_end, record.parents.aligned["weights"]),
    ):
        moved = params_b if permutation is None else rebasin.permute(spec, permutation, params_b)
        measured = meter(params_a, moved)
        for metric in METRICS:
            # Ends of aligned paths are those of the networks before the permutation.
            assert getattr(stored, metric) == pytest.approx(measured.barrier(metric).value, abs=0.0051)


def test_siblings_are_siblings(finished):
    """Two children of one parent part; without a difference in seed they would have no barrier at all."""
    results, _, _ = finished
    barriers = [spawn.siblings.train_loss for record in results.records for spawn in record.spawns]
    assert min(barriers) >= 0
    assert max(barriers) > 0
    seeds = [child_seed(p, t, k) for p in range(20) for t in range(200) for k in (1, 2)]
    assert len(set(seeds)) == len(seeds)


def test_results_csv_and_table(finished):
    results, folder, text = finished
    content = json.loads((folder / "out/results.json").read_text())
    families = [record["spawns"] for record in content["records"]]
    assert [[spawn["epoch"] for spawn in spawns] for spawns in families] == [[0, 1, 3]] * 2
    columns = np.array([[spawn["siblings"]["test_loss"] for spawn in spawns] for spawns in families])
    means = [spawn["siblings"]["test_loss"]["mean"] for spawn in content["summary"]["family"]["spawns"]]
    np.testing.assert_allclose(means, columns.mean(0), atol=1e-6)
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Siblings, children, children under P_end and parents under P_t by epoch; parents twice.
    assert len(rows) == 2 * len(METRICS) * (4 * 3 + 2)
    keys = ("replicate", "pair", "method", "epoch", "metric")
    found = {tuple(row[key] for key in keys): float(row["barrier"]) for row in rows}
    assert len(found) == len(rows)
    assert found["1", "children", "weights", "3", "test_loss"] == pytest.approx(
        results.records[1].spawns[2].children["weights"].test_loss, rel=1e-5
    )
    assert (folder / "out/sgd_instability.png").stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:"))]
    assert max(map(len, lines)) <= 80
    for word in ("onset of linear connectivity: epoch", "P_t@end", "mean±sd of 2 pairs", "disk: at most"):
        assert word in text
    assert "warning" not in text
    # Progress counts epochs of training: three children for 4, 3 and 1 of them.
    assert text.count(": 24/24 in ") == 2


def test_only_ends_are_kept_by_default(finished):
    _, folder, _ = finished
    assert not (folder / "runs").exists()
    home = run_directory(folder / "out/networks", RECIPE, 0)
    assert Trajectory(home).epochs == (0, 4)
    children = sorted((home.parent / "children").iterdir())
    assert len(children) == 2 * 3 * 3
    assert {Trajectory(child).epochs for child in children} == {(4,)}


@pytest.mark.parametrize("keep", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_a_run_killed_between_two_epochs_ends_with_the_same_numbers(finished, tmp_path, monkeypatch, keep):
    """Killed in the second child of the third family; checkpoints dropped or kept make no difference."""
    complete, _, _ = finished
    calls = []

    def killed(*arguments, **options):
        calls.append(None)
        # Two parents, then three children for each spawn epoch.
        if len(calls) == 10:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr("experiments.harness.networks.train", killed)
    arguments = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs", "keep": keep}
    with pytest.raises(KeyboardInterrupt):
        EXPERIMENT.run(small_config(), DIGITS, **arguments, reporter=reporter())
    stored = EXPERIMENT.load(tmp_path / "out/results.json")
    assert [[spawn.epoch for spawn in record.spawns] for record in stored.records] == [[0, 1]]
    with pytest.raises(ConfigError, match="pass --resume to go on with it"):
        EXPERIMENT.run(small_config(), DIGITS, **arguments, reporter=reporter())
    text = io.StringIO()
    EXPERIMENT.run(small_config(), DIGITS, **arguments, resume=True, reporter=reporter(text))
    # Of the third family one child was there, which counts at once.
    assert [text.getvalue().count(f": {n}/{n} in ") for n in (3, 24)] == [1, 1]
    resumed = EXPERIMENT.load(tmp_path / "out/results.json")
    assert resumed.records == complete.records
    assert resumed.summary == complete.summary
    assert [dataclasses.astuple(c) for c in resumed.claims] == [
        dataclasses.astuple(c) for c in EXPERIMENT.load(finished[1] / "out/results.json").claims
    ]
    assert (tmp_path / "out/networks").exists() is False
    if keep == "all":
        assert Trajectory(run_directory(tmp_path / "runs", RECIPE, 3)).epochs == (0, 1, 2, 3, 4)


def test_a_run_killed_before_its_summary_needs_no_network(finished, tmp_path):
    complete = EXPERIMENT.load(finished[1] / "out/results.json")
    dataclasses.replace(complete, summary=None, claims=[]).save(tmp_path / "results.json")
    folders = {"output_dir": tmp_path, "runs_dir": tmp_path / "runs"}
    EXPERIMENT.run(small_config(), DIGITS, **folders, resume=True, reporter=reporter())
    assert EXPERIMENT.load(tmp_path / "results.json") == complete
    assert not (tmp_path / "networks").exists()


def made_up(siblings, children, parents):
    """A record of test error barriers, by spawn epoch for siblings and children; all else is NaN."""

    def metrics(value):
        return Metrics(math.nan, math.nan, math.nan, value)

    spawns = [
        SpawnRecord(epoch, metrics(sibling), metrics(math.nan), {"weights": metrics(child)}, {})
        for epoch, sibling, child in zip((0, 1, 3, 7), siblings, children, strict=True)
    ]
    own = ParentsRecord(None, metrics(math.nan), {"weights": metrics(parents)})
    return FamilyRecord((0, 1), own, tuple(spawns))


def test_claims_follow_their_rules():
    config = SimpleNamespace(epochs=(0, 1, 3, 7), onset_at_most=0.02, methods=("weights",))
    records = [
        made_up([0.5, 0.03, 0.01, 0.0], [0.4 + x, 0.3, 0.02 + x, 0.01], 0.01) for x in (0, 0.002, -0.002)
    ]
    claims = {claim.id: claim for claim in judge(config, records)}
    assert [claim.holds for claim in claims.values()] == [True] * 4
    onset = claims["onset_of_linear_connectivity"]
    # Half way from .03 at log 2 to .01 at log 4.
    assert onset.measured == onset.low == onset.high == pytest.approx(2**1.5 - 1)
    # Epochs 3 and 7 follow the onset: excesses .01 and 0.
    assert claims["parents_permutation_aligns_children_weights"].measured == pytest.approx(0.005)
    assert claims["parents_permutation_fails_before_weights"].measured == pytest.approx(0.39)

    never = [made_up([0.5, 0.03, 0.01, 0.1], [0.01] * 4, 0.01) for _ in range(3)]
    claims = {claim.id: claim for claim in judge(config, never)}
    assert {name: claim.holds for name, claim in claims.items()} == {
        "unstable_at_first": True,
        "onset_of_linear_connectivity": False,
        "parents_permutation_aligns_children_weights": False,
        "parents_permutation_fails_before_weights": False,
    }
    assert np.isnan(claims["onset_of_linear_connectivity"].measured)


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(replicates=0, num_alphas=1, epochs=(0, 4), onset_at_most=2.0)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  replicates: wanted at least 1, got 0",
        "  num_alphas: wanted at least 2, both ends of the path, got 1",
        "  onset_at_most: wanted a fraction, got 2.0",
        "  epochs: wanted ascending epochs from 0 to 3, got [0, 4]",
    ]
