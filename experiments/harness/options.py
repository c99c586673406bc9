"""The flags that every experiment binary has, and what each does with them; only binaries import this."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

from experiments.harness.experiment import C, Experiment
from experiments.harness.networks import KEEP
from experiments.harness.pairs import shared_runs
from experiments.harness.presets import PRESETS, Preset, choose_preset
from rebasin.errors import ConfigError, RebasinError
from rebasin.training.data import load_dataset

__all__ = ["Choice", "choose", "choose_epochs", "run_binary"]

_MODELS = {name: ", ".join(models) for name, models in PRESETS.items()}

_PRESET = flags.DEFINE_enum(
    "preset",
    "digits",
    list(PRESETS),
    "What fills in every flag that is not given: digits (minutes), cpu (minutes to an hour and more), paper "
    "(the full recipe, for an accelerator).",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for results.json, the CSV and the figures; must be given.", required=True
)
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir",
    None,
    "Folder of trained networks, found again by recipe and seed. By default OUTPUT_DIR/runs for the "
    "preset digits, else $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first network; the others follow.", lower_bound=0)
_REPLICATES = flags.DEFINE_integer("replicates", None, "Independent pairs of networks.", lower_bound=1)
_DATASET = flags.DEFINE_string("dataset", None, "digits, mnist, cifar10, cifar100 or svhn_cropped.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    f"One that the preset has a recipe for, by default the first: {_MODELS['digits']} (digits); "
    f"{_MODELS['cpu']} (cpu); {_MODELS['paper']} (paper).",
)
_NUM_TRAIN = flags.DEFINE_integer(
    "num_train",
    None,
    "Training examples, in the mix of classes of all; by default the preset's.",
    lower_bound=1,
)
_WIDTH = flags.DEFINE_integer("width", None, "Width of the model.", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", None, "Epochs of training.", lower_bound=1)
_WARMUP_EPOCHS = flags.DEFINE_integer(
    "warmup_epochs",
    None,
    "Epochs of learning rate warm-up; by default those of the recipe, all EPOCHS if these are fewer.",
    lower_bound=0,
)
_RESUME = flags.DEFINE_bool("resume", False, "Go on with an unfinished run in OUTPUT_DIR.")
_NUM_ALPHAS = flags.DEFINE_integer(
    "num_alphas", 25, "Points on each segment, both ends included.", lower_bound=2
)
_NUM_EVAL = flags.DEFINE_integer(
    "num_eval", None, "Examples of each split on which segments are measured.", lower_bound=1
)
_NUM_MATCH = flags.DEFINE_integer(
    "num_match", None, "Training examples for matching methods that need data.", lower_bound=1
)
_KEEP_CHECKPOINTS = flags.DEFINE_enum(
    "keep_checkpoints",
    None,
    list(KEEP),
    "What stays on disk of the networks that this run trains: "
    + "; ".join(f"{name}: {what}" for name, what in KEEP.items())
    + ".",
)


class Choice(NamedTuple):
    """What the shared flags say about a config.

    Attributes:
      preset: what fills in the rest.
      fields: those of `experiments.harness.experiment.Config`, by name.
      num_eval: examples on which segments are measured, `None` for all.
    """

    preset: Preset
    fields: dict[str, Any]
    num_eval: int | None

    @property
    def last(self) -> int:
        """The last epoch."""
        return self.fields["recipe"].epochs


def choose(regime: str = "trajectory") -> Choice:
    """Reads the shared flags.

    Args:
      regime: of the recipe, see `rebasin.recipes.REGIMES`.

    Raises:
      ConfigError: the preset lacks the model, or the recipe cannot work.
    """
    preset = choose_preset(_PRESET.value, _MODEL.value)
    changes = {"dataset": _DATASET.value, "num_train": _NUM_TRAIN.value, "width": _WIDTH.value}
    warmup, epochs = _WARMUP_EPOCHS.value, _EPOCHS.value
    if warmup is None and epochs is not None:
        # A short trial asks for few epochs and does not mean the warm-up.
        warmup = min(preset.build_recipe(regime).warmup_epochs, epochs)
    recipe = preset.build_recipe(regime, **changes, epochs=epochs, warmup_epochs=warmup)
    fields = {
        "recipe": recipe,
        "replicates": _REPLICATES.value or preset.replicates,
        "seed": _SEED.value,
        "num_alphas": _NUM_ALPHAS.value,
        "num_match": _NUM_MATCH.value or preset.num_match,
    }
    return Choice(preset, fields, _NUM_EVAL.value or preset.num_eval)


def choose_epochs(given: Sequence[str] | None, preset: Sequence[int] | None, last: int) -> tuple[int, ...]:
    """The epochs of a flag, else those of a preset that lie before the last one.

    Raises:
      ConfigError: the flag's value is not a list of numbers.
    """
    if given is None:
        return tuple(epoch for epoch in preset or range(last) if epoch < last)
    try:
        return tuple(int(epoch) for epoch in given)
    except ValueError:
        raise ConfigError(f"wanted epochs, such as 0,1,5, got {','.join(given)!r}") from None


def run_binary(
    arguments: Sequence[str],
    experiment: Experiment[C],
    build_config: Callable[[], C],
    *,
    strict: flags.FlagHolder[bool] | None = None,
) -> None:
    """What every binary does once its flags are parsed; what the user got wrong is one message on stderr.

    Args:
      arguments: the name of the program, and what is not a flag.
      experiment: what to run.
      build_config: reads the flags.
      strict: the flag that turns a claim which does not hold into exit status 1.
    """
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}")
    if not flags.FLAGS["verbosity"].present:
        # JAX reports on its backends.
        logging.set_verbosity(logging.WARNING)
    try:
        config = build_config()
        results = experiment.run(
            config,
            load_dataset(config.recipe.dataset, data_dir=_DATA_DIR.value),
            output_dir=pathlib.Path(_OUTPUT_DIR.value),
            runs_dir=_runs_directory(),
            # 151 epochs of a VGG-16 of width 64, with momentum, are 18 GB.
            keep=_KEEP_CHECKPOINTS.value or ("ends" if _PRESET.value == "paper" else None),
            resume=_RESUME.value,
        )
    except RebasinError as error:
        sys.exit(f"error: {error}")
    if strict is not None and strict.value and not all(claim.holds for claim in results.claims):
        sys.exit(1)


def _runs_directory() -> pathlib.Path:
    """Where trained networks are kept, by flag, environment and preset."""
    if _PRESET.value == "digits" and not _RUNS_DIR.value:
        return pathlib.Path(_OUTPUT_DIR.value) / "runs"
    return shared_runs(_RUNS_DIR.value)
