"""Recipes: everything that a training run depends on, except its seed."""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rebasin.errors import ConfigError, problem_list

__all__ = ["OPTIMIZERS", "REGIMES", "Recipe", "build_recipe", "recipe_fields"]

# What a recipe may train with.
OPTIMIZERS = ("sgd", "adam")

# How training differs between the paper's experiments (arXiv 2404.06498, App. D and H.4). `trajectory` is for
# dense and sparse trajectories, `instability` for children that are spawned during training, `remaining` for
# the rest of the main text, and the two `stability` regimes for the interventions of App. H.4.
# `optimal_transport` is for the experiments of arXiv 2310.19103, section 6.
REGIMES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "trajectory": {"warmup_epochs": 5, "weight_decay": 1e-4},
        "instability": {"warmup_epochs": 1, "weight_decay": 0.0},
        "remaining": {"warmup_epochs": 1, "weight_decay": 1e-4},
        "stability_1": {"warmup_epochs": 0, "weight_decay": 1e-4, "peak_learning_rate": 1e-3},
        "stability_2": {"warmup_epochs": 1, "weight_decay": 0.0},
        "optimal_transport": {"warmup_epochs": 0, "warmup_steps": 10, "weight_decay": 0.0},
    }
)

# The datasets that are augmented by default. Natural images keep their class when they are shifted or
# mirrored; digits and house numbers do not.
_AUGMENTED_DATASETS = frozenset({"cifar10", "cifar100"})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on, except its seed.

    A recipe is written verbatim into the run's ``run.json``. The defaults are those of arXiv 2404.06498,
    App. D.

    Attributes:
      dataset: name of the dataset, as in `rebasin.training.data`.
      model: name of the architecture, as in `rebasin.models`.
      width: width of the architecture.
      epochs: number of passes over the training split.
      num_train: size of the stratified subset of the training split to train on; `None` trains on all of it.
      batch_size: number of examples per step; a last, short batch is dropped.
      peak_learning_rate: learning rate at the end of the warm-up.
      momentum: momentum of SGD, and the decay rate β₁ of Adam's first moment, in [0, 1).
      warmup_epochs: number of epochs in which the learning rate rises linearly from 0; it then falls to 0
        along a cosine.
      warmup_steps: number of steps by which the warm-up is longer than `warmup_epochs`.
      weight_decay: factor λ of coupled L2 decay, which adds λw to the gradient of every leaf, including
        biases and norm scales.
      augment: whether to train on random crops with padding 4 and random horizontal flips.
      optimizer: ``"sgd"``, or ``"adam"`` with the usual β₂ of 0.999 and ε of 1e-8.

    Raises:
      ConfigError: a field has a value that cannot work; all such fields are listed.

    Examples:
      >>> Recipe("digits", "mlp", width=128, epochs=30).batch_size
      128
    """

    dataset: str
    model: str
    width: int
    epochs: int
    num_train: int | None = None
    batch_size: int = 128
    peak_learning_rate: float = 0.1
    momentum: float = 0.9
    warmup_epochs: int = 5
    weight_decay: float = 1e-4
    augment: bool = False
    warmup_steps: int = 0
    optimizer: str = "sgd"

    def __post_init__(self):
        problems = [
            f"{name}: wanted at least 1, got {getattr(self, name)}"
            for name in ("width", "epochs", "batch_size", "num_train")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not 0 <= self.warmup_epochs <= max(self.epochs, 0):
            problems.append(
                f"warmup_epochs: wanted between 0 and epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps: wanted at least 0, got {self.warmup_steps}")
        if not 0 < self.peak_learning_rate < math.inf:
            problems.append(f"peak_learning_rate: wanted a positive number, got {self.peak_learning_rate}")
        if not 0 <= self.momentum < 1:
            problems.append(f"momentum: wanted at least 0 and less than 1, got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay: wanted a number of at least 0, got {self.weight_decay}")
        if self.optimizer not in OPTIMIZERS:
            problems.append(f"optimizer: wanted one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if problems:
            raise ConfigError(problem_list("this recipe cannot work:", problems))


# Fields that recipes have had since networks were first stored without them.
_LATER_FIELDS = {"warmup_steps": 0, "optimizer": "sgd"}


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe, by name, from which it is written and hashed.

    Fields that were added later are left out at their defaults. A run that was stored before they were added
    is therefore found again.

    Examples:
      >>> "optimizer" in recipe_fields(Recipe("digits", "mlp", width=128, epochs=30))
      False
    """
    fields = dataclasses.asdict(recipe)
    return {name: value for name, value in fields.items() if _LATER_FIELDS.get(name, ...) != value}


def build_recipe(
    regime: str, *, dataset: str, model: str, width: int, epochs: int = 150, **changes: Any
) -> Recipe:
    """Build the recipe of one of the regimes of the papers.

    Args:
      regime: one of `REGIMES`.
      dataset: name of the dataset. On CIFAR, augmentation is on unless `changes` says otherwise.
      model: name of the architecture.
      width: width of the architecture.
      epochs: number of passes over the training split.
      **changes: values of other fields of `Recipe`, which take precedence over the regime.

    Returns:
      A `Recipe`.

    Raises:
      ConfigError: there is no such regime, or a field has a value that cannot work.

    Examples:
      >>> build_recipe("instability", dataset="cifar10", model="resnet20", width=64).augment
      True
    """
    if regime not in REGIMES:
        raise ConfigError(f"no regime is called {regime!r}; there are {', '.join(REGIMES)}")
    images = re.sub(r"_\d+x\d+$", "", dataset)  # whatever their size
    fields = {"augment": images in _AUGMENTED_DATASETS, **REGIMES[regime], **changes}
    return Recipe(dataset=dataset, model=model, width=width, epochs=epochs, **fields)
