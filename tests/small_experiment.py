"""What the tests of the experiments share: the experiment of two trajectories in small, and a reporter."""

import io

from rich.console import Console

from experiments.harness.console import Reporter
from experiments.harness.presets import Thresholds
from experiments.training_trajectories import TrajectoryConfig
from rebasin.training.recipes import build_recipe

# A recipe that takes a second.
TINY = build_recipe(
    "trajectory",
    dataset="digits",
    model="mlp",
    width=16,
    epochs=3,
    batch_size=32,
    num_train=600,
    warmup_epochs=1,
)


def small_config(**changes):
    recipe = build_recipe(
        "trajectory", dataset="digits", model="mlp", width=16, epochs=4, warmup_epochs=1, batch_size=32
    )
    fields = {
        "recipe": recipe,
        "replicates": 2,
        "seed": 0,
        "methods": ("weights", "activations"),
        "epochs": (0, 1, 2, 4),
        "match_epochs": (1, 4),
        "num_alphas": 5,
        "num_eval": 200,
        "num_match": 100,
        "thresholds": Thresholds(0.4, 0.1, 0.03),
    }
    return TrajectoryConfig(**(fields | changes))


def reporter(text=None):
    """A reporter that writes to `text`, or to nothing that anybody reads."""
    return Reporter(Console(file=text or io.StringIO(), width=80))
