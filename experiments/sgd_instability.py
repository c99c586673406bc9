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

from absl import app, flags

from experiments.harness import method_option, options, strict_option
from experiments.harness.matchers import PAPER_METHODS
from experiments.instability_analysis import EXPERIMENT, Config

for _module in (options, method_option, strict_option):
    flags.adopt_module_key_flags(_module)  # so that --help lists them
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
    choice = options.choose("instability")
    return Config(
        **choice.fields,
        methods=tuple(method_option.METHODS.value or PAPER_METHODS),
        epochs=options.choose_epochs(_SPAWN.value, choice.preset.spawn_epochs, choice.last),
        onset_at_most=_ONSET.value,
        num_eval=choice.num_eval,
    )


def main(arguments: list[str]) -> None:
    """Runs the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config, strict=strict_option.STRICT)


if __name__ == "__main__":
    app.run(main)
