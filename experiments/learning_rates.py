"""Compares weight, covariance and activation matching over learning rates.

Reproduces the comparison of arXiv 2310.19103, section 6, on an MLP: trains pairs of networks at each learning
rate, matches them by the three methods, and measures the test loss half way between. Prints a table and the
paper's claims with a verdict each, and writes results.json, rates.csv and learning_rates.png.

  python -m experiments.learning_rates --preset=digits --output_dir=results/rates_digits
  python -m experiments.learning_rates --preset=cpu --model=mlp --output_dir=results/rates_mnist
"""

import pathlib
import sys

from absl import app, flags

from experiments import options
from experiments.presets import choose_preset
from experiments.rate_comparison import PAPER_RATES, Config, run
from rebasin.data import load_dataset
from rebasin.errors import RebasinError

flags.adopt_module_key_flags(options)  # so that --help lists them
_RATES = flags.DEFINE_list("rates", [f"{rate:g}" for rate in PAPER_RATES], "Peak learning rates, ascending.")


def build_config() -> Config:
    """The experiment that the flags describe."""
    preset = choose_preset(options.PRESET.value, options.MODEL.value)
    recipe = preset.build_recipe(
        "trajectory", dataset=options.DATASET.value, width=options.WIDTH.value, epochs=options.EPOCHS.value
    )
    return Config(
        recipe=recipe,
        rates=tuple(float(rate) for rate in _RATES.value),
        replicates=options.REPLICATES.value or preset.replicates,
        seed=options.SEED.value,
        num_alphas=options.NUM_ALPHAS.value,
        num_test=options.NUM_EVAL.value or preset.num_eval,
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
            resume=options.RESUME.value,
        )
    except RebasinError as error:
        sys.exit(f"error: {error}")
    if options.STRICT.value and not all(claim.holds for claim in results.claims):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
