"""The presets: for each model a recipe and the size of the measurement."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.harness.algorithms import PAPER_ALGORITHM
from rebasin.errors import ConfigError
from rebasin.training.recipes import Recipe, build_recipe

__all__ = ["PRESETS", "Preset", "Thresholds", "choose_preset"]


class Thresholds(NamedTuple):
    """Test error barriers, as fractions, against which claims are judged; they were chosen before the runs.

    Attributes:
      unaligned_above: the barrier without a permutation must be above this.
      any_epoch_at_most: the barrier under P_end must be at most this at every epoch.
      end_at_most: the barrier under P_end must be at most this at the last epoch.
    """

    unaligned_above: float
    any_epoch_at_most: float
    end_at_most: float


class Preset(NamedTuple):
    """Everything that a preset fills in for one model.

    Attributes:
      recipe: fields of `Recipe`.
      replicates: number of independent pairs of networks.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
      epochs: epochs at which networks are compared; `None` for all of them.
      thresholds: barriers against which claims are judged.
      match_epochs: epochs whose permutations are applied at all of `epochs`.
      spawn_epochs: epochs at which children leave their parents.
      num_match: number of training examples for matching methods that need data, `None` for all.
      by_regime: fields of `Recipe` that differ in a regime, by the regime's name.
      num_alphas: number of points on each path, both ends included.
      algorithm: how weights and activations are matched, a name in `ALGORITHMS`.
      widths: widths at which networks are compared, ascending; `None` for that of the recipe alone.
    """

    recipe: Mapping[str, Any]
    replicates: int
    num_eval: int | None
    epochs: tuple[int, ...] | None
    thresholds: Thresholds
    match_epochs: tuple[int, ...]
    spawn_epochs: tuple[int, ...]
    num_match: int | None
    by_regime: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    num_alphas: int = 25
    algorithm: str = "best"
    widths: tuple[int, ...] | None = None

    def build_recipe(self, regime: str, **changes: Any) -> Recipe:
        """Return the recipe of a regime, with those `changes` that are not `None`."""
        given = {name: value for name, value in changes.items() if value is not None}
        return build_recipe(regime, **{**self.recipe, **self.by_regime.get(regime, {}), **given})


# Read off the paper's plots for VGG-16 on CIFAR-10: about 70 % unaligned, at most .09 (test) at any epoch
# under one permutation from the end, .06 at the end.
_PAPER = Thresholds(unaligned_above=0.40, any_epoch_at_most=0.10, end_at_most=0.08)

PRESETS: dict[str, dict[str, Preset]] = {
    "digits": {
        "mlp": Preset(
            # The paper's recipe but for the batch: with 1,437 examples, 128 would leave 11 steps an epoch.
            {"dataset": "digits", "model": "mlp", "width": 128, "epochs": 30, "batch_size": 32},
            replicates=5,
            num_eval=None,
            epochs=(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 25, 30),
            thresholds=Thresholds(unaligned_above=0.40, any_epoch_at_most=0.10, end_at_most=0.03),
            match_epochs=(0, 1, 2, 3, 5, 10, 30),
            spawn_epochs=(0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 20),
            num_match=None,
            # Two experiments train networks in dozens of ways by this regime.
            by_regime={"optimal_transport": {"epochs": 8}},
            widths=(16, 32, 64, 128, 256, 512, 1024),
        ),
        # Not in the paper: a transformer, whose heads and dimensions within heads are aligned too.
        "vit": Preset(
            {"dataset": "digits", "model": "vit", "width": 64, "epochs": 30, "batch_size": 32},
            replicates=3,
            num_eval=None,
            epochs=(0, 1, 2, 3, 5, 7, 10, 14, 20, 30),
            thresholds=Thresholds(unaligned_above=0.40, any_epoch_at_most=0.10, end_at_most=0.03),
            match_epochs=(1, 3, 10, 30),
            spawn_epochs=(0, 1, 2, 3, 5, 10),
            num_match=None,
            widths=(16, 32, 64, 128),
        ),
    },
    "cpu": {
        "mlp": Preset(
            {"dataset": "mnist", "model": "mlp", "width": 512, "epochs": 20},
            replicates=5,
            num_eval=5_000,
            epochs=(0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20),
            thresholds=_PAPER,
            match_epochs=(1, 2, 3, 5, 20),
            spawn_epochs=(0, 1, 2, 3, 5, 8, 13),
            num_match=5_000,
            widths=(32, 64, 128, 256, 512),
        ),
        # On all images and at this width VGG-16 shows the shape of the paper's curves; at half the width and
        # on 20,000 images weight matching leaves most of the barrier. Children are many: 128 epochs of
        # training for each pair of parents, which is why their networks are narrower and see fewer images.
        "vgg16": Preset(
            {"dataset": "cifar10", "model": "vgg16", "width": 16, "epochs": 20, "num_train": 50_000},
            replicates=3,
            num_eval=1_000,
            epochs=(0, 1, 2, 3, 5, 8, 12, 20),
            thresholds=_PAPER,
            match_epochs=(1, 3, 8, 20),
            spawn_epochs=(0, 1, 2, 4, 7),
            num_match=1_000,
            by_regime={
                "trajectory": {"warmup_epochs": 2},
                "instability": {"width": 8, "num_train": 20_000, "epochs": 10, "warmup_epochs": 3},
            },
            widths=(4, 8, 16),
        ),
        **{
            model: Preset(
                {
                    "dataset": "cifar10",
                    "model": model,
                    "width": 8,
                    "epochs": epochs,
                    "num_train": 20_000,
                },
                replicates=3,
                num_eval=1_000,
                epochs=(*(epoch for epoch in (0, 1, 2, 3, 5, 8, 12) if epoch < epochs), epochs),
                thresholds=_PAPER,
                match_epochs=(1, 3, 8, epochs),
                spawn_epochs=(0, 1, 2, 4, 7),
                num_match=1_000,
                # An epoch of 20,000 images is 156 steps, not the paper's 390. After a warm-up of one such
                # epoch 2 of 6 narrow VGG-16s stayed at the loss of guessing. Instability trains for fewer
                # epochs, since three children leave each pair at every spawn epoch: 128 epochs in all.
                by_regime={
                    "trajectory": {"warmup_epochs": 2},
                    "instability": {"epochs": 10, "warmup_epochs": 3},
                },
                widths=(4, 8, 16),
            )
            # Networks with BatchNorm, on which REPAIR is measured, learn in fewer epochs.
            for model, epochs in (("resnet20", 16), ("vgg16_batchnorm", 10), ("resnet20_batchnorm", 10))
        },
    },
    "paper": {
        model: Preset(
            {"dataset": dataset, "model": model, "width": width, "epochs": 150},
            replicates=5,
            num_eval=10_000,
            epochs=(0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 50, 65, 80, 95, 110, 130, 150),
            thresholds=_PAPER,
            match_epochs=(1, 3, 5, 10, 20, 50, 80, 110, 150),
            spawn_epochs=(0, 1, 2, 3, 5, 7, 10, 14, 20, 40, 80),
            # As the paper, on all training data.
            num_match=None,
            algorithm=PAPER_ALGORITHM,
            # Up to the width of the paper's other experiments: figure 3 has no numbers at its axis that can
            # be read.
            widths=tuple(width // 2**i for i in reversed(range(4))),
        )
        for model, dataset, width in (
            ("vgg16", "cifar10", 64),
            ("resnet20", "cifar10", 64),
            ("mlp", "mnist", 512),
        )
    },
}

# The networks of `digits` with fewer epochs, permutations and alphas to measure: `make demo` is done in a
# minute.
PRESETS = {
    "demo": {
        "mlp": PRESETS["digits"]["mlp"]._replace(
            epochs=(0, 1, 2, 3, 5, 7, 10, 14, 20, 30),
            match_epochs=(1, 3, 10, 30),
            spawn_epochs=(0, 1, 2, 5, 10),
            num_alphas=13,
            widths=(32, 128),
        )
    },
    **PRESETS,
}


def choose_preset(name: str, model: str | None) -> Preset:
    """Return the preset of a name for a model, by default for its first model.

    Raises:
      ConfigError: there is no such preset, or it does not have the model.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    models = PRESETS[name]
    if model is not None and model not in models:
        raise ConfigError(
            f"preset {name!r} has no recipe for the model {model!r}; it has {', '.join(models)}"
        )
    return models[model or next(iter(models))]
