"""The experiment of section 5.1 in small: its numbers, its files, and what happens when it is run again."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import rebasin
from experiments.console import Reporter
from experiments.pairs import run_directory
from experiments.presets import PRESETS, Thresholds, choose_preset
from experiments.results import Results
from experiments.statistics import student_interval
from experiments.trajectory_alignment import ALIGNMENTS, METRICS, Config, run
from rebasin.data import load_dataset
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.recipes import build_recipe
from rebasin.trajectory import Trajectory


def small_config(**changes):
    recipe = build_recipe(
        "trajectory", dataset="digits", model="mlp", width=16, epochs=4, warmup_epochs=1, batch_size=32
    )
    fields = {
        "recipe": recipe,
        "replicates": 2,
        "seed": 0,
        "epochs": (0, 1, 4),
        "num_alphas": 5,
        "num_eval": 200,
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
    results = run(
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


def test_barriers_are_those_of_the_networks_on_disk(finished):
    """Everything from the checkpoints again, by plain NumPy, for one replicate and epoch."""
    results, folder, _ = finished
    config, dataset = small_config(), load_dataset("digits")
    a, b = (Trajectory(run_directory(folder / "runs", config.recipe, seed)) for seed in (2, 3))
    model = build_model("mlp", width=16, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    test = dataset.take(num_train=200, num_test=200).test
    at = {"end": 4, "same_epoch": 1}
    for name in ("unaligned", "end", "same_epoch", "at_end"):
        source = at.get(name, 1)
        match = rebasin.weight_matching(spec, a[source], b[source], key=jax.random.key(0))
        measured_at = 4 if name == "at_end" else 1
        params_a, params_b = a[measured_at], b[measured_at]
        if name != "unaligned":
            params_b = rebasin.permute(spec, match.permutation, params_b)
        errors = []
        for alpha in np.linspace(0, 1, 5):
            mixed = jax.tree.map(lambda x, y, alpha=alpha: alpha * x + (1 - alpha) * y, params_a, params_b)
            errors.append(error_rate(mixed, test, dataset))
        chord = np.linspace(errors[0], errors[-1], 5)
        stored = results.curves[1]["barriers"][name]["test_error"][1]
        # float32 may decide one or two of 200 examples differently.
        np.testing.assert_allclose(stored, (errors - chord).max(), atol=0.0101)


def test_results_have_the_schema_and_the_statistics(finished):
    results, folder, _ = finished
    content = json.loads((folder / "out/results.json").read_text())
    assert list(content) == [
        "schema_version",
        "experiment",
        "config",
        "environment",
        "seconds",
        "curves",
        "summary",
        "claims",
    ]
    assert content["config"]["recipe"]["width"] == 16
    assert [curve["seeds"] for curve in content["curves"]] == [[0, 1], [2, 3]]
    for name in ALIGNMENTS:
        for metric in METRICS:
            columns = np.array([curve["barriers"][name][metric] for curve in content["curves"]])
            np.testing.assert_allclose(
                content["summary"]["barriers"][name][metric]["mean"], columns.mean(0), atol=1e-6
            )
            assert columns.shape == (2, 3)
            assert (columns >= 0).all()
    # At the last epoch P_t is P_end, whichever way it is written down.
    for curve in content["curves"]:
        last = {name: curve["barriers"][name]["test_loss"][-1] for name in ("end", "same_epoch", "at_end")}
        assert len(set(last.values())) == 1
        assert curve["fixed_points"][-1] == 1.0
    assert {claim["id"] for claim in content["claims"]} == {
        "unaligned_barrier",
        "one_permutation_aligns_every_epoch",
        "one_permutation_aligns_the_end",
        "early_permutations_fail",
    }
    for claim in content["claims"]:
        assert claim["low"] <= claim["measured"] <= claim["high"]


def test_csv_is_tidy(finished):
    results, folder, _ = finished
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * len(ALIGNMENTS) * len(METRICS)
    row = next(
        r
        for r in rows
        if (r["replicate"], r["epoch"], r["alignment"], r["metric"]) == ("1", "1", "end", "test_loss")
    )
    assert float(row["barrier"]) == pytest.approx(
        results.curves[1]["barriers"]["end"]["test_loss"][1], rel=1e-5
    )


def test_table_fits_80_columns_and_says_what_it_shows(finished):
    _, _, text = finished
    assert max(len(line) for line in text.splitlines() if not line.startswith("/")) <= 80
    assert "…" not in text
    for word in ("P_end", "P_t@end", "mean±sd of 2 pairs", "computing time", "training_trajectories.png"):
        assert word in text
    assert text.count("holds") + text.count("does not hold") >= 4


def test_a_finished_run_is_only_drawn_anew(finished):
    results, folder, _ = finished
    before = (folder / "out/results.json").read_bytes()
    figure = folder / "out/training_trajectories.png"
    figure.unlink()
    began = time.perf_counter()
    again = run(
        small_config(),
        load_dataset("digits"),
        output_dir=folder / "out",
        runs_dir=folder / "none",
        reporter=quiet(),
    )
    assert time.perf_counter() - began < 5
    assert figure.stat().st_size > 10_000
    assert (folder / "out/results.json").read_bytes() == before
    assert not (folder / "none").exists()
    assert again.claims == Results.load(folder / "out/results.json").claims


def test_another_config_is_refused_and_nothing_lost(finished):
    _, folder, _ = finished
    before = (folder / "out/results.json").read_bytes()
    other = small_config(num_alphas=7, replicates=3)
    with pytest.raises(ConfigError) as info:
        run(
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
        run(small_config(), load_dataset("digits"), **arguments)
    resumed = run(small_config(), load_dataset("digits"), resume=True, **arguments)
    # Seven digits are kept in the file.
    for name in ALIGNMENTS:
        np.testing.assert_allclose(
            [curve["barriers"][name]["test_loss"] for curve in resumed.curves],
            [curve["barriers"][name]["test_loss"] for curve in complete.curves],
            rtol=1e-6,
            atol=1e-7,
        )


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(replicates=0, num_alphas=1, epochs=(0, 2))
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  replicates: wanted at least 1, got 0",
        "  num_alphas: wanted at least 2, both ends of the segment, got 1",
        "  epochs: wanted the recipe's last, 4, at the end, got 2",
    ]
    with pytest.raises(ConfigError, match=r"epochs: wanted ascending epochs from 0 on, got \[0, 3, 2, 4\]"):
        small_config(epochs=(0, 3, 2, 4))


def test_student_interval_against_the_table():
    """t with 4 degrees of freedom is 2.776 at 97.5 %."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    interval = student_interval(values)
    half = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(interval, [3.0, 3.0 - half, 3.0 + half, np.std(values, ddof=1)], rtol=1e-3)
    assert np.isnan(student_interval([2.0])[1:]).all()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_recipes_and_end_at_their_last_epoch(name):
    for model, preset in PRESETS[name].items():
        recipe = preset.build_recipe("trajectory", width=None)
        assert recipe.model == model
        assert recipe.width == preset.recipe["width"]
        assert preset.epochs is None or preset.epochs[-1] == recipe.epochs
        assert preset.build_recipe("trajectory", epochs=7, width=9).epochs == 7


