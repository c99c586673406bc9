"""Compares weight, covariance and activation matching over learning rates.

Reproduces the comparison of arXiv 2310.19103, section 6, on an MLP: trains pairs of networks at each learning
rate, matches them by the three methods, and measures the test loss half way between. Prints a table and the
paper's claims with a verdict each, and writes results.json, rates.csv and learning_rates.png.

  python -m experiments.learning_rates --preset=digits --output_dir=results/rates_digits
  python -m experiments.learning_rates --preset=cpu --model=mlp --output_dir=results/rates_mnist

Training dominates: two networks for each replicate and rate. A finished run of the same options is only drawn
anew.
"""

from absl import app, flags

from experiments.harness import options, strict_option
from experiments.rate_comparison import EXPERIMENT, PAPER_RATES, Config
from rebasin.errors import ConfigError

for _module in (options, strict_option):
    flags.adopt_module_key_flags(_module)  # so that --help lists them
_RATES = flags.DEFINE_list("rates", [f"{rate:g}" for rate in PAPER_RATES], "Peak learning rates, ascending.")


def build_config() -> Config:
    """The experiment that the flags describe."""
    choice = options.choose()
    try:
        rates = tuple(float(rate) for rate in _RATES.value)
    except ValueError:
        raise ConfigError(f"wanted rates, such as 0.01,0.1, got {','.join(_RATES.value)!r}") from None
    return Config(**choice.fields, rates=rates, num_test=choice.num_eval)


def main(arguments: list[str]) -> None:
    """Runs the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config, strict=strict_option.STRICT)


if __name__ == "__main__":
    app.run(main)
