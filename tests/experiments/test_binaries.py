"""The binaries: every flag that one lists acts, and what the user gets wrong is one message."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import (
    compare_methods,
    layerwise_alignment,
    learning_rates,
    loss_landscape,
    mask_transport,
    mask_transport_widths,
    optimal_transport,
    paper_pair,
    sgd_instability,
    sparse_connectivity,
    stability_interventions,
    strong_connectivity,
    training_trajectories,
    transitivity,
    weight_magnitude,
    width_scaling,
)
from experiments.harness.experiment import Experiment
from experiments.harness.networks import KEEP
from experiments.harness.results import Claim, Results

BINARIES = (
    training_trajectories,
    paper_pair,
    sgd_instability,
    sparse_connectivity,
    mask_transport,
    mask_transport_widths,
    strong_connectivity,
    transitivity,
    compare_methods,
    learning_rates,
    optimal_transport,
    width_scaling,
    loss_landscape,
    weight_magnitude,
    layerwise_alignment,
    stability_interventions,
)

# A value of each flag that is nobody's default. A flag that is missing here fails the test.
SAMPLES = {
    "preset": "cpu",
    "output_dir": "elsewhere",
    "runs_dir": "networks",
    "seed": "7",
    "replicates": "6",
    "dataset": "mnist",
    "data_dir": "data",
    "model": "vit",
    "num_train": "1000",
    "width": "19",
    "epochs": "25",
    "warmup_epochs": "2",
    "resume": "true",
    "algorithm": "paper",
    "strict": "true",
    "time_limit": "600",
    "merge": "true",
    "methods": "covariance",
    "num_alphas": "9",
    "num_eval": "123",
    "num_match": "123",
    "keep_checkpoints": "none",
    "record_epochs": "0,1,30",
    "match_epochs": "4",
    "spawn_epochs": "1,2",
    "onset_at_most": "0.1",
    "num_repair": "77",
    "num_steps": "8",
    "rates": "0.01,0.02",
    "lengths": "1,4",
    "variants": "adam",
    "sides": "2,8",
    "depths": "1,2",
    "tolerances": "0.4,0.2",
    "levels": "3",
    "rewind_epoch": "2",
    "rewind": "learning_rate",
    "matching_margin": "0.01",
    "widths": "8,16",
    "joint": "universe",
    "joint_steps": "3",
    "connected_at_most": "0.3",
    "loss_at_most": "0.3",
    "num_networks": "6",
    "plane_epochs": "2",
    "grid_size": "7",
    "num_grid": "99",
    "prune_epochs": "2",
    "fractions": "0,0.3",
    "rewind_epochs": "4",
    "partial": "permutations",
    "stable_at_most": "0.1",
}


def call(binary, *arguments):
    """Parses flags in this process and runs the binary; returns its exit status or message."""
    with flagsaver.flagsaver():
        flags.FLAGS([binary.__name__, "--output_dir=out", *arguments])
        try:
            binary.main([binary.__name__])
        except SystemExit as stopped:
            return stopped.code
    return 0


@pytest.fixture
def seen(monkeypatch):
    """What the experiment is asked to do, in place of doing it."""
    calls = []

    def run(experiment, config, dataset, **options):
        calls.append((experiment, config, dataset, options))
        return Results(experiment.name, config, claims=[Claim("x", "", "", 0.0, 0.0, 0.0, holds=False)])

    monkeypatch.setattr("experiments.harness.options.load_dataset", lambda *names, **where: (names, where))

    def merge(experiment, paths, **options):
        calls.append((experiment, paths, None, options))

    monkeypatch.setattr(Experiment, "run", run)
    monkeypatch.setattr(Experiment, "merge", merge)
    return calls


def listed(binary):
    """Names of the flags in the binary's help."""
    return {flag.name for flag in flags.FLAGS.get_key_flags_for_module(binary)}


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.__name__)
def test_every_flag_that_a_binary_lists_acts(binary, seen):
    # Epochs among the samples are those of the digits.
    base = ["--preset=digits"] * (binary is paper_pair)
    before = (call(binary, *base), seen.pop())
    for name in sorted(listed(binary)):
        status = call(binary, *base, f"--{name}={SAMPLES[name]}")
        # These read the layers of some models alone.
        refused = {optimal_transport: "one of mlp, vgg16, resnet20", width_scaling: "mlp"}
        if binary in refused and name == "model":
            assert status.endswith(f"model: wanted {refused[binary]}, got 'vit'")
            continue
        after = (status, seen.pop())
        assert after != before, f"--{name} changes nothing"
    assert call(binary) == 0


