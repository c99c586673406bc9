"""Compares every matching method on the same pairs of trained networks.

Trains pairs of networks from different seeds (or finds them in --runs_dir), aligns each pair by every method,
and measures the loss and error barrier that is left on test data, as it is, with REPAIR, and, where networks
have BatchNorm, with new running statistics. Prints a table and writes results.json, methods.csv and
compare_methods.png.

  python -m experiments.compare_methods --preset=digits --output_dir=results/methods_digits
  python -m experiments.compare_methods --preset=cpu --model=mlp --output_dir=results/methods_mnist
  python -m experiments.compare_methods --preset=cpu --model=vgg16 --output_dir=results/methods_vgg16
  python -m experiments.compare_methods --methods=weights,activations --output_dir=results/two_methods

A finished run of the same options is only drawn anew.
"""

from absl import app, flags

from experiments.harness import method_option, options
from experiments.method_comparison import EXPERIMENT, METHODS, Config

for _module in (options, method_option):
    flags.adopt_module_key_flags(_module)  # so that --help lists them
_NUM_REPAIR = flags.DEFINE_integer(
    "num_repair", 1000, "Training examples on which REPAIR and norms take statistics.", lower_bound=2
)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 100, "Gradient steps of the methods that learn a permutation.", lower_bound=1
)


def build_config() -> Config:
    """The experiment that the flags describe."""
    choice = options.choose()
    return Config(
        **choice.fields,
        methods=tuple(method_option.METHODS.value or METHODS),
        num_test=choice.num_eval,
        num_repair=_NUM_REPAIR.value,
        num_steps=_NUM_STEPS.value,
    )


def main(arguments: list[str]) -> None:
    """Runs the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
