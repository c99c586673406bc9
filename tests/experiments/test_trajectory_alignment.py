"""The experiment of section 5.1 in small: its numbers, its files, and what happens when it is run again."""

import csv
import dataclasses
import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import rebasin
from experiments.harness.console import Reporter
from experiments.harness.pairs import run_directory
from experiments.harness.paths import METRICS
from experiments.harness.presets import Thresholds
from experiments.harness.results import Results
from experiments.trajectory_alignment import EXPERIMENT, Config
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset, normalise
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory


def small_config(**changes):
    recipe = build_recipe(
        "trajectory", dataset="digits", model="mlp", width=16, epochs=4, warmup_epochs=1, batch_size=32
    )
    fields = {
        "recipe": recipe,
        "replicates": 2,
        "seed": 0,
        "methods": ("weights", "activations"),
        "epochs": (0, 1, 2, 4),
        "match_epochs": (1, 4),
        "num_alphas": 5,
        "num_eval": 200,
        "num_match": 100,
        "thresholds": Thresholds(0.4, 0.1, 0.03),
    }
    return Config(**(fields | changes))


def quiet():
    return Reporter(Console(file=io.StringIO(), width=80))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("experiment")
    text = io.StringIO()
    reporter = Reporter(Console(file=text, width=80))
    results = EXPERIMENT.run(
        small_config(),
        load_dataset("digits"),
        output_dir=folder / "out",
        runs_dir=folder / "runs",
        reporter=reporter,
    )
    return results, folder, text.getvalue()


def error_rate(params, split, dataset):
    """0–1 error in NumPy float64, layer by layer."""
    x = ((split.images - dataset.mean) / dataset.std).reshape(len(split.labels), -1).astype(np.float64)
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
    images = dataset.take(num_train=100).train.images
    curve = results.curves[1]

    def apply(variables, batch):
        return model.apply(variables, normalise(batch, dataset.mean, dataset.std))

    for method, stored in curve["methods"].items():
        for s, t, value in (
            (4, 1, stored["barriers"]["end"]["test_error"][1]),
            (2, 2, stored["barriers"]["same_epoch"]["test_error"][2]),
            (1, 4, stored["barriers"]["at_end"]["test_error"][1]),
            (1, 2, stored["fixed"]["test_error"][0][2]),
            (4, 0, stored["fixed"]["test_error"][1][0]),
        ):
            if method == "weights":
                match = rebasin.weight_matching(spec, a[s], b[s], key=jax.random.key(0))
            else:
                match = rebasin.activation_matching(spec, a[s], b[s], apply, images)
            moved = rebasin.permute(spec, match.permutation, b[t])
            # float32 may decide one or two of 200 examples differently.
            assert value == pytest.approx(barrier_by_hand(a[t], moved, test, dataset), abs=0.0101)
            if (s, t) == (4, 1):
                leaves = zip(jax.tree.leaves(a[t]), jax.tree.leaves(moved), strict=True)
                distance = np.sqrt(sum(((x - np.asarray(y, np.float64)) ** 2).sum() for x, y in leaves))
                assert stored["distance"]["end"][1] == pytest.approx(distance, rel=1e-5)
    assert curve["unaligned"]["test_error"][3] == pytest.approx(
        barrier_by_hand(a[4], b[4], test, dataset), abs=0.0101
    )


