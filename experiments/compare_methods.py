"""Compares every matching method on the same pairs of trained networks.

Trains pairs of networks from different seeds (or finds them in --runs_dir), aligns each pair by every method,
and measures the loss and error barrier that is left on test data, as it is and with REPAIR. Prints a table
and writes results.json, methods.csv and compare_methods.png.

  python -m experiments.compare_methods --preset=digits --output_dir=results/methods_digits
  python -m experiments.compare_methods --preset=cpu --model=mlp --output_dir=results/methods_mnist
  python -m experiments.compare_methods --preset=cpu --model=vgg16 --output_dir=results/methods_vgg16
  python -m experiments.compare_methods --methods=weights,activations --output_dir=results/two_methods

A finished run of the same options is only drawn anew.
"""

import pathlib
import sys

from absl import app, flags

import rebasin
from experiments import options
from experiments.method_comparison import Config, run
from experiments.presets import choose_preset
from rebasin.data import load_dataset
from rebasin.errors import RebasinError

flags.adopt_module_key_flags(options)  # so that --help lists them
_METHODS = flags.DEFINE_list("methods", list(rebasin.METHODS), "Names of matching methods.")
_NUM_REPAIR = flags.DEFINE_integer("num_repair", 1000, "Training examples on which REPAIR takes statistics.")
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 100, "Gradient steps of the methods that learn a permutation.", lower_bound=1
)


def build_config() -> Config:
    """The experiment that the flags describe."""
    preset = choose_preset(options.PRESET.value, options.MODEL.value)
    recipe = preset.build_recipe(
        "trajectory", dataset=options.DATASET.value, width=options.WIDTH.value, epochs=options.EPOCHS.value
    )
    return Config(
        recipe=recipe,
        replicates=options.REPLICATES.value or preset.replicates,
        seed=options.SEED.value,
        methods=tuple(_METHODS.value),
        num_alphas=options.NUM_ALPHAS.value,
        num_test=options.NUM_EVAL.value or preset.num_eval,
        num_match=options.NUM_MATCH.value or preset.num_match,
        num_repair=_NUM_REPAIR.value,
        num_steps=_NUM_STEPS.value,
    )


def main(argv: list[str]) -> None:
    """Runs the experiment; what the user got wrong is one line on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    options.hush_library_logs()
    try:
        config = build_config()
        dataset = load_dataset(config.recipe.dataset, data_dir=options.DATA_DIR.value)
        run(
            config,
            dataset,
            output_dir=pathlib.Path(options.OUTPUT_DIR.value),
            runs_dir=options.runs_directory(),
            resume=options.RESUME.value,
        )
    except RebasinError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
