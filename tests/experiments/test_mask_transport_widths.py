"""Tickets of one network from the beginning of another over widths: errors by hand, resuming, and claims."""

import csv
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments.harness import networks
from experiments.harness.networks import child_seed, run_directory
from experiments.harness.pruning import WidthLevel, WidthRecord
from experiments.harness.record import METRICS, Metrics
from experiments.mask_transport_widths import EXPERIMENT, TransportWidthsConfig, judge
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.masks import load_mask
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import InitialState, build_apply, train
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
SIZES = {"width": 8, "epochs": 2, "batch_size": 32, "num_train": 400, "warmup_epochs": 1}
RECIPE = build_recipe("trajectory", dataset="digits", model="mlp", **SIZES)


def small_config(**changes):
    fields = {
        "recipe": RECIPE,
        "replicates": 1,
        "seed": 0,
        "methods": ("weights",),
        "levels": 2,
        "rewind_epoch": 0,
        "rewind": "weights",
        "num_alphas": 5,
        "num_eval": None,
        "num_match": 100,
        "widths": (8, 12),
    }
    return TransportWidthsConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("widths"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


@pytest.mark.slow
def test_errors_are_those_of_networks_trained_by_hand(finished, tmp_path):
    """Of the second width: B at its initialisation, in a new data order, with both masks."""
    results, folder, _ = finished
    recipe = small_config().pairs[1].recipe
    assert recipe.width == 12
    homes = [run_directory(folder / "runs", recipe, seed) for seed in (0, 1)]
    a, b = map(Trajectory, homes)
    masks = [
        load_mask(home.parent / "levels" / home.name / "weights_0" / "level_02.npz", a.last) for home in homes
    ]
    model = build_model("mlp", width=12, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    metrics_fn = classification_metrics(build_apply(model, DIGITS))
    permutation = rebasin.weight_matching(spec, a.last, b.last, key=jax.random.key(0)).permutation

    def trained(start, mask):
        directory = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        options = {"seed": child_seed(1, 0, 1), "directory": directory, "start": InitialState(start, 0)}
        return train(recipe, DIGITS, **options, mask=mask).last

    assert [record.width for record in results.records] == [8, 12]
    level = results.records[1].levels[2]
    for network, stored in (
        (trained(b[0], masks[1]), level.own),
        (trained(b[0], masks[0]), level.unpermuted),
        (trained(rebasin.permute(spec, permutation, b[0]), masks[0]), level.methods["weights"]),
    ):
        values = metrics_fn(network, DIGITS.test)
        assert stored.test_loss == pytest.approx(float(values["loss"].mean()), rel=1e-4)
        assert stored.test_error == pytest.approx(float(values["error"].mean()), abs=0.0029)  # one example
    assert len({m.test_loss for m in (level.own, level.unpermuted, level.methods["weights"])}) == 3


@pytest.mark.slow
def test_results_csv_and_table(finished):
    results, folder, text = finished
    with (folder / "out/widths.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3 * len(METRICS)
    found = {
        tuple(row[key] for key in ("width", "level", "mask", "metric")): float(row["value"]) for row in rows
    }
    assert len(found) == len(rows)
    stored = results.records[0].levels[2].methods["weights"].test_loss
    assert found["8", "2", "weights", "test_loss"] == pytest.approx(stored, rel=1e-5)
    # At level 0 nothing is pruned, and every mask gives the dense network.
    dense = {key[0]: value for key, value in found.items() if key[1] == "0" and key[3] == "test_loss"}
    assert len(dense) == len(set(dense.values())) == 2
    assert (folder / "out/mask_transport_widths.png").stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:"))]
    assert max(map(len, lines)) <= 80
    assert text.count(": 10/10 in ") == 2  # for each width two levels of two sparse networks and three masks


@pytest.mark.slow
def test_a_run_killed_in_a_level_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    calls = []

    def killed(*arguments, **options):
        calls.append(None)
        if len(calls) == (2 + 2 * 3) + (2 + 3) + 2:  # the first width; parents and level 1; the second mask
            raise KeyboardInterrupt
        return train(*arguments, **options)

    arguments = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs", "keep": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(networks, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            EXPERIMENT.run(small_config(), DIGITS, **arguments, reporter=reporter())
    stored = EXPERIMENT.load(tmp_path / "out/results.json")
    assert [[level.level for level in record.levels] for record in stored.records] == [[0, 1, 2], [0, 1]]
    EXPERIMENT.run(small_config(), DIGITS, **arguments, resume=True, reporter=reporter())
    resumed, whole = (EXPERIMENT.load(path / "out/results.json") for path in (tmp_path, finished[1]))
    assert (resumed.records, resumed.summary) == (whole.records, whole.summary)
    assert not (tmp_path / "out/networks").exists()


def made_up(width, own, unpermuted, transported):
    """A record of test errors by level."""

    def at(i):
        found = [Metrics(0.0, 0.0, 0.0, values[i]) for values in (own, unpermuted, transported)]
        return WidthLevel(i, 0.8**i, found[0], found[1], {"weights": found[2]})

    return WidthRecord((0, 1), width, tuple(at(i) for i in range(4)))


def test_claims_follow_their_rules():
    config = SimpleNamespace(levels=3, methods=("weights",), widths=(8, 16, 64))
    own, unpermuted = [0.1] * 4, [0.1, 0.1, 0.4, 0.4]
    # Level 1 is below the half that counts. Gaps of .08, .06 and .02: .02 less for each doubling.
    gaps = {8: 0.08, 16: 0.06, 64: 0.02}
    records = [made_up(w, own, unpermuted, [0.1, 0.9, 0.1 + g, 0.1 + g]) for w, g in gaps.items()]
    claims = {claim.id: claim for claim in judge(config, records * 3)}
    shrinks = claims["gap_shrinks_with_width_weights"]
    assert (shrinks.holds, shrinks.measured) == (True, pytest.approx(-0.02))
    assert "(mean gaps in %: 8.0, 6.0, 2.0)" in shrinks.statement
    beats = claims["transported_masks_beat_unpermuted_ones_weights"]
    assert (beats.holds, beats.measured) == (True, pytest.approx(0.3 - 0.16 / 3))

    grown = [made_up(w, own, own, [0.1, 0.1, 0.2 - g, 0.2 - g]) for w, g in gaps.items()]
    assert not any(claim.holds for claim in judge(config, grown * 3))
    config = SimpleNamespace(levels=3, methods=("weights",), widths=(8,))
    assert [claim.id for claim in judge(config, records[:1] * 2)] == [beats.id]


def test_pairs_are_all_widths_of_a_replicate_in_a_row():
    pairs = small_config(replicates=2).pairs
    assert [(pair.recipe.width, pair.seeds) for pair in pairs] == [
        (8, (0, 1)),
        (12, (0, 1)),
        (8, (2, 3)),
        (12, (2, 3)),
    ]
    assert small_config().misfits(WidthRecord((0, 1), 8), pairs[1]) == ["width: wanted 12, got 8"]


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(levels=0, widths=(4, 2), rewind_epoch=2)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  levels: wanted at least 1, got 0",
        "  rewind_epoch: wanted at least 0 and less than 2, got 2",
        "  widths: wanted ascending widths from 1 on, got [4, 2]",
    ]


def test_a_level_beyond_one_weight_per_leaf_is_refused_before_training(tmp_path):
    """Level 24 leaves 5 of the 1,176 weights of width 12, and 3 of the 720 of width 8."""
    with pytest.raises(ConfigError) as info:
        EXPERIMENT.run(
            small_config(levels=24),
            DIGITS,
            output_dir=tmp_path / "out",
            runs_dir=tmp_path / "runs",
            reporter=reporter(),
        )
    assert str(info.value) == (
        "levels: level 24 keeps 3 of the 720 prunable weights of a network (mlp) of width 8; wanted at least "
        "one for each of 4 leaves"
    )
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "runs").exists()
