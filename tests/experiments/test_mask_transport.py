"""Masks of one network in another: errors by hand, what is written, and what a killed run ends with."""

import csv
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments.harness import networks
from experiments.harness.networks import run_directory
from experiments.harness.pruning import TransportedMask, TransportLevel, TransportRecord
from experiments.harness.record import METRICS, Metrics
from experiments.mask_transport import EXPERIMENT, TransportConfig, judge, last_matching
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.masks import load_mask
from rebasin.models import build_model
from rebasin.pruning import level_sparsity, magnitude_mask
from rebasin.training.data import load_dataset
from rebasin.training.loop import InitialState, build_apply, train
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
SIZES = {"width": 16, "epochs": 3, "batch_size": 32, "num_train": 600, "warmup_epochs": 1}
RECIPE = build_recipe("trajectory", dataset="digits", model="mlp", **SIZES)


def small_config(**changes):
    fields = {
        "recipe": RECIPE,
        "replicates": 1,
        "seed": 0,
        "methods": ("weights",),
        "levels": 2,
        "rewind_epoch": 1,
        "rewind": "weights",
        "num_alphas": 5,
        "num_eval": None,
        "num_match": 100,
        "matching_margin": 0.01,
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
def test_errors_are_those_of_networks_trained_by_hand(finished, tmp_path):
    results, folder, _ = finished
    homes = [run_directory(folder / "runs", RECIPE, seed) for seed in (0, 1)]
    a, b = map(Trajectory, homes)
    tickets = [home.parent / "levels" / home.name / "weights_1" / "level_02" for home in homes]
    mask = load_mask(tickets[0].with_suffix(".npz"), a.last)
    sparse_a, sparse_b = (Trajectory(ticket).last for ticket in tickets)
    model = build_model("mlp", width=16, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    metrics_fn = classification_metrics(build_apply(model, DIGITS))

    def matched(*pair):
        return rebasin.weight_matching(spec, *pair, key=jax.random.key(0)).permutation

    def trained(start, mask):
        directory = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        options = {"seed": 1, "directory": directory, "start": InitialState(start, 1)}
        return train(RECIPE, DIGITS, **options, mask=mask).last

    level = results.records[0].levels[2]
    moved = [rebasin.permute(spec, p, b[1]) for p in (matched(a.last, b.last), matched(sparse_a, sparse_b))]
    for network, stored in (
        (sparse_a, level.ticket_a),
        (sparse_b, level.gold_standard),
        (trained(b[1], mask), level.control),
        (trained(b[1], magnitude_mask(b.last, level_sparsity(2))), level.baseline),
        (trained(moved[0], mask), level.methods["weights"].transported),
        (trained(moved[1], mask), level.methods["weights"].previous_work),
    ):
        values = metrics_fn(network, DIGITS.test)
        assert stored.test_loss == pytest.approx(float(values["loss"].mean()), rel=1e-4)
        assert stored.test_error == pytest.approx(float(values["error"].mean()), abs=0.0029)  # one example
    losses = {m.test_loss for m in (level.control, level.baseline, level.random, level.gold_standard)}
    assert len(losses) == 4


@pytest.mark.slow
def test_results_csv_and_table(finished):
    results, folder, text = finished
    with (folder / "out/accuracies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (5 + 2) * len(METRICS)
    found = {tuple(row[key] for key in ("level", "mask", "method", "metric")): row["value"] for row in rows}
    assert len(found) == len(rows)
    stored = results.records[0].levels[2].methods["weights"].transported.test_loss
    assert float(found["2", "transported", "weights", "test_loss"]) == pytest.approx(stored, rel=1e-5)
    # At level 0 nothing is pruned, and every mask gives the dense network.
    dense = {value for key, value in found.items() if key[0] == "0" and key[3] == "test_loss"}
    assert len(dense) == 2
    assert (folder / "out/mask_transport.png").stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:"))]
    assert max(map(len, lines)) <= 80
    assert ": 14/14 in " in text  # two levels of two sparse networks and five masks


@pytest.mark.slow
def test_a_run_killed_in_a_level_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    calls = []

    def killed(*arguments, **options):
        calls.append(None)
        if len(calls) == 2 + 5 + 3:  # two parents, level 1, the third mask of level 2
            raise KeyboardInterrupt
        return train(*arguments, **options)

    arguments = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs", "keep": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(networks, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            EXPERIMENT.run(small_config(), DIGITS, **arguments, reporter=reporter())
    stored = EXPERIMENT.load(tmp_path / "out/results.json")
    assert [[level.level for level in record.levels] for record in stored.records] == [[0, 1]]
    text = io.StringIO()
    EXPERIMENT.run(small_config(), DIGITS, **arguments, resume=True, reporter=reporter(text))
    assert ": 14/14 in " in text.getvalue()
    resumed, whole = (EXPERIMENT.load(path / "out/results.json") for path in (tmp_path, finished[1]))
    assert (resumed.records, resumed.summary) == (whole.records, whole.summary)
    assert not (tmp_path / "out/networks").exists()


def made_up(**errors):
    """A record of test errors by level."""

    def at(i):
        found = {name: Metrics(0.0, 0.0, 0.0, values[i]) for name, values in errors.items()}
        aligned = TransportedMask(found.pop("transported"), found.pop("previous_work"))
        return TransportLevel(level=i, density=0.8**i, methods={"weights": aligned}, **found)

    return TransportRecord((0, 1), tuple(at(i) for i in range(4)))


def test_claims_follow_their_rules():
    config = SimpleNamespace(levels=3, methods=("weights",), matching_margin=0.01)
    errors = {
        "ticket_a": [0.02, 0.5, 0.5, 0.5],
        "gold_standard": [0.04, 0.5, 0.5, 0.5],
        "transported": [0.04, 0.035, 0.03, 0.1],  # matching, within .01 of .03, to level 2
        "baseline": [0.04, 0.03, 0.05, 0.03],  # to level 1
        "control": [0.04, 0.05, 0.1, 0.2],
        "random": [0.04, 0.05, 0.1, 0.3],
        "previous_work": [0.04, 0.05, 0.1, 0.1],
    }
    claims = {claim.id: claim for claim in judge(config, [made_up(**errors)] * 3)}
    assert [claim.holds for claim in claims.values()] == [True] * 4
    assert [claim.measured for claim in claims.values()] == pytest.approx([1, 0.085, 0.135, 0.035])
    swapped = errors | {"transported": errors["control"], "control": errors["transported"]}
    swapped |= {"random": errors["transported"], "previous_work": errors["transported"]}
    assert not any(claim.holds for claim in judge(config, [made_up(**swapped)] * 3))


def test_the_last_matching_level():
    excess = np.array([[9, 2, 0, 0], [0, 0, 0, 2], [0, 1, 1, 1]])
    assert last_matching(excess, 1).tolist() == [0, 2, 3]


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(levels=0, matching_margin=1.0)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  levels: wanted at least 1, got 0",
        "  matching_margin: wanted a fraction, got 1.0",
    ]
