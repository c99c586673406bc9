"""One pair of networks of the paper, for a machine that is lent for minutes.

Trains a pair from two seeds by the paper's recipe and measures it as `training_trajectories` does, what
matters first: under the same options it writes the same numbers. It stops before --time_limit, stores
everything when measured, and draws what it has. The same command with --resume goes on. Its results.json, a
few hundred kB, is all that has to be taken along; several of them are combined by --merge.

  python -m experiments.paper_pair --model=vgg16 --seed=0 --time_limit=560
  python -m experiments.paper_pair --model=vgg16 --seed=0 --time_limit=560 --resume
  python -m experiments.paper_pair --model=vgg16 --seed=0 --time_limit=560 --algorithm=best
  python -m experiments.training_trajectories --merge paper_pairs/vgg16_seed_0_paper/results.json
    paper_pairs/vgg16_seed_2_paper/results.json --output_dir=results/cifar10_vgg16_full
  python -m experiments.paper_pair --preset=digits --epochs=4 --time_limit=60 --output_dir=/tmp/dry_run

The pair of --seed=0 has the seeds 0 and 1, so that the next one is --seed=2. Results go to --output_dir, by
default paper_pairs/<model>_seed_<seed>_<algorithm>. Of the networks, the measured epochs stay in --runs_dir:
a second command, such as that with --algorithm=best, finds them there.

On an H200 a pair of VGG-16 was trained in 305 s and a pair of ResNet-20 in 545 s. By estimate, not yet run,
VGG-16 ends within 560 s and ResNet-20 takes two commands. A command of the same kind starts 20 to 30 s sooner
with a compilation cache (JAX_COMPILATION_CACHE_DIR). The last line is a dry run of a minute on a CPU.

By default 10 epochs are recorded, 5 permutations are applied at all of them, and paths have 25 alphas and
5,000 training and 5,000 test examples.
"""

from absl import app, flags

from experiments import training_trajectories
from experiments.harness import options
from experiments.training_trajectories import EXPERIMENT, TrajectoryConfig

__all__ = ["EXPERIMENT", "build_config", "main"]

options.define_flags(__name__, methods=True, strict=True, time_limit=True)
for _name in ("record_epochs", "match_epochs"):
    flags.declare_key_flag(_name)

# What this binary fills in, and what it fills in for the preset of the paper alone: the epochs of the paper's
# published curves, and half of its examples.
_DEFAULTS = {"preset": "paper", "replicates": 1, "keep_checkpoints": "measured"}
_PAPER_DEFAULTS = {
    "record_epochs": ["0", "1", "3", "5", "10", "20", "50", "80", "110", "150"],
    "match_epochs": ["3", "5", "10", "20"],
    "num_eval": 5_000,
}


def build_config() -> TrajectoryConfig:
    """Build the config that the flags describe, and give the flags that are not given their defaults here."""
    _fill_in(_DEFAULTS)
    if flags.FLAGS["preset"].value == "paper" and not flags.FLAGS["epochs"].present:
        _fill_in(_PAPER_DEFAULTS)
    config = training_trajectories.build_config()
    recipe = config.recipe
    _fill_in({"output_dir": f"paper_pairs/{recipe.model}_seed_{config.seed}_{config.algorithm}"})
    return config


def _fill_in(defaults: dict[str, object]) -> None:
    """Set those flags that are not given; other binaries of this process keep their own defaults."""
    for name, value in defaults.items():
        if not flags.FLAGS[name].present:
            flags.FLAGS[name].value = value


def main(arguments: list[str]) -> None:
    """Run the experiment on one pair."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