def test_unknown_presets():
    with pytest.raises(ConfigError, match="no preset is called 'gpu'; there are digits, cpu, paper"):
        choose_preset("gpu", None)
    with pytest.raises(
        ConfigError, match="preset 'digits' has no recipe for the model 'vgg16'; it has mlp, vit"
    ):
        choose_preset("digits", "vgg16")


def call_binary(*arguments, **environment):
    command = [sys.executable, "-m", "experiments.training_trajectories", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


def test_the_binary_from_end_to_end(finished, tmp_path):
    """On the networks that are trained already: flags become the same config."""
    _, folder, _ = finished
    flags = [
        "--width=16",
        "--epochs=4",
        "--warmup_epochs=1",
        "--replicates=1",
        "--record_epochs=0,4",
        "--num_alphas=3",
    ]
    done = call_binary(*flags, f"--output_dir={tmp_path}", "--preset=digits")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["config"]["epochs"], content["config"]["num_alphas"]) == ([0, 4], 3)
    assert content["summary"]["barriers"]["end"]["test_error"]["deviation"] == [None, None]
    strict = call_binary(*flags, f"--output_dir={tmp_path}", "--strict")
    assert strict.returncode == (0 if all(claim["holds"] for claim in content["claims"]) else 1)


def test_what_the_user_gets_wrong_is_one_message_and_quick(tmp_path):
    began = time.perf_counter()
    unknown = call_binary(f"--output_dir={tmp_path / 'a'}", "--dataset=imagenet")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("error: unknown dataset 'imagenet'")
    missing = call_binary(f"--output_dir={tmp_path / 'b'}", "--preset=cpu", f"--data_dir={tmp_path}")
    assert missing.stderr.startswith(f"error: dataset 'mnist' is not prepared: no {tmp_path}/mnist/")
    assert "download_and_prepare()" in missing.stderr
    assert (
        time.perf_counter() - began < 40
    )  # two interpreters; a download tried without a network takes 204 s
    assert not list(tmp_path.iterdir())


def test_help_teaches():
    text = call_binary("--help").stdout
    for flag in (
        "--preset",
        "--output_dir",
        "--replicates",
        "--[no]resume",
        "--data_dir",
        "--runs_dir",
        "--[no]strict",
    ):
        assert flag in text
    assert "python -m experiments.training_trajectories --preset=digits" in text