def test_results_have_the_schema_and_the_statistics(finished):
    results, folder, _ = finished
    content = json.loads((folder / "out/results.json").read_text())
    keys = "schema_version experiment config environment seconds curves summary claims"
    assert list(content) == keys.split()
    assert content["config"]["recipe"]["width"] == 16
    curves, summary = content["curves"], content["summary"]
    assert [curve["seeds"] for curve in curves] == [[0, 1], [2, 3]]
    for method in ("weights", "activations"):
        own = [curve["methods"][method] for curve in curves]
        for name in ("end", "same_epoch", "at_end"):
            for metric in METRICS:
                columns = np.array([o["barriers"][name][metric] for o in own])
                mean = summary["methods"][method]["barriers"][name][metric]["mean"]
                np.testing.assert_allclose(mean, columns.mean(0), atol=1e-6)
                assert columns.shape == (2, 4)
                assert (columns >= 0).all()
        for o in own:
            # At the last epoch P_t is P_end, whichever way it is written down.
            last = {name: series["test_loss"][-1] for name, series in o["barriers"].items()}
            assert len({*last.values(), o["fixed"]["test_loss"][-1][-1]}) == 1
            assert o["fixed_points"]["total"][-1] == 1.0
            # P_1 is one permutation, in the matrix and as that of its own epoch.
            assert o["fixed"]["test_loss"][0][1] == o["barriers"]["same_epoch"]["test_loss"][1]
            assert o["distance"]["same_epoch"][-1] == o["distance"]["end"][-1]
            layers = o["fixed_points"]["groups"]
            np.testing.assert_allclose(
                o["fixed_points"]["total"], np.mean(list(layers.values()), axis=0), rtol=1e-6
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
    curve = results.curves[1]
    for key, value in (
        (("1", "none", "", "2", "test_loss"), curve["unaligned"]["test_loss"][2]),
        (
            ("1", "weights", "4", "1", "test_loss"),
            curve["methods"]["weights"]["barriers"]["end"]["test_loss"][1],
        ),
        (
            ("1", "activations", "1", "2", "train_loss"),
            curve["methods"]["activations"]["fixed"]["train_loss"][0][2],
        ),
        (
            ("1", "weights", "0", "4", "test_loss"),
            curve["methods"]["weights"]["barriers"]["at_end"]["test_loss"][0],
        ),
    ):
        assert float(found[key]["barrier"]) == pytest.approx(value, rel=1e-5)
    assert float(found["1", "none", "", "2", "test_loss"]["endpoint_b"]) == pytest.approx(
        curve["endpoints"]["test_loss"]["b"][2], rel=1e-5
    )


def test_table_fits_80_columns_and_says_what_it_shows(finished):
    _, _, text = finished
    assert max(len(line) for line in text.splitlines() if not line.startswith(("/", "disk:"))) <= 80
    assert "…" not in text
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
        reporter=quiet(),
    )
    assert all(figure.stat().st_size > 10_000 for figure in figures)
    assert (folder / "out/results.json").read_bytes() == before
    assert not (folder / "none").exists()
    assert again.claims == Results.load(folder / "out/results.json").claims


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
            reporter=quiet(),
        )
    assert str(info.value).splitlines() == [
        f"{folder / 'out/results.json'} is of another config; choose another folder:",
        "  replicates: 2 there, 3 wanted",
        "  num_alphas: 5 there, 7 wanted",
    ]
    assert (folder / "out/results.json").read_bytes() == before


def test_an_unfinished_run_needs_resume_and_keeps_its_replicates(finished, tmp_path):
    _, folder, _ = finished
    complete = Results.load(folder / "out/results.json")
    partial = dataclasses.replace(complete, curves=complete.curves[:1], summary={}, claims=[])
    tmp_path.joinpath("out").mkdir()
    partial.save(tmp_path / "out/results.json")
    arguments = {"output_dir": tmp_path / "out", "runs_dir": folder / "runs", "reporter": quiet()}
    with pytest.raises(
        ConfigError, match=r"unfinished run \(1 replicates done\); pass --resume to go on with it"
    ):
        EXPERIMENT.run(small_config(), load_dataset("digits"), **arguments)
    resumed = EXPERIMENT.run(small_config(), load_dataset("digits"), resume=True, **arguments)
    # To the last bit: what is summed up has gone through the file's seven digits either way.
    assert (resumed.curves, resumed.summary) == (complete.curves, complete.summary)
    assert Results.load(tmp_path / "out/results.json").claims == complete.claims


@pytest.mark.parametrize(("keep", "left"), [("none", None), ("ends", (0, 4))])
def test_networks_are_dropped_and_the_numbers_stay(finished, tmp_path, keep, left):
    _, folder, _ = finished
    complete = Results.load(folder / "out/results.json")
    output, runs = tmp_path / "out", tmp_path / "runs"
    config = small_config(replicates=1, methods=("weights",))
    results = EXPERIMENT.run(
        config, load_dataset("digits"), output_dir=output, runs_dir=runs, keep=keep, reporter=quiet()
    )
    ours, theirs = (r.curves[0]["methods"]["weights"] for r in (results, complete))
    assert ours == theirs
    assert not runs.exists()
    if left is None:
        assert not (output / "networks").exists()
    else:
        stored = [Trajectory(run_directory(output / "networks", config.recipe, seed)) for seed in (0, 1)]
        assert [trajectory.epochs for trajectory in stored] == [left, left]


def test_networks_found_elsewhere_are_never_dropped(finished, tmp_path):
    _, folder, _ = finished
    config = small_config(replicates=1, methods=("weights",))
    arguments = {"output_dir": tmp_path / "out", "runs_dir": folder / "runs", "keep": "none"}
    EXPERIMENT.run(config, load_dataset("digits"), **arguments, reporter=quiet())
    assert not (tmp_path / "out/networks").exists()
    found = Trajectory(run_directory(folder / "runs", config.recipe, 0))
    assert found.epochs == (0, 1, 2, 3, 4)


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(replicates=0, num_alphas=1, epochs=(0, 2), methods=("magic",))
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  replicates: wanted at least 1, got 0",
        "  num_alphas: wanted at least 2, both ends of the segment, got 1",
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
    assert content["summary"]["unaligned"]["test_error"]["deviation"] == [None] * 3