def test_flags_that_some_binaries_lack():
    every = set.intersection(*map(listed, BINARIES))
    assert {
        name: [b.__name__.split(".")[1] for b in BINARIES if name in listed(b)]
        for name in SAMPLES
        if name not in every
    } == {
        "strict": [
            "training_trajectories",
            "paper_pair",
            "sgd_instability",
            "sparse_connectivity",
            "mask_transport",
            "mask_transport_widths",
            "strong_connectivity",
            "transitivity",
            "learning_rates",
            "optimal_transport",
            "width_scaling",
            "loss_landscape",
            "weight_magnitude",
            "layerwise_alignment",
            "stability_interventions",
        ],
        "methods": [
            "training_trajectories",
            "paper_pair",
            "sgd_instability",
            "sparse_connectivity",
            "mask_transport",
            "mask_transport_widths",
            "strong_connectivity",
            "transitivity",
            "compare_methods",
            "loss_landscape",
            "weight_magnitude",
            "layerwise_alignment",
            "stability_interventions",
        ],
        "time_limit": ["training_trajectories", "paper_pair"],
        "merge": ["training_trajectories", "mask_transport", "mask_transport_widths"],
        "record_epochs": ["training_trajectories", "paper_pair"],
        "match_epochs": ["training_trajectories", "paper_pair"],
        "spawn_epochs": ["sgd_instability"],
        "onset_at_most": ["sgd_instability"],
        "num_repair": ["compare_methods"],
        "num_steps": ["compare_methods"],
        "rates": ["learning_rates", "optimal_transport"],
        "lengths": ["optimal_transport"],
        "variants": ["optimal_transport"],
        "sides": ["width_scaling"],
        "depths": ["width_scaling"],
        "tolerances": ["width_scaling"],
        "levels": ["sparse_connectivity", "mask_transport", "mask_transport_widths"],
        "rewind_epoch": ["sparse_connectivity", "mask_transport", "mask_transport_widths"],
        "rewind": ["sparse_connectivity", "mask_transport"],
        "matching_margin": ["mask_transport"],
        "widths": [
            "mask_transport_widths",
            "strong_connectivity",
            "transitivity",
            "optimal_transport",
            "width_scaling",
        ],
        "joint": ["strong_connectivity", "transitivity"],
        "joint_steps": ["strong_connectivity", "transitivity"],
        "connected_at_most": ["strong_connectivity", "transitivity"],
        "loss_at_most": ["strong_connectivity", "transitivity"],
        "num_networks": ["transitivity"],
        "plane_epochs": ["loss_landscape"],
        "grid_size": ["loss_landscape"],
        "num_grid": ["loss_landscape"],
        "prune_epochs": ["weight_magnitude"],
        "fractions": ["weight_magnitude"],
        "rewind_epochs": ["layerwise_alignment"],
        "partial": ["layerwise_alignment"],
        "stable_at_most": ["stability_interventions"],
    }


