"""Two regimes of training: what is measured against networks on disk, what is written, and the claims."""

import csv
import dataclasses
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import TINY, reporter

import rebasin
from experiments.harness.matched_epochs import StabilityEpoch, StabilityRecord
from experiments.harness.networks import child_seed, run_directory
from experiments.harness.paths import PathMeter
from experiments.harness.presets import Thresholds
from experiments.harness.record import METRICS, Metrics
from experiments.stability_interventions import EXPERIMENT, STABILITY_REGIMES, StabilityConfig, judge
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import InitialState, build_apply, train
from rebasin.training.recipes import REGIMES
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
SMALL = dataclasses.replace(TINY, num_train=200, epochs=2)
FIRST, SECOND = (dataclasses.replace(SMALL, **REGIMES[regime]) for regime in STABILITY_REGIMES)


def small_config(**changes):
    fields = {
        "recipe": FIRST,
        "second": SECOND,
        "replicates": 1,
        "seed": 0,
        "methods": ("weights",),
        "epochs": (1, 2),
        "num_alphas": 3,
        "num_eval": 200,
        "num_match": 100,
        "stable_at_most": 0.02,
        "thresholds": Thresholds(unaligned_above=0.4, any_epoch_at_most=0.1, end_at_most=0.03),
    }
    return StabilityConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("stability"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs", "keep": "all"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


@pytest.mark.slow
def test_barriers_are_those_of_the_networks_on_disk(finished, tmp_path):
    """Of the second regime, whose siblings are trained here once more."""
    results, folder, _ = finished
    record = results.records[1]
    assert [(r.regime, r.seeds) for r in results.records] == [(name, (0, 1)) for name in STABILITY_REGIMES]
    a, b = (Trajectory(run_directory(folder / "runs", SECOND, seed)) for seed in (0, 1))
    model = build_model("mlp", width=TINY.width, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    meter = PathMeter(classification_metrics(build_apply(model, DIGITS)), DIGITS, num_alphas=3, num_eval=200)
    p_end = rebasin.weight_matching(spec, a.last, b.last, key=jax.random.key(0)).permutation
    siblings = [
        train(
            SECOND,
            DIGITS,
            seed=child_seed(0, 0, number),
            directory=tmp_path / f"{number}",
            start=InitialState(a[0], 0),
        ).last
        for number in (1, 2)
    ]
    part = record.epochs[0]
    assert part.epoch == 1
    for curve, stored in (
        (meter(*siblings), record.siblings),
        (meter(a[1], b[1]), part.unaligned),
        (meter(a[1], rebasin.permute(spec, p_end, b[1])), part.aligned["weights"]),
    ):
        for metric in METRICS:
            assert getattr(stored, metric) == pytest.approx(curve.barrier(metric).value, abs=0.0051)


@pytest.mark.slow
def test_results_csv_and_table(finished):
    results, folder, text = finished
    assert [record.regime for record in results.require_summary().regimes] == list(STABILITY_REGIMES)
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 * 2) * len(METRICS)
    keys = ("regime", "path", "epoch", "metric")
    found = {tuple(row[key] for key in keys): float(row["barrier"]) for row in rows}
    first = results.records[0]
    stored = first.epochs[1].aligned["weights"].train_loss
    assert found["stability_1", "weights", "2", "train_loss"] == pytest.approx(stored, rel=1e-5, abs=1e-9)
    stored = first.siblings.test_loss
    assert found["stability_1", "siblings", "2", "test_loss"] == pytest.approx(stored, rel=1e-5, abs=1e-9)
    assert (folder / "out/stability_interventions.png").stat().st_size > 10_000
    assert max(len(line) for line in text.splitlines() if not line.startswith(("/", "disk:"))) <= 80
    assert "stability_1: rate 0.001, warm-up 0, decay 0.0001" in text
    assert "stability_2: rate 0.1, warm-up 1, decay 0" in text


def made_up(regime, siblings, middle, end):
    """A record of test error barriers of siblings, and under P_end in the middle and at the end."""

    def metrics(value):
        return Metrics(0.0, 0.0, 0.0, value)

    parts = ((1, middle), (2, end))
    epochs = tuple(StabilityEpoch(t, None, None, {"weights": metrics(value)}) for t, value in parts)
    return StabilityRecord((0, 1), regime, metrics(siblings), epochs)


def test_claims_follow_their_rules():
    config = SimpleNamespace(
        epochs=(1, 2),
        methods=("weights",),
        stable_at_most=0.02,
        thresholds=SimpleNamespace(any_epoch_at_most=0.1, end_at_most=0.03),
    )

    def judged(first, second):
        both = zip(STABILITY_REGIMES, (first, second), strict=True)
        records = [made_up(regime, *values) for regime, values in both]
        return {claim.id: claim for claim in judge(config, records * 2)}

    good = judged((0.01, 0.0, 0.04), (0.5, 0.09, 0.05))
    assert all(claim.holds for claim in good.values())
    assert good["second_regime_can_be_aligned_weights"].measured == pytest.approx(0.09)
    assert "highest at epoch 1" in good["second_regime_can_be_aligned_weights"].statement
    poor = judged((0.03, 0.5, 0.02), (0.01, 0.11, 0.0))
    assert not any(claim.holds for claim in poor.values())


def test_pairs_are_of_both_regimes():
    config = small_config(replicates=2)
    assert [(pair.recipe, pair.seeds) for pair in config.pairs] == [
        (FIRST, (0, 1)),
        (SECOND, (0, 1)),
        (FIRST, (2, 3)),
        (SECOND, (2, 3)),
    ]
    assert config.wanted_epochs == (0, 1, 2)
    record = dataclasses.replace(made_up("stability_2", 0.0, 0.0, 0.0), seeds=(0, 1))
    assert config.misfits(record, config.pairs[0]) == ["regime: wanted stability_1, got stability_2"]
    assert not config.misfits(record, config.pairs[1])


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(second=dataclasses.replace(SECOND, width=8), stable_at_most=1.0)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  second: wanted the width of the first recipe, 16, got 8",
        "  stable_at_most: wanted a fraction, got 1.0",
    ]
