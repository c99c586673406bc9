"""Barriers between pruned networks: those by hand, what is written, and what a killed run ends with."""

import csv
import io
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments.harness.networks import run_directory
from experiments.harness.paths import PathMeter
from experiments.harness.presets import Thresholds
from experiments.harness.pruning import SparseAligned, SparseLevel, SparseRecord
from experiments.harness.record import METRICS, Metrics
from experiments.sparse_connectivity import EXPERIMENT, SparseConfig, judge
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.masks import apply_mask, join_masks, load_mask, sparsity_report
from rebasin.models import build_model
from rebasin.pruning import level_sparsity, magnitude_mask, prunable_leaves
from rebasin.training import imp
from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply, train
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
RECIPE = build_recipe(
    "trajectory",
    dataset="digits",
    model="mlp",
    width=16,
    epochs=3,
    batch_size=32,
    num_train=600,
    warmup_epochs=1,
)


def small_config(**changes):
    fields = {
        "recipe": RECIPE,
        "replicates": 2,
        "seed": 0,
        "methods": ("weights",),
        "levels": 2,
        "rewind_epoch": 1,
        "rewind": "weights",
        "num_alphas": 5,
        "num_eval": 200,
        "num_match": 100,
        "thresholds": Thresholds(unaligned_above=0.4, any_epoch_at_most=0.1, end_at_most=0.03),
    }
    return SparseConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("sparse"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


def test_barriers_are_those_by_hand(finished):
    """Level 2 of the second pair, from the networks on disk, with a whole sweep for each barrier."""
    results, folder, _ = finished
    homes = [run_directory(folder / "runs", RECIPE, seed) for seed in (2, 3)]
    dense_a, dense_b = (Trajectory(home).last for home in homes)
    levels = [home.parent / "levels" / home.name / "weights_1" / "level_02" for home in homes]
    a, b = (Trajectory(level).last for level in levels)
    mask_a, mask_b = (load_mask(level.with_suffix(".npz"), a) for level in levels)
    model = build_model("mlp", width=16, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a, np.zeros((1, 8, 8, 1), np.float32))
    dense, sparse = (
        rebasin.weight_matching(spec, *pair, key=jax.random.key(0)).permutation
        for pair in ((dense_a, dense_b), (a, b))
    )
    one_shot = apply_mask(magnitude_mask(dense_b, level_sparsity(2)), dense_b)
    meter = PathMeter(classification_metrics(build_apply(model, DIGITS)), DIGITS, num_alphas=5, num_eval=200)
    level = results.records[1].levels[2]
    own = level.methods["weights"]
    for other, stored in (
        (b, level.control),
        (one_shot, level.baseline.barriers),
        (rebasin.permute(spec, dense, b), own.gold_standard),
        (rebasin.permute(spec, sparse, b), own.sparse),
        (apply_mask(mask_a, rebasin.permute(spec, dense, dense_b)), own.transported.barriers),
        (apply_mask(mask_a, rebasin.permute(spec, sparse, dense_b)), own.previous_work.barriers),
    ):
        measured = meter(a, other)
        for metric in METRICS:
            # Ends of aligned paths are those of the networks before the permutation.
            assert getattr(stored, metric) == pytest.approx(measured.barrier(metric).value, abs=0.0051)
    error = meter(a, one_shot).means["test_error"][0]
    assert level.baseline.network.test_error == pytest.approx(error, abs=1e-6)

    leaves = prunable_leaves(a)
    size = sum(sparsity_report(mask_a).leaves[path].size for path in leaves)
    for density, mask in (
        (level.density, mask_a),
        (level.between_control, join_masks(mask_a, mask_b)),
        (own.between_gold_standard, join_masks(mask_a, rebasin.permute(spec, dense, mask_b))),
        (own.between_sparse, join_masks(mask_a, rebasin.permute(spec, sparse, mask_b))),
    ):
        assert density == pytest.approx(sparsity_report(mask, leaves).total.kept / size, abs=1e-6)
    assert level.density == pytest.approx((size * 16 // 25) / size, abs=1e-6)
    assert level.density < own.between_gold_standard < 1


def test_results_csv_and_table(finished):
    results, folder, text = finished
    assert [level.level for level in results.records[0].levels] == [0, 1, 2]
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * (2 + 4) * len(METRICS)
    keys = ("replicate", "level", "comparison", "method", "metric")
    found = {tuple(row[key] for key in keys): row for row in rows}
    assert len(found) == len(rows)
    level = results.records[1].levels[2]
    row = found["1", "2", "transported", "weights", "test_loss"]
    assert float(row["barrier"]) == pytest.approx(
        level.methods["weights"].transported.barriers.test_loss, 1e-5
    )
    assert float(row["untrained"]) == pytest.approx(
        level.methods["weights"].transported.network.test_loss, 1e-5
    )
    for name in ("sparse_connectivity.png", "interpolated_sparsity.png"):
        assert (folder / "out" / name).stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:"))]
    assert max(map(len, lines)) <= 80
    for word in ("mean±sd of 2 pairs", "gold", "disk: at most"):
        assert word in text
    assert text.count(": 4/4 in ") == 2  # two levels of two networks


@pytest.mark.slow
def test_a_run_killed_in_a_level_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    calls = []

    def killed(*arguments, **options):
        calls.append(None)
        if len(calls) == 3:  # the second level of A
            raise KeyboardInterrupt
        return train(*arguments, **options)

    arguments = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs", "keep": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(imp, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            EXPERIMENT.run(small_config(), DIGITS, **arguments, reporter=reporter())
    stored = EXPERIMENT.load(tmp_path / "out/results.json")
    assert [[level.level for level in record.levels] for record in stored.records] == [[0, 1]]
    EXPERIMENT.run(small_config(), DIGITS, **arguments, resume=True, reporter=reporter())
    resumed, whole = (EXPERIMENT.load(path / "out/results.json") for path in (tmp_path, finished[1]))
    assert (resumed.records, resumed.summary) == (whole.records, whole.summary)
    assert not (tmp_path / "out/networks").exists()


def made_up(control, gold, sparse):
    """A record of test error barriers by level; all else is NaN."""

    def metrics(value):
        return Metrics(math.nan, math.nan, math.nan, value)

    return SparseRecord(
        (0, 1),
        tuple(
            SparseLevel(
                i,
                0.8**i,
                None,
                metrics(control[i]),
                None,
                1.0,
                {"weights": SparseAligned(metrics(gold[i]), metrics(sparse[i]), None, None, 1.0, 1.0)},
            )
            for i in range(4)
        ),
    )


def test_claims_follow_their_rules():
    config = SimpleNamespace(
        levels=3, methods=("weights",), thresholds=SimpleNamespace(any_epoch_at_most=0.1)
    )
    records = [
        made_up([0.7] * 4, [0.02, 0.03, 0.09 + x, 0.05], [0.02, 0.0, 0.2, 0.5 + x]) for x in (0, 0.01, -0.01)
    ]
    claims = {claim.id: claim for claim in judge(config, records)}
    assert [claim.holds for claim in claims.values()] == [True] * 3
    assert "highest at level 2" in claims["dense_permutation_aligns_every_level_weights"].statement
    # Levels 2 and 3: .11 and .45.
    assert claims["dense_beats_sparse_permutation_weights"].measured == pytest.approx(0.28)
    assert claims["dense_permutation_helps_sparse_networks_weights"].measured == pytest.approx(0.63)

    poor = [made_up([0.1] * 4, [0.0, 0.5, 0.2, 0.2], [0.0, 0.9, 0.1, 0.1]) for _ in range(3)]
    assert not any(claim.holds for claim in judge(config, poor))


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(levels=0, rewind_epoch=3, rewind="nothing")
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  levels: wanted at least 1, got 0",
        "  rewind_epoch: wanted at least 0 and less than 3, got 3",
        "  rewind: wanted one of weights, learning_rate, got 'nothing'",
    ]
