"""One permutation aligns two whole training trajectories.

Reproduces section 5.1 of arXiv 2404.06498 (figures 1 left, 4 and 8): trains pairs of networks from different
seeds, finds a permutation at the end of training, and measures the loss and error barrier between them at
every recorded epoch. Prints a table by epoch and the paper's claims with a verdict each, and writes
results.json, barriers.csv and training_trajectories.png.

  python -m experiments.training_trajectories --preset=digits --output_dir=results/demo
  python -m experiments.training_trajectories --preset=cpu --model=mlp --output_dir=results/mnist_mlp
  python -m experiments.training_trajectories --preset=cpu --model=vgg16 --output_dir=results/cifar10_vgg16

BUILD_NOTES.md has times and hardware. A finished run of the same options is only drawn anew.
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
_WARMUP = flags.DEFINE_integer("warmup_epochs", None, "Epochs of learning rate warm-up.", lower_bound=0)
_NUM_ALPHAS = flags.DEFINE_integer(
    "num_alphas", 25, "Points on each segment, both ends included.", lower_bound=2
)
_NUM_EVAL = flags.DEFINE_integer("num_eval", None, "Examples of each split on which segments are measured.")
_RECORD = flags.DEFINE_list(
    "record_epochs", None, "Epochs to compare, for example 0,1,2,5,10; by default the preset's."
)


def build_config() -> Config:
    """The experiment that the flags describe."""
    preset = choose_preset(options.PRESET.value, options.MODEL.value)
    recipe = preset.build_recipe(
        "trajectory",
        dataset=options.DATASET.value,
        width=options.WIDTH.value,
        epochs=options.EPOCHS.value,
        warmup_epochs=_WARMUP.value,
    )
    if _RECORD.value is not None:
        epochs = tuple(int(epoch) for epoch in _RECORD.value)
    else:
        epochs = tuple(e for e in preset.epochs or range(recipe.epochs) if e < recipe.epochs) + (
            recipe.epochs,
        )
    return Config(
        recipe=recipe,
        replicates=options.REPLICATES.value or preset.replicates,
        seed=options.SEED.value,
        epochs=epochs,
        num_alphas=_NUM_ALPHAS.value,
        num_eval=_NUM_EVAL.value or preset.num_eval,
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
            resume=options.RESUME.value,
        )
    except RebasinError as error:
        sys.exit(f"error: {error}")
    if options.STRICT.value and not all(claim.holds for claim in results.claims):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
