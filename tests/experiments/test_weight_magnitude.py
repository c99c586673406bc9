"""Matching without some of the weights: what is measured against networks on disk, files and claims."""

import csv
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import TINY, reporter

import rebasin
from experiments.harness.matched_epochs import MagnitudeRecord, PrunedEpoch, PrunedMatch
from experiments.harness.networks import run_directory
from experiments.harness.paths import PathMeter
from experiments.harness.record import METRICS, Metrics
from experiments.weight_magnitude import EXPERIMENT, MagnitudeConfig, judge
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.masks import apply_mask
from rebasin.models import build_model
from rebasin.pruning import magnitude_mask, random_mask
from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")


def small_config(**changes):
    fields = {
        "recipe": TINY,
        "replicates": 1,
        "seed": 0,
        "methods": ("weights",),
        "epochs": (1, 3),
        "fractions": (0.0, 0.5, 0.9),
        "num_alphas": 3,
        "num_eval": 200,
        "num_match": 100,
    }
    return MagnitudeConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("magnitude"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


@pytest.mark.slow
def test_permutations_are_those_of_the_pruned_networks_on_disk(finished):
    """Of epoch 1 at the end, whole and with nine of ten weights pruned."""
    results, folder, _ = finished
    a, b = (Trajectory(run_directory(folder / "runs", TINY, seed)) for seed in (0, 1))
    model = build_model("mlp", width=TINY.width, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    meter = PathMeter(classification_metrics(build_apply(model, DIGITS)), DIGITS, num_alphas=3, num_eval=200)
    early = results.records[0].epochs[0]
    assert early.epoch == 1

    def matched(masks):
        pruned = [apply_mask(mask, tree) for mask, tree in zip(masks, (a[1], b[1]), strict=True)]
        return rebasin.weight_matching(spec, *pruned, key=jax.random.key(0)).permutation

    def key(i, side):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), i), side)

    found = {}
    for i, fraction in ((0, 0.0), (2, 0.9)):
        found["magnitude", i] = matched([magnitude_mask(tree, fraction) for tree in (a[1], b[1])])
        found["random", i] = matched(
            [random_mask(tree, fraction, key=key(i, side)) for side, tree in enumerate((a[1], b[1]))]
        )
    for (kind, i), permutation in found.items():
        curve = meter(a.last, rebasin.permute(spec, permutation, b.last))
        stored = getattr(early.methods["weights"], kind)[i]
        for metric in METRICS:
            assert getattr(stored, metric) == pytest.approx(curve.barrier(metric).value, abs=0.0051)
    own = early.methods["weights"]
    assert own.magnitude[0] == own.random[0]  # nothing is pruned
    assert len({m.test_loss for m in (own.magnitude[0], own.magnitude[2], own.random[2])}) == 3


@pytest.mark.slow
def test_results_csv_and_table(finished):
    results, folder, text = finished
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * len(METRICS)
    keys = ("epoch", "pruning", "fraction", "metric")
    found = {tuple(row[key] for key in keys): row for row in rows}
    own = results.records[0].epochs[1].methods["weights"]
    assert float(found["3", "random", "0.9", "test_loss"]["barrier"]) == pytest.approx(
        own.random[2].test_loss, rel=1e-5
    )
    assert (folder / "out/weight_magnitude.png").stat().st_size > 10_000
    assert max(len(line) for line in text.splitlines() if not line.startswith(("/", "disk:"))) <= 80
    assert "pruned at random" in text


def made_up(early, late, random):
    """A record of test error barriers by fraction, by magnitude at two epochs and at random at the last."""

    def row(values):
        return tuple(Metrics(0.0, 0.0, 0.0, value) for value in values)

    epochs = (
        PrunedEpoch(1, {"weights": PrunedMatch(row(early), row(early))}),
        PrunedEpoch(3, {"weights": PrunedMatch(row(late), row(random))}),
    )
    return MagnitudeRecord((0, 1), None, None, epochs)


def test_claims_follow_their_rules():
    config = SimpleNamespace(fractions=(0.0, 0.5, 0.8, 0.9), epochs=(1, 3), methods=("weights",), high=2)
    good = [
        made_up([0.3, 0.3, 0.4, 0.5], [0.1, 0.1, 0.1 + x, 0.5], [0.1, 0.1, 0.4, 0.5])
        for x in (0.0, 0.004, 0.002)
    ]
    claims = {claim.id: claim for claim in judge(config, good)}
    assert all(claim.holds for claim in claims.values())
    assert claims["small_weights_do_not_matter_weights"].measured == pytest.approx(0.002)
    assert claims["random_pruning_harms_more_weights"].measured == pytest.approx(0.298)
    assert claims["more_can_be_pruned_late_weights"].measured == pytest.approx(0.3)
    poor = [made_up([0.1] * 4, [0.1, 0.2, 0.2 + x, 0.2], [0.1] * 4) for x in (0.0, 0.01, 0.02)]
    assert not any(claim.holds for claim in judge(config, poor))


def test_claims_are_on_the_largest_fraction_up_to_four_fifths():
    assert small_config(fractions=(0.0, 0.6, 0.8, 0.9)).high == 2
    assert small_config(fractions=(0.0, 0.9, 0.95)).high == 1


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(epochs=(3,), fractions=(0.2, 1.0), methods=("magic",))
    lines = str(info.value).splitlines()
    assert lines[0] == "this experiment cannot work:"
    assert lines[1].startswith("  methods: wanted some of weights, ")
    assert lines[2:] == [
        "  epochs: wanted two or more ascending epochs from 0 on, got [3]",
        "  fractions: wanted ascending fractions below 1, the first 0, got [0.2, 1.0]",
    ]