def test_a_binary_does_not_know_the_flags_that_it_does_not_list():
    """In a process of their own, as here other binaries have defined them."""
    program = """
from absl import flags
import experiments.learning_rates

assert "strict" in flags.FLAGS
assert "methods" not in flags.FLAGS
delattr(flags.FLAGS, "strict")
import experiments.compare_methods

assert "methods" in flags.FLAGS
assert "strict" not in flags.FLAGS
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_what_stays_on_disk(seen, monkeypatch):
    monkeypatch.setenv("REBASIN_RUNS_DIR", "/shared")
    for arguments, keep, runs in (
        ([], None, "out/runs"),
        (["--preset=cpu"], None, "/shared"),
        (["--preset=paper"], "ends", "/shared"),
        (["--preset=paper", "--keep_checkpoints=all", "--runs_dir=here"], "all", "here"),
    ):
        call(training_trajectories, *arguments)
        options = seen.pop()[-1]
        assert (options["keep"], options["runs_dir"]) == (keep, pathlib.Path(runs))
    assert {binary.EXPERIMENT.keep for binary in BINARIES} <= set(KEEP)


def test_warm_up_follows_recipe_and_epochs(seen):
    for binary, arguments, warmup in (
        (training_trajectories, [], 5),
        (training_trajectories, ["--epochs=3"], 3),
        (compare_methods, ["--preset=cpu", "--model=vgg16"], 2),
        (learning_rates, ["--preset=cpu", "--model=mlp"], 0),
        (sgd_instability, ["--preset=cpu", "--model=vgg16"], 3),
        (sgd_instability, ["--preset=cpu", "--model=mlp"], 1),
        (sgd_instability, ["--warmup_epochs=0"], 0),
    ):
        assert call(binary, *arguments) == 0
        recipe = seen.pop()[1].recipe
        assert recipe.warmup_epochs == warmup
        assert recipe.weight_decay == (0 if binary in (sgd_instability, learning_rates) else 1e-4)
        assert recipe.warmup_steps == (10 if binary is learning_rates else 0)


def test_epochs_by_flag_and_preset(seen):
    call(training_trajectories, "--epochs=12")
    config = seen.pop()[1]
    assert config.epochs == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
    assert config.match_epochs == (0, 1, 2, 3, 5, 10, 12)
    call(training_trajectories, "--record_epochs=0,2,30")
    assert seen.pop()[1].match_epochs == (0, 2, 30)
    call(sgd_instability, "--epochs=7")
    assert seen.pop()[1].epochs == (0, 1, 2, 3, 4, 5, 6)


def test_a_tilde_in_the_output_folder_is_the_home_folder(seen, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert call(compare_methods, "--output_dir=~/x") == 0
    options = seen.pop()[3]
    assert options["output_dir"] == pathlib.Path("/home/somebody/x")
    assert options["runs_dir"] == pathlib.Path("/home/somebody/x/runs")


def test_what_the_user_gets_wrong_is_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for binary, arguments, message in (
        (training_trajectories, ["--dataset=imagenet"], "error: unknown dataset 'imagenet'"),
        (compare_methods, ["--output_dir="], "error: --output_dir is empty; name a folder for results.json"),
        (
            compare_methods,
            ["--preset=cpu", f"--data_dir={tmp_path}"],
            f"error: dataset 'mnist' is not prepared: no {tmp_path}/mnist/",
        ),
        (compare_methods, ["--model=vgg16"], "error: preset 'digits' has no recipe for the model 'vgg16'"),
        (
            compare_methods,
            ["--num_alphas=4"],
            "error: this experiment cannot work:\n  num_alphas: wanted an odd",
        ),
        (learning_rates, ["--rates=fast"], "error: wanted rates, such as 0.01,0.1, got 'fast'"),
        (mask_transport_widths, ["--widths=8,wide"], "error: wanted widths, such as 16,32,64, got '8,wide'"),
        (sgd_instability, ["--spawn_epochs=one"], "error: wanted epochs, such as 0,1,5, got 'one'"),
        (
            sgd_instability,
            ["--epochs=3", "--warmup_epochs=4"],
            "error: this recipe cannot work:\n  warmup_epochs: wanted between 0 and epochs (3), got 4",
        ),
    ):
        found = call(binary, *arguments)
        assert isinstance(found, str)
        assert found.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.__name__)
def test_help_teaches(binary):
    text = flags.FLAGS.module_help(binary)
    assert all(f"--{name}:" in text or f"--[no]{name}:" in text for name in listed(binary))
    assert f"python -m {binary.__name__} --preset=digits" in binary.__doc__
    assert "results.json" in binary.__doc__


def test_default_widths_follow_the_width(seen):
    for arguments, widths in (
        ([], (16, 32, 64, 128, 256)),
        (["--width=4"], (1, 2, 4, 8)),
        (["--width=4", "--widths=3,5"], (3, 5)),
    ):
        assert call(mask_transport_widths, *arguments) == 0
        assert seen.pop()[1].widths == widths


def test_the_pair_of_the_paper(seen):
    def config(*arguments):
        assert call(paper_pair, *arguments) == 0
        _, config, _, options = seen.pop()
        return config, options

    found, options = config("--model=vgg16", "--seed=2", "--time_limit=560")
    assert (found.recipe.epochs, found.recipe.width, found.replicates, found.seed) == (150, 64, 1, 2)
    assert found.epochs == (0, 1, 3, 5, 10, 20, 50, 80, 110, 150)
    assert found.match_epochs == (3, 5, 10, 20, 150)
    assert (found.num_eval, found.num_match, found.algorithm, found.num_alphas) == (5_000, None, "paper", 25)
    assert (options["keep"], options["deadline"].limit) == ("measured", 560.0)
    assert config("--epochs=7")[0].epochs == (0, 1, 2, 3, 5, 7)
    assert config("--preset=digits", "--num_eval=9")[0].num_eval == 9
    with flagsaver.flagsaver():
        flags.FLAGS(["paper_pair", "--model=resnet20", "--algorithm=best"])
        paper_pair.build_config()
        assert flags.FLAGS["output_dir"].value == "paper_pairs/resnet20_seed_0_best"
    # The defaults of this binary are its own.
    call(training_trajectories)
    assert seen.pop()[1].replicates == 5
