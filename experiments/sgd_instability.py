"""The permutation of two parents aligns their children from the onset of linear connectivity on.

Reproduces the second half of section 5.1 of arXiv 2404.06498 (figure 1 right, figures 8 and 9 column 3),
after the instability analysis of Frankle et al. 2020 (arXiv 1912.05671): pairs of parents are trained from
different seeds; at epoch t children leave them and train to the end with data orders of their own. Measured
are the barriers between siblings, between children of both parents under the parents' P_end, and between the
parents. The onset of linear connectivity is the epoch from which on siblings have a test error barrier of at
most --onset_at_most. Prints a table and the paper's claims with a verdict each, and writes results.json,
barriers.csv and sgd_instability.png.

  python -m experiments.sgd_instability --preset=digits --output_dir=results/digits_mlp_instability
  python -m experiments.sgd_instability --preset=cpu --model=mlp --output_dir=results/mnist_mlp_instability

Training dominates: three networks for each replicate and epoch of --spawn_epochs. BUILD_NOTES.md has times
and hardware. A finished run of the same options is only drawn anew.
"""

import pathlib
import sys

from absl import app, flags

from experiments import options
from experiments.instability_analysis import Config, run
from experiments.presets import choose_preset
from rebasin.data import load_dataset
from rebasin.errors import RebasinError
from rebasin.recipes import REGIMES

flags.adopt_module_key_flags(options)  # so that --help lists them
_SPAWN = flags.DEFINE_list(
    "spawn_epochs", None, "Epochs at which children part, for example 0,1,2,5; by default the preset's."
)
_ONSET = flags.DEFINE_float(
    "onset_at_most",
    0.02,
    "Test error barrier, a fraction, up to which siblings are linearly connected.",
    lower_bound=0,
)


def build_config() -> Config:
    """The experiment that the flags describe."""
    preset = choose_preset(options.PRESET.value, options.MODEL.value)
    warmup = options.WARMUP_EPOCHS.value
    recipe = preset.build_recipe(
        "instability",
        dataset=options.DATASET.value,
        width=options.WIDTH.value,
        epochs=options.EPOCHS.value,
        # Presets have the warm-up of trajectories; a long one would make networks stable from the start.
        warmup_epochs=REGIMES["instability"]["warmup_epochs"] if warmup is None else warmup,
    )
    return Config(
        recipe=recipe,
        replicates=options.REPLICATES.value or preset.replicates,
        seed=options.SEED.value,
        methods=tuple(options.MATCHING.value),
        epochs=options.choose_epochs(_SPAWN.value, preset.spawn_epochs, recipe.epochs),
        onset_at_most=_ONSET.value,
        num_alphas=options.NUM_ALPHAS.value,
        num_eval=options.NUM_EVAL.value or preset.num_eval,
        num_match=options.NUM_MATCH.value or preset.num_match,
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
            keep=options.KEEP_CHECKPOINTS.value or "ends",
            resume=options.RESUME.value,
        )
    except RebasinError as error:
        sys.exit(f"error: {error}")
    if options.STRICT.value and not all(claim.holds for claim in results.claims):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
