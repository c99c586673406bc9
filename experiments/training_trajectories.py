"""One permutation aligns two whole training trajectories.

Reproduces section 5.1 and appendices E and H.1 of arXiv 2404.06498 (figures 1 left, 4, 7, 8, 9, 10, 15 and
21): trains pairs of networks from different seeds, finds permutations at the end and along the way by weight
and by activation matching, and measures loss and error barriers between the networks of every recorded epoch
under each of them. Prints a table by epoch for each method and the paper's claims with a verdict each, and
writes results.json, barriers.csv, training_trajectories.png (figures 1, 4, 8), fixed_permutations.png (7, 8,
10) and permutations.png (distances and fixed points).

  python -m experiments.training_trajectories --preset=digits --output_dir=results/demo
  python -m experiments.training_trajectories --preset=cpu --model=mlp --output_dir=results/mnist_mlp
  python -m experiments.training_trajectories --preset=cpu --model=vgg16 --output_dir=results/cifar10_vgg16

The time goes into sweeps, at most one for each method, epoch s of --match_epochs and epoch t of
--record_epochs, and two more for each method and t. BUILD_NOTES.md has times and hardware. A finished run of
the same options is only drawn anew.
"""

import pathlib
import sys

from absl import app, flags

from experiments import options
from experiments.presets import choose_preset
from experiments.trajectory_alignment import Config, run
from rebasin.data import load_dataset
from rebasin.errors import RebasinError

flags.adopt_module_key_flags(options)  # so that --help lists them
_RECORD = flags.DEFINE_list(
    "record_epochs", None, "Epochs t to compare, for example 0,1,2,5,10; by default the preset's."
)
_MATCH = flags.DEFINE_list(
    "match_epochs",
    None,
    "Epochs s, among those recorded, whose permutations are applied at every t; by default the preset's. The "
    "last epoch is always among them.",
)


def build_config() -> Config:
    """The experiment that the flags describe."""
    preset = choose_preset(options.PRESET.value, options.MODEL.value)
    recipe = preset.build_recipe(
        "trajectory",
        dataset=options.DATASET.value,
        width=options.WIDTH.value,
        epochs=options.EPOCHS.value,
        warmup_epochs=options.WARMUP_EPOCHS.value,
    )
    last = recipe.epochs
    epochs = options.choose_epochs(_RECORD.value, preset.epochs, last)
    if _RECORD.value is None:
        epochs = (*epochs, last)
    matched = set(options.choose_epochs(_MATCH.value, preset.match_epochs, last))
    if _MATCH.value is None:
        matched &= set(epochs)
    return Config(
        recipe=recipe,
        replicates=options.REPLICATES.value or preset.replicates,
        seed=options.SEED.value,
        methods=tuple(options.MATCHING.value),
        epochs=epochs,
        match_epochs=tuple(sorted(matched | {last})),
        num_alphas=options.NUM_ALPHAS.value,
        num_eval=options.NUM_EVAL.value or preset.num_eval,
        num_match=options.NUM_MATCH.value or preset.num_match,
        thresholds=preset.thresholds,
    )


def main(argv: list[str]) -> None:
    """Runs the experiment; what the user got wrong is one line on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    options.hush_library_logs()
    try:
        config = build_config()
        dataset = load_dataset(config.recipe.dataset, data_dir=options.DATA_DIR.value)
        results = run(
            config,
            dataset,
            output_dir=pathlib.Path(options.OUTPUT_DIR.value),
            runs_dir=options.runs_directory(),
            # 151 epochs of a VGG-16 of width 64, with momentum, are 18 GB.
            keep=options.KEEP_CHECKPOINTS.value or ("ends" if options.PRESET.value == "paper" else "all"),
            resume=options.RESUME.value,
        )
    except RebasinError as error:
        sys.exit(f"error: {error}")
    if options.STRICT.value and not all(claim.holds for claim in results.claims):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
