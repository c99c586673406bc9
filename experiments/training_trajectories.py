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

from absl import app, flags

from experiments.harness import method_option, options, strict_option
from experiments.harness.matchers import PAPER_METHODS
from experiments.trajectory_alignment import EXPERIMENT, Config

for _module in (options, method_option, strict_option):
    flags.adopt_module_key_flags(_module)  # so that --help lists them
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
    choice = options.choose()
    epochs = options.choose_epochs(_RECORD.value, choice.preset.epochs, choice.last)
    if _RECORD.value is None:
        epochs = (*epochs, choice.last)
    matched = set(options.choose_epochs(_MATCH.value, choice.preset.match_epochs, choice.last))
    if _MATCH.value is None:
        matched &= set(epochs)
    return Config(
        **choice.fields,
        methods=tuple(method_option.METHODS.value or PAPER_METHODS),
        epochs=epochs,
        match_epochs=tuple(sorted(matched | {choice.last})),
        num_eval=choice.num_eval,
        thresholds=choice.preset.thresholds,
    )


def main(arguments: list[str]) -> None:
    """Runs the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config, strict=strict_option.STRICT)


if __name__ == "__main__":
    app.run(main)
