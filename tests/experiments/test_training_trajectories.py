"""The experiment of section 5.1 in small: its numbers, its files, and what happens when it is run again."""

import csv
import dataclasses
import io
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_experiment import reporter, small_config

import rebasin
from experiments.harness.networks import run_directory
from experiments.harness.record import (
    METRICS,
    AlignedEpoch,
    EpochRecord,
    Metrics,
    TrajectoryRecord,
)
from experiments.harness.results import claim
from experiments.training_trajectories import EXPERIMENT, early_epochs, judge
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset, normalise
from rebasin.training.trajectory import Trajectory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("experiment")
    text = io.StringIO()
    results = EXPERIMENT.run(
        small_config(),
        load_dataset("digits"),
        output_dir=folder / "out",
        runs_dir=folder / "runs",
        reporter=reporter(text),
    )
    return results, folder, text.getvalue()


def error_rate(params, split, dataset):
    """0–1 error in NumPy float64, layer by layer."""
    x = ((split.inputs - dataset.mean) / dataset.std).reshape(len(split.labels), -1).astype(np.float64)
    layers = params["params"]
    for i in range(4):
        layer = layers[f"Dense_{i}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = np.maximum(x, 0) if i < 3 else x
    return (x.argmax(1) != split.labels).mean()


def barrier_by_hand(params_a, params_b, split, dataset):
    """Eq. 1 in error, in NumPy, on five points."""
    errors = []
    for alpha in np.linspace(0, 1, 5):
        mixed = jax.tree.map(lambda x, y, alpha=alpha: alpha * x + (1 - alpha) * y, params_a, params_b)
        errors.append(error_rate(mixed, split, dataset))
    return (errors - np.linspace(errors[0], errors[-1], 5)).max()


def test_barriers_are_those_of_the_networks_on_disk(finished):
    """Everything from the checkpoints again, by plain NumPy, for one replicate: P_s at t for each (s, t)."""
    results, folder, _ = finished
    config, dataset = small_config(), load_dataset("digits")
    a, b = (Trajectory(run_directory(folder / "runs", config.recipe, seed)) for seed in (2, 3))
    model = build_model("mlp", width=16, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    test = dataset.take(num_train=200, num_test=200).test
    images = dataset.take(num_train=100).train.inputs
    epochs = {epoch.epoch: epoch for epoch in results.records[1].epochs}

    def apply(variables, batch):
        return model.apply(variables, normalise(batch, dataset.mean, dataset.std))

    for method in ("weights", "activations"):
        own = {t: epoch.methods[method] for t, epoch in epochs.items()}
        for s, t, value in (
            (4, 1, own[1].under[4].test_error),
            (2, 2, own[2].same_epoch.test_error),
            (1, 4, own[1].at_end.test_error),
            (1, 2, own[2].under[1].test_error),
            (4, 0, own[0].under[4].test_error),
        ):
            if method == "weights":
                match = rebasin.weight_matching(spec, a[s], b[s], key=jax.random.key(2))  # of the pair
            else:
                match = rebasin.activation_matching(spec, a[s], b[s], apply, images)
            moved = rebasin.permute(spec, match.permutation, b[t])
            # float32 may decide one or two of 200 examples differently.
            assert value == pytest.approx(barrier_by_hand(a[t], moved, test, dataset), abs=0.0101)
            if (s, t) == (4, 1):
                leaves = zip(jax.tree.leaves(a[t]), jax.tree.leaves(moved), strict=True)
                distance = np.sqrt(sum(((x - np.asarray(y, np.float64)) ** 2).sum() for x, y in leaves))
                assert own[1].distance_end == pytest.approx(distance, rel=1e-5)
    assert epochs[4].unaligned.test_error == pytest.approx(
        barrier_by_hand(a[4], b[4], test, dataset), abs=0.0101
    )


def test_results_have_the_schema_and_the_statistics(finished):
    results, folder, _ = finished
    content = json.loads((folder / "out/results.json").read_text())
    keys = "schema_version experiment config environment seconds records summary claims sha256"
    assert list(content) == keys.split()
    assert content["config"]["recipe"]["width"] == 16
    assert [record["seeds"] for record in content["records"]] == [[0, 1], [2, 3]]
    assert content["summary"]["seeds"] == [0, 1, 2, 3]
    epochs, summary = [record["epochs"] for record in content["records"]], content["summary"]["epochs"]
    for method in ("weights", "activations"):
        own = [[epoch["methods"][method] for epoch in parts] for parts in epochs]
        means = [epoch["methods"][method] for epoch in summary]
        for pick in (
            lambda epoch: epoch["under"]["4"],
            lambda epoch: epoch["same_epoch"],
            lambda epoch: epoch["at_end"],
        ):
            for metric in METRICS:
                columns = np.array([[pick(epoch)[metric] for epoch in parts] for parts in own])
                mean = [pick(epoch)[metric]["mean"] for epoch in means]
                np.testing.assert_allclose(mean, columns.mean(0), atol=1e-6)
                assert columns.shape == (2, 4)
                assert (columns >= 0).all()
        for parts in own:
            # At the last epoch P_t is P_end, whichever way it is written down.
            last = parts[-1]
            assert last["same_epoch"]["test_loss"] == last["at_end"]["test_loss"]
            assert last["same_epoch"]["test_loss"] == last["under"]["4"]["test_loss"]
            assert last["fixed_points"]["total"] == 1.0
            # P_1 is one permutation, among those applied everywhere and as that of its own epoch.
            assert parts[1]["under"]["1"]["test_loss"] == parts[1]["same_epoch"]["test_loss"]
            assert last["distance_same_epoch"] == last["distance_end"]
            layers = [list(epoch["fixed_points"]["groups"].values()) for epoch in parts]
            np.testing.assert_allclose(
                [epoch["fixed_points"]["total"] for epoch in parts], np.mean(layers, axis=1), rtol=1e-6
            )  # three layers of one width
    assert [claim["id"] for claim in content["claims"]] == [
        "unaligned_barrier",
        *(
            f"{name}_{method}"
            for method in ("weights", "activations")
            for name in (
                "one_permutation_aligns_every_epoch",
                "one_permutation_aligns_the_end",
                "early_permutations_fail",
            )
        ),
        "early_permutations_are_closer",
        "early_permutations_are_worse_in_place",
        "activations_succeed_earlier",
    ]
    for entry in content["claims"]:
        assert entry["low"] <= entry["measured"] <= entry["high"]


def test_csv_is_tidy(finished):
    results, folder, _ = finished
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Four epochs without a permutation; for each method P_1 and P_4 at four epochs each, P_0 and P_2 at their
    # own and at the last.
    assert len(rows) == 2 * len(METRICS) * (4 + 2 * (2 * 4 + 2 * 2))
    found = {
        tuple(row[key] for key in ("replicate", "method", "match_epoch", "epoch", "metric")): row
        for row in rows
    }
    assert len(found) == len(rows)
    epochs = {epoch.epoch: epoch for epoch in results.records[1].epochs}
    for key, value in (
        (("1", "none", "", "2", "test_loss"), epochs[2].unaligned.test_loss),
        (("1", "weights", "4", "1", "test_loss"), epochs[1].methods["weights"].under[4].test_loss),
        (("1", "activations", "1", "2", "train_loss"), epochs[2].methods["activations"].under[1].train_loss),
        (("1", "weights", "0", "4", "test_loss"), epochs[0].methods["weights"].at_end.test_loss),
    ):
        assert float(found[key]["barrier"]) == pytest.approx(value, rel=1e-5)
    assert float(found["1", "none", "", "2", "test_loss"]["endpoint_b"]) == pytest.approx(
        epochs[2].endpoints.b.test_loss, rel=1e-5
    )


def test_table_fits_80_columns_and_says_what_it_shows(finished):
    _, _, text = finished
    assert max(len(line) for line in text.splitlines() if not line.startswith(("/", "disk:"))) <= 80
    assert "…" not in text
    header = "training_trajectories: mlp (width 16) on digits, 2 pairs of networks, algorithm best"
    assert " ".join(text.split()).startswith(header)
    for word in (
        "P_end",
        "P_t@end",
        "mean±sd of 2 pairs",
        "computing time",
        "permutations.png",
        "disk: at most",
    ):
        assert word in text
    assert text.count("holds") + text.count("does not hold") >= 4


def test_a_finished_run_is_only_drawn_anew(finished):
    results, folder, _ = finished
    before = (folder / "out/results.json").read_bytes()
    figures = [
        folder / f"out/{n}.png" for n in ("training_trajectories", "fixed_permutations", "permutations")
    ]
    for figure in figures:
        figure.unlink()
    again = EXPERIMENT.run(
        small_config(),
        load_dataset("digits"),
        output_dir=folder / "out",
        runs_dir=folder / "none",
        reporter=reporter(),
    )
    assert all(figure.stat().st_size > 10_000 for figure in figures)
    assert (folder / "out/results.json").read_bytes() == before
    assert not (folder / "none").exists()
    assert again.claims == EXPERIMENT.load(folder / "out/results.json").claims


def test_another_config_is_refused_and_nothing_lost(finished):
    _, folder, _ = finished
    before = (folder / "out/results.json").read_bytes()
    other = small_config(num_alphas=7, replicates=3)
    with pytest.raises(ConfigError) as info:
        EXPERIMENT.run(
            other,
            load_dataset("digits"),
            output_dir=folder / "out",
            runs_dir=folder / "runs",
            reporter=reporter(),
        )
    assert str(info.value).splitlines() == [
        f"{folder / 'out/results.json'} is of another config; choose another folder:",
        "  replicates: 2 there, 3 wanted",
        "  num_alphas: 5 there, 7 wanted",
    ]
    assert (folder / "out/results.json").read_bytes() == before


def test_an_unfinished_run_needs_resume_and_keeps_its_replicates(finished, tmp_path):
    _, folder, _ = finished
    complete = EXPERIMENT.load(folder / "out/results.json")
    partial = dataclasses.replace(complete, records=complete.records[:1], summary=None, claims=[])
    tmp_path.joinpath("out").mkdir()
    partial.save(tmp_path / "out/results.json")
    arguments = {"output_dir": tmp_path / "out", "runs_dir": folder / "runs", "reporter": reporter()}
    with pytest.raises(
        ConfigError, match=r"unfinished run \(1 replicates done\); pass --resume to go on with it"
    ):
        EXPERIMENT.run(small_config(), load_dataset("digits"), **arguments)
    resumed = EXPERIMENT.run(small_config(), load_dataset("digits"), resume=True, **arguments)
    # To the last bit: what is summed up has gone through the file's seven digits either way.
    assert (resumed.records, resumed.summary) == (complete.records, complete.summary)
    assert EXPERIMENT.load(tmp_path / "out/results.json").claims == complete.claims


def test_a_run_killed_within_a_pair_measures_only_the_epochs_that_it_lacks(finished, tmp_path):
    """Epochs are stored when measured; what was measured is not measured again."""
    _, folder, _ = finished
    complete = EXPERIMENT.load(folder / "out/results.json")
    marked = dataclasses.replace(complete.records[1].epochs[3], distance=-1.0)
    begun = dataclasses.replace(complete.records[1], epochs=(complete.records[1].epochs[1], marked))
    partial = dataclasses.replace(complete, records=[complete.records[0], begun], summary=None, claims=[])
    partial.save(tmp_path / "results.json")
    arguments = {"output_dir": tmp_path, "runs_dir": folder / "runs", "reporter": reporter()}
    resumed = EXPERIMENT.run(small_config(), load_dataset("digits"), resume=True, **arguments)
    assert resumed.records[0] == complete.records[0]
    assert resumed.records[1].epochs[3] == marked
    assert resumed.records[1].epochs[:3] == complete.records[1].epochs[:3]


@pytest.mark.parametrize(("keep", "left"), [("none", None), ("ends", (0, 4))])
def test_networks_are_dropped_and_the_numbers_stay(finished, tmp_path, keep, left):
    _, folder, _ = finished
    complete = EXPERIMENT.load(folder / "out/results.json")
    output, runs = tmp_path / "out", tmp_path / "runs"
    config = small_config(replicates=1, methods=("weights",))
    results = EXPERIMENT.run(
        config, load_dataset("digits"), output_dir=output, runs_dir=runs, keep=keep, reporter=reporter()
    )
    ours, theirs = ([epoch.methods["weights"] for epoch in r.records[0].epochs] for r in (results, complete))
    assert ours == theirs
    assert not runs.exists()
    if left is None:
        assert not (output / "networks").exists()
    else:
        stored = [Trajectory(run_directory(output / "networks", config.recipe, seed)) for seed in (0, 1)]
        assert [trajectory.epochs for trajectory in stored] == [left, left]


def test_files_of_the_user_beside_dropped_networks_stay(tmp_path):
    output = tmp_path / "out"
    (output / "networks").mkdir(parents=True)
    (output / "networks/thesis.txt").write_text("mine")
    config = small_config(replicates=1, methods=("weights",), epochs=(4,), match_epochs=(4,))
    arguments = {"output_dir": output, "runs_dir": tmp_path / "runs", "keep": "none"}
    EXPERIMENT.run(config, load_dataset("digits"), **arguments, reporter=reporter())
    assert [path.name for path in (output / "networks").iterdir()] == ["thesis.txt"]


def test_networks_found_elsewhere_are_never_dropped(finished, tmp_path):
    _, folder, _ = finished
    config = small_config(replicates=1, methods=("weights",))
    arguments = {"output_dir": tmp_path / "out", "runs_dir": folder / "runs", "keep": "none"}
    EXPERIMENT.run(config, load_dataset("digits"), **arguments, reporter=reporter())
    assert not (tmp_path / "out/networks").exists()
    found = Trajectory(run_directory(folder / "runs", config.recipe, 0))
    assert found.epochs == (0, 1, 2, 3, 4)


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(replicates=0, num_alphas=1, epochs=(0, 2), methods=("magic",))
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  replicates: wanted at least 1, got 0",
        "  num_alphas: wanted at least 2, both ends of the path, got 1",
        f"  methods: wanted some of {', '.join(rebasin.METHODS)}, got 'magic'",
        "  epochs: wanted the recipe's last, 4, at the end, got 2",
        "  match_epochs: wanted ascending ones of epochs, with the last, got [1, 4]",
    ]
    with pytest.raises(ConfigError, match=r"epochs: wanted ascending epochs from 0 on, got \[0, 3, 2, 4\]"):
        small_config(epochs=(0, 3, 2, 4))
    with pytest.raises(ConfigError, match=r"methods: wanted at least one, none twice, got \[\]"):
        small_config(methods=())


def test_the_binary_from_end_to_end(tmp_path):
    """As a process: flags become a config, and a claim that does not hold the exit status."""
    flags = [
        "--preset=digits",
        "--width=16",
        "--epochs=4",
        "--warmup_epochs=1",
        "--replicates=1",
        "--record_epochs=0,1,4",
        "--match_epochs=1",
        "--methods=weights",
        "--num_alphas=3",
        "--strict",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.training_trajectories", *flags, f"--output_dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    content = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == (0 if all(claim["holds"] for claim in content["claims"]) else 1)
    assert (content["config"]["epochs"], content["config"]["num_alphas"]) == ([0, 1, 4], 3)
    assert (content["config"]["match_epochs"], content["config"]["methods"]) == ([1, 4], ["weights"])
    assert [epoch["unaligned"]["test_error"]["deviation"] for epoch in content["summary"]["epochs"]] == [
        None
    ] * 3


def test_claims_follow_their_rules():
    """On made-up records of three replicates, by hand."""
    config = small_config(
        epochs=(0, 1, 2, 30),
        match_epochs=(30,),
        methods=("weights",),
        recipe=dataclasses.replace(small_config().recipe, epochs=30),
    )

    def metrics(test_error):
        return Metrics(math.nan, math.nan, math.nan, test_error)

    def record(shift):
        rows = zip(
            config.epochs,
            (0, 0, 0, 0.5 + shift),  # unaligned
            (0.0, 0.09 + shift, 0.05, 0.02),  # under P_end
            (0.0, 0.19 + shift, 0.35, 0.02),  # under P_t
            (0.8, 0.52 + shift, 0.3, 0.02),  # at the end, under P_t
            (9.0, 9.0, 8.0, 10.0),  # distance under P_t
            strict=True,
        )
        parts = []
        for t, unaligned, under_end, same_epoch, at_end, distance in rows:
            own = AlignedEpoch(
                math.nan, metrics(same_epoch), metrics(at_end), {30: metrics(under_end)}, distance, 10.0, None
            )
            parts.append(EpochRecord(t, None, metrics(unaligned), math.nan, {"weights": own}))
        return TrajectoryRecord((0, 1), tuple(parts))

    found = {entry.id: entry for entry in judge(config, [record(shift) for shift in (-0.01, 0.0, 0.01)])}
    measured = {
        "unaligned_barrier": 0.5,
        "one_permutation_aligns_every_epoch_weights": 0.09,
        "one_permutation_aligns_the_end_weights": 0.02,
        "early_permutations_fail_weights": 0.5,
        "early_permutations_are_closer": -0.15,
        "early_permutations_are_worse_in_place": 0.2,
    }
    assert {name: round(entry.measured, 6) for name, entry in found.items()} == measured
    assert all(entry.holds for entry in found.values())
    worse = {entry.id: entry.holds for entry in judge(config, [record(s) for s in (-0.2, 0.0, 0.29)])}
    assert worse == dict.fromkeys(measured, True) | {
        "one_permutation_aligns_every_epoch_weights": False,
        "early_permutations_fail_weights": False,
    }
    assert early_epochs([0, 1, 2, 3, 4, 30]) == [1, 2, 3]
    assert early_epochs([0, 2, 4]) == [1]
    assert not claim("x", "", "", np.array([1.0, -0.1])).holds
    assert claim("x", "", "", np.array([1.0])).holds
    assert claim("x", "", "", np.array([-1.0]), below=True).holds
